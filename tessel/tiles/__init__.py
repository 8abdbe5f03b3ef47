"""Tile programs: what one generated kernel does, before any language is chosen.

``axes`` says which nodes can be one kernel, ``lower`` (and ``attention``, ``loops``) write their tile program, whose
record is ``kernel`` and whose coordinates are ``index`` and ``places``. ``header`` reads what a template declares.
"""
