"""From PyTorch to the IR: capture, rewrites of the captured fx graph, import.

    capture     a model's graphs, through AOTAutograd or ``torch.export``; ``joint`` for a plan of training, ``split``
                for its parts, ``recorded`` for a capture of an earlier process
    rewrites    of the Dynamo graph, before AOTAutograd opens operators: ``composites``, ``attention_match``, ``flex``,
                ``losses``, ``experts`` and ``loops/`` find what shall stay whole; all read it by ``fx_words``
    *_op        what they put there: torch operators that no tracer opens
    importer    each node as IR operators, by the tables ``aten_*``, ``special`` and what ``lower`` offers them; where
                there are none an ``opaque`` call, with the reason
    compat      every private or moving name of torch
"""
