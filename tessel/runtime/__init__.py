"""Run time: what the generated host program calls.

``program`` makes it callable, ``buffers`` plans its memory, ``launch`` (Triton) and ``native`` (C++) load kernels,
``collectives`` sends. Operators that a host function strings together have a module a place: ``*_cpu``, ``*_gpu``.
"""
