"""Loops over time in a Dynamo graph, found and rewritten before AOTAutograd sees them.

    h, y = step(h, x[t], w)  for every t          (``step.Step``)

becomes, where the step is ``h = a * h + b`` with a and b free of h,

    a, b = everything before the recurrence, for all t at once
    h = tessel::linear_scan(a, b)
    y = everything after it, for all t at once

where it is a state of keys times values, ``tessel::linear_attention``, and else torch's higher-order operator ``scan``,
which has the step as a region and knows its gradient. Either way the graph has as many nodes for 2048 steps as for 16.
Every tensor of all steps has time as its first dimension.

    roll          loops that Dynamo unrolled: ``repeats`` finds what repeats itself, ``unrolled`` reads it as a step,
                  ``counting`` says what its indices take
    scans         torch's own scan operators
    emit          what is written for a step: ``linear_match`` (with ``terms``), ``affine`` and ``written``, or a scan
    selective     recurrences whose states are folded at once; ``labels`` names the axes here and in ``linear_match``
"""
