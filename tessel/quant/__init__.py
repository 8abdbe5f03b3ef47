"""Quantization: number formats and schemes as data, calibration methods, and how many bits go where.

Everything here is plain torch on plain tensors; what compiles and runs quantized models builds on it.
"""
