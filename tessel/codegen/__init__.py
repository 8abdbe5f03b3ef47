"""From tile programs to source text.

``triton`` renders ``templates/<family>.triton.j2`` and ``cpp/`` renders ``templates/<family>.cpp.j2``, each family by a
module that makes the lines its template is given. ``host`` writes the program that calls the kernels, ``offline``
compiles for GPUs that are not there.
"""
