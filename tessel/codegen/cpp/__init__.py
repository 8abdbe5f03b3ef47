"""Tile programs as C++ for the CPU.

    from tessel.codegen.cpp import render, translation_unit

``unit`` renders kernels and the file that holds a graph's. The families have a module each (``reduce``, ``scan`` and
``running``, ``matmul``, ``attention``), over ``space`` (which loops there are), ``expr`` (statements as text),
``vector`` (which may go by vectors) and ``words`` (types and literals). ``linear``, ``selective``, ``packed`` and
``whole`` are units around a header of their own; ``includes`` finds the headers of any of them.
"""

from .unit import CppSource, render, translation_unit

__all__ = ["CppSource", "render", "translation_unit"]
