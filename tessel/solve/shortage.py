"""Why no plan fits, in words: which kinds of memory together are more than a device has."""

from __future__ import annotations

from collections.abc import Mapping

from ..targets.mesh import Mesh
from .memory import param_bytes
from .shard_price import Pricer
from .shard_search import Answer
from .units import numel

__all__ = ["kinds_of", "shortage"]


def kinds_of(answer: Answer, pricer: Pricer) -> dict[str, float]:
    """The memory of an answer by kind, without what is transient."""
    found = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0}
    optimizer = pricer.setting.optimizer if pricer.setting.train else None
    for picked in answer.segments:
        for unit, choice in picked.choices.items():
            for w in choice.weights:
                if w.param.users[0] is not unit:
                    continue
                split, kinds = 1, []
                for axis, code, level in zip(pricer.axes, w.state, w.levels):
                    if code >= 0:
                        split *= axis.size
                    else:
                        kinds.append((level, axis.size))
                held = param_bytes(numel(w.param.type) / split, w.param.type.dtype.itemsize, kinds, optimizer)
                found["parameters"] += held.params
                found["gradients"] += held.grads
                found["optimizer"] += held.optimizer
    return {**found, "activations": answer.nbytes - sum(found.values())}


def shortage(answer: Answer, pricer: Pricer, limit: float, mesh: Mesh, held: Mapping[str, float]) -> str:
    """The message: the smallest set of facts that z3 finds to contradict the limit, then all kinds, then what helps."""
    import z3

    kinds = {**kinds_of(answer, pricer), **held}
    solver = z3.Solver()
    total = z3.RealVal(0)
    marks = {}
    for name, need in kinds.items():
        size = z3.Real(name)
        marks[name] = z3.Bool(f"need {name}")
        solver.add(size >= 0, z3.Implies(marks[name], size >= int(need)))
        total = total + size
    solver.add(total <= int(limit))
    core = list(kinds)
    for name in sorted(kinds, key=lambda n: kinds[n]):  # leave out small ones while it still contradicts
        rest = [n for n in core if n != name]
        if rest and solver.check(*(marks[n] for n in rest)) == z3.unsat:
            core = rest
    alone = f"{core[0]} alone need" if len(core) == 1 else f"{', '.join(core[:-1])} and {core[-1]} together need"
    need = sum(kinds[n] for n in core)
    items = ", ".join(f"{n} {_size(b)}" for n, b in kinds.items() if b > 0)
    return (
        f"no plan fits {_size(limit)} a device with {mesh}: {alone} {_size(need)}, more than {_size(limit)}. "
        f"The least that any plan holds: {items}. {_advice(pricer, core)}"
    )


def _advice(pricer: Pricer, core: list[str]) -> str:
    setting = pricer.setting
    out = []
    if set(core) & {"activations", "temporaries", "inputs"}:
        if setting.remat not in ("auto", "full"):
            out.append("let activations be computed again (--remat auto)")
        out.append(f"more microbatches (now {setting.microbatches})")
    if set(core) & {"parameters", "gradients", "optimizer"}:
        out.append("more devices on an axis that splits parameters or gathers them (fsdp, tp)")
        if setting.train and setting.optimizer != "sgd":
            out.append(f"a smaller optimizer than {setting.optimizer}")
    return "What helps: " + "; ".join(out) + "."


def _size(nbytes: float) -> str:
    """Bytes in the unit that memory is sold in, and in the one that it is counted in."""
    if nbytes < 1e5:
        return f"{nbytes / 1e3:.4g} kB"
    if nbytes < 1e9:
        return f"{nbytes / 1e6:.4g} MB"
    return f"{nbytes / 1e9:.4g} GB ({nbytes / 2**30:.1f} GiB)"
