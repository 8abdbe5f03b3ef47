"""From annotations to a plan and from a plan to ranks: everything that knows a whole model and a mesh.

``annotate`` states what a user wants, ``planner`` searches, ``plan_file`` keeps the answer (``entries`` makes its rows,
``text`` prints them), ``spmd`` lays a graph out for one rank, ``distributed`` runs it. The rules themselves are passes
(``passes/shard.py``, ``passes/partition.py``), the prices are ``solve/``.
"""
