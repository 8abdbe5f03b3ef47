"""The tensor IR: ``node`` and ``types``, ``text`` and ``parse``, ``verify``, ``rewrite``, ``sharding``.

``interp`` runs any graph in float64 by the operators' references: the oracle of the tests. Nothing here knows the
operators, which are tables in ``ops/``.
"""
