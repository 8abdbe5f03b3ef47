"""The ways to run one unit on a mesh, and what each costs.

Every mesh axis splits one factor of the unit's dims string, or none. What follows is read off the string: an operand
that has the factor is split, one that has not is the same everywhere and its gradient partial; a result that has it is
split, one that lost it is partial. Data, tensor, sequence, vocabulary and expert parallelism are such choices; with a
parameter's level (``memory.py``) ZeRO and FSDP are too; Ulysses is a change of layout between two of them. Two ways
need a word of their own, since one axis splits two factors: ring attention, where queries and keys are split and keys
travel, and experts on the devices of an axis that splits the tokens too, where tokens travel. Tokens of linear
attention are split though one follows from the other: what a share of them makes of the state is gathered.

Time of work is a roofline: the longer of arithmetic and memory traffic at the rates that the device reaches in
practice. What a parameter adds is in ``shard_weights``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

from ..errors import TesselError
from ..ir.node import Value
from ..ir.sharding import Sharding
from ..ir.types import DTYPE_NAMES
from ..ops.dims import Factor, Shape, window_of
from ..targets import Target, calibration_of
from .comm import Atom, Layouts, MeshAxis, P, R, State, V
from .memory import is_cheap
from .shard_choice import Choice, Role, Setting, Split, agrees, may_lie, role_of
from .shard_inner import SUMS, Inner
from .shard_weights import Weights
from .units import Param, Tensor, Unit, Use, place_of, view_back

__all__ = ["Pricer"]

_NEVER = ("scan",)  # the state that one piece hands to the next is no collective
_BACKWARD = {"attention": 2.5, "linear_cross_entropy": 3.0}  # products of the backward ÷ those of the forward; else 2


@dataclass
class Pricer:
    """Prices of one graph on one mesh."""

    target: Target
    axes: tuple[MeshAxis, ...]
    setting: Setting
    _layouts: dict[tuple[int, tuple[Atom, ...], bool], Layouts] = field(default_factory=dict)
    _known: dict[Unit, list[Choice]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        memory = self.target.level("memory").bandwidth_bytes_per_s
        assert memory is not None, f"{self.target.name} has no memory bandwidth"
        gpu = self.target.gpu_target is not None
        self.memory_rate = memory * (calibration_of(self.target).memory_efficiency if gpu else 1.0)
        self.part = calibration_of(self.target).matrix_efficiency if gpu else 1.0

    def rate(self, unit: Unit) -> float:
        """Operations a second that long products reach."""
        flops = self.target.flops
        name = DTYPE_NAMES.get(unit.node.type.dtype, "f32")
        use = next((DTYPE_NAMES.get(u.type.dtype, "f32") for u in unit.uses if u.type.dtype.is_floating_point), name)
        use = "tf32" if use == "f32" and "tf32" in flops else use
        return flops.get(use, flops["f32"]) * self.part

    def layouts(self, tensor: Tensor) -> Layouts:
        """The layouts of a tensor; equal tensors share one table."""
        train = self.setting.train and tensor.type.dtype.is_floating_point
        key = (tensor.nbytes, tensor.atoms, train)
        if key not in self._layouts:
            self._layouts[key] = Layouts(tensor.nbytes, tensor.atoms, self.axes, train)
        return self._layouts[key]

    # ---------------------------------------------------------------- choices

    def choices(self, unit: Unit) -> list[Choice]:
        """Every way to run a unit, without those that cost more time and memory than one like it."""
        if unit not in self._known:
            self._known[unit] = self._choices(unit)
        return self._known[unit]

    def in_flight(self, held: float) -> Pricer:
        """The same prices where the activations of ``held`` microbatches are alive at once."""
        return replace(self, setting=replace(self.setting, in_flight=held))  # what is known does not depend on it

    def _choices(self, unit: Unit) -> list[Choice]:
        found = []
        for splits in product(*(self._splits(unit, axis) for axis in self.axes)):
            choice = self._choice(unit, splits)
            if choice is not None:
                found += self._with_weights(unit, choice)
        return _undominated(found, self.setting.microbatches)

    def _splits(self, unit: Unit, axis: MeshAxis) -> list[Split | None]:
        out: list[Split | None] = [None]
        if unit.node.op.random:
            return out
        role = role_of(axis.name) if self.setting.roles else Role()
        for name, factor in unit.dims.factors.items():
            if (_may_split(factor) or window_of(unit.node, unit.dims, name)) and unit.sizes[name] > 1:
                out += [Split(name, m) for m in unit.majors[name] if role.allows(unit, unit.roles.get((name, m), ""))]
        if self._may_ring(unit) and role.allows(unit, "sequence"):
            out.append(Split("s", 1, "t"))
        if unit.op == "experts" and self.setting.capacity is not None and not role.only:
            out.append(Split("t", 1, "e"))
        if unit.op == "linear_attention" and not any(isinstance(a, Value) for a in unit.node.args[4:5]):
            out += [Split("t", 1, "states")] if role.allows(unit, unit.roles.get(("t", 1), "")) else []
        if unit.op == "attention" and role.attention:
            return self._of_form(unit, axis, role.attention, out)
        return out

    def _may_ring(self, unit: Unit) -> bool:
        """Whether keys may travel: as many as queries, no sink, which counts once, and no mask that has a gradient."""
        if unit.op != "attention" or not _may_split(unit.dims.factors["t"]) or unit.sizes["s"] != unit.sizes["t"]:
            return False
        masks = unit.uses[3:]
        return not (self.setting.train and any(u.source and u.type.dtype.is_floating_point for u in masks))

    def _of_form(self, unit: Unit, axis: MeshAxis, form: str, splits: Sequence[Split | None]) -> list[Split | None]:
        """The splits of an attention by an axis whose name asks for rings, or for heads.

        Raises:
            TesselError: the attention has no such form; the numbers are named.
        """
        heads = {f.name for term in unit.dims.operands[0][1:2] for f in term}
        found = [s for s in splits if s is not None and (s.both == "t" if form == "ring" else s.factor in heads)]
        of = {s.factor: unit.sizes[s.factor] for s in found}
        if not any(n % axis.size == 0 for n in of.values()):
            what = (" x ".join(str(unit.sizes[h]) for h in sorted(heads)) or "1") + " heads"
            what = f"{unit.sizes['s']} queries and {unit.sizes['t']} keys" if form == "ring" else what
            raise TesselError(
                f"{unit.name} (attention, {unit.node.loc.short}): {what} do not divide over {axis.name}={axis.size}"
                + ("" if found or form == "heads" else ", or a sink or a mask with a gradient does not go round")
                + "; call the axis sp to let the search choose the form"
            )
        return list(found)

    def _choice(self, unit: Unit, splits: tuple[Split | None, ...]) -> Choice | None:
        pieces: dict[Split, int] = {}
        for axis, split in zip(self.axes, splits):
            for s in _factors(split):
                pieces[s] = pieces.get(s, 1) * axis.size
        for s, n in pieces.items():
            later = [m for m in unit.majors[s.factor] if m > s.major]
            if (min(later) if later else unit.sizes[s.factor]) // s.major % n:
                return None
        twice = [s for s in splits if s is not None and s.both]
        if twice:  # keys travel over all the axes that split them; tokens may be split further, experts not
            clash = {twice[0].both, twice[0].factor if twice[0].both == "t" else ""}
            if len(twice) > 1 or any(s is not None and not s.both and s.factor in clash for s in splits):
                return None
        for s, n in pieces.items():
            halo = window_of(unit.node, unit.dims, s.factor)
            if halo is not None and not halo.fits(n):
                return None
        needs: list[State | None] = []
        for use, shape in zip(unit.uses, unit.dims.operands, strict=True):
            state = self._need(unit, use, shape, splits, pieces)
            if state is None:
                return None
            needs.append(state if isinstance(use.source, Tensor) else None)
        outs = []
        for tensor, shape in zip(unit.results, unit.dims.results, strict=True):
            outs.append(tuple(self._out(unit, tensor, shape, s) for s in splits))
            if not self.layouts(tensor).divides(outs[-1]):
                return None
            if self.is_pinned(tensor) and not self._made_as_asked(tensor, outs[-1]):
                return None
        if not self._asked_inputs(unit, splits, pieces) or (self.setting.runs and not _sayable(unit, pieces)):
            return None
        forward, backward = self._work(unit, splits)
        inner = tuple(Inner(unit, splits, self.axes, self.setting).steps())
        exposed = sum(s.seconds for s in inner if s.kind != "permute")
        for back, work in ((False, forward), (True, backward)):  # what a ring moves hides behind its work
            exposed += max(0.0, sum(s.seconds for s in inner if s.kind == "permute" and s.backward == back) - work)
        return Choice(splits, tuple(needs), tuple(outs), forward, backward, inner, exposed)

    def _need(
        self, unit: Unit, use: Use, shape: Shape, splits: Sequence[Split | None], pieces: Mapping[Split, int]
    ) -> State | None:
        """The layout that an operand must have; None where its views are in the way."""
        if use.source is None:
            return ()
        has_gradient = use.source.type.dtype.is_floating_point  # indices are the same copy, whoever reads them
        train = (self.setting.train and has_gradient) if isinstance(use.source, Tensor) else True
        atoms = use.source.atoms if isinstance(use.source, Tensor) else _param_atoms(use.source)
        out = []
        for split in splits:
            if split is None:
                out.append(R)
                continue
            places = [(place_of(shape, s.factor, unit.sizes), s) for s in _factors(split)]
            at, s = next(((at, s) for at, s in places if at is not None), (None, split))
            if at is None:
                out.append(V if train else R)
                continue
            found = view_back(use.views, (at[0], at[1] * s.major), pieces[s])
            if found is True:
                out.append(V if train else R)
                continue
            number = next((i for i, a in enumerate(atoms) if (a.dim, a.major) == found), None)
            if number is None:
                return None
            out.append(number)
        state = tuple(out)
        if isinstance(use.source, Tensor) and not self.layouts(use.source).divides(state):
            return None
        return state

    def _asked_inputs(self, unit: Unit, splits: Sequence[Split | None], pieces: Mapping[Split, int]) -> bool:
        """Whether inputs of the model are read as the user said that they lie."""
        for use, shape in zip(unit.uses, unit.dims.operands, strict=True):
            asked = self.setting.pins.inputs.get(use.name) if use.source is None else None
            if asked is None:
                continue
            dims: list[list[str]] = [[] for _ in range(asked.rank)]
            for axis, split in zip(self.axes, splits):
                places = ((place_of(shape, s.factor, unit.sizes), s) for s in _factors(split))
                at, own = next(((at, s) for at, s in places if at is not None), (None, split))
                if own is None or at is None:
                    continue
                found = view_back(use.views, (at[0], at[1] * own.major), pieces[own])
                if found is None:
                    return False
                if not isinstance(found, bool):
                    dims[found[0]].append(axis.name)
            if not agrees(asked, Sharding(tuple(map(tuple, dims)))):
                return False
        return True

    def asked(self, tensor: Tensor, state: State) -> bool:
        """Whether a tensor may be kept in a layout, after what the user said of it and what can be laid out."""
        said = self.setting.pins.results.get(tensor.name, {})
        for axis, code in zip(self.axes, state):
            if axis.name in said and said[axis.name] != (
                (tensor.atoms[code].dim, tensor.atoms[code].major) if code >= 0 else None
            ):
                return False
        if not self.setting.runs:
            return True
        parts: dict[int, dict[int, int]] = {}
        for axis, code in zip(self.axes, state):
            if code >= 0:
                atom = tensor.atoms[code]
                own = parts.setdefault(atom.dim, {})
                own[atom.major] = own.get(atom.major, 1) * axis.size
        return all(may_lie(own.items()) for own in parts.values())

    def _made_as_asked(self, tensor: Tensor, state: State) -> bool:
        """Whether a unit makes what the user asked for, up to sums that are finished on the way to the readers."""
        return self.asked(tensor, state) or (
            bool(tensor.users)
            and P in state
            and any(
                self.asked(tensor, s)
                for s in self.layouts(tensor).states
                if all(a in (b, P) for a, b in zip(state, s)) and P not in s
            )
        )

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the user said how a tensor lies."""
        return tensor.name in self.setting.pins.results

    def _out(self, unit: Unit, tensor: Tensor, shape: Shape, split: Split | None) -> int:
        if split is None:
            return R
        at = place_of(shape, split.factor, unit.sizes)
        if at is None:
            factor = unit.dims.factors[split.factor]
            return P if factor.kind == "reduce" and factor.combine in SUMS else R
        place = (at[0], at[1] * split.major)
        return next(i for i, a in enumerate(tensor.atoms) if (a.dim, a.major) == place)

    # ---------------------------------------------------------------- work

    def _work(self, unit: Unit, splits: Sequence[Split | None]) -> tuple[float, float]:
        """Seconds forward and backward of one device's part."""
        flops = float(unit.node.op.flops(unit.node)) if unit.node.op.flops and not is_cheap(unit) else 0.0
        share = prod(a.size for a, s in zip(self.axes, splits) if s is not None)
        traffic = 0.0
        shapes = (*unit.dims.operands, *unit.dims.results)
        for nbytes, shape in zip(self._traffic(unit), shapes, strict=True):
            own = {f.name for term in shape for f in term}
            parts = prod(a.size for a, s in zip(self.axes, splits) if s and any(f.factor in own for f in _factors(s)))
            traffic += nbytes / parts
        forward = max(flops / share / self.rate(unit), traffic / self.memory_rate)
        if not self.setting.train:
            return forward, 0.0
        times = _BACKWARD.get(unit.op, 2.0)
        return forward, max(times * flops / share / self.rate(unit), 2 * traffic / self.memory_rate)

    def least_work(self, unit: Unit) -> float:
        """Seconds of a unit's forward if every device did its even share of the arithmetic."""
        flops = float(unit.node.op.flops(unit.node)) if unit.node.op.flops else 0.0
        return flops / prod(a.size for a in self.axes) / self.rate(unit)

    def _traffic(self, unit: Unit) -> Iterator[float]:
        """Bytes of memory traffic of every operand and result; what fused work keeps in registers has none."""
        for use in unit.uses:
            source = use.source
            inside = isinstance(source, Tensor) and (
                _read_before(unit, source) or (_fuses(unit) and _in_registers(source))
            )
            nbytes = int(use.type.nbytes)
            yield 0.0 if inside else float(min(nbytes, int(source.type.nbytes)) if source is not None else nbytes)
        for t in unit.results:
            yield 0.0 if _in_registers(t) else float(t.nbytes)

    # ---------------------------------------------------------------- parameters

    def _with_weights(self, unit: Unit, choice: Choice) -> list[Choice]:
        """The choice with every way to keep its parameters."""
        uses: dict[Param, State] = {}
        for use, shape in zip(unit.uses, unit.dims.operands, strict=True):
            if isinstance(use.source, Param):
                pieces: dict[Split, int] = {}
                for axis, split in zip(self.axes, choice.splits):
                    for s in _factors(split):
                        pieces[s] = pieces.get(s, 1) * axis.size
                state = self._need(unit, use, shape, choice.splits, pieces)
                assert state is not None
                if uses.setdefault(use.source, state) != state:
                    return []
        kept = Weights(self.axes, self.setting)
        options = [list(kept.ways(unit, p, state, choice)) for p, state in uses.items()]
        return [
            Choice(choice.splits, choice.needs, choice.outs, choice.forward, choice.backward, choice.inner,
                   choice.inner_seconds, weights)
            for weights in product(*options)
        ]  # fmt: skip


def _param_atoms(param: Param) -> tuple[Atom, ...]:
    return tuple(Atom(d, 1, n) for d, n in enumerate(param.type.shape))  # type: ignore[arg-type]


def _sayable(unit: Unit, pieces: Mapping[Split, int]) -> bool:
    """Whether a sharding says how each operand and result of a unit lies, if its factors are split so."""
    for shape in (*unit.dims.operands, *unit.dims.results):
        parts: dict[int, list[tuple[int, int]]] = {}
        for split, n in pieces.items():
            at = place_of(shape, split.factor, unit.sizes)
            if at is not None:
                parts.setdefault(at[0], []).append((at[1] * split.major, n))
        if not all(map(may_lie, parts.values())):
            return False
    return True


def _may_split(factor: Factor) -> bool:
    return factor.kind == "map" or (factor.kind == "reduce" and factor.combine not in _NEVER)


def _factors(split: Split | None) -> tuple[Split, ...]:
    """The factors that a split divides."""
    return split.factors if split is not None else ()


def _fuses(unit: Unit) -> bool:
    """Whether the unit becomes part of a kernel with the pointwise work around it."""
    return is_cheap(unit) or unit.node.op.kind == "reduce" or unit.op == "mean"


def _read_before(unit: Unit, t: Tensor) -> bool:
    """Whether an earlier product reads ``t`` too: query, key and value, gate and up count as one wide product."""
    products = [u for u, _ in t.users if u.node.op.kind == "contract"]
    return unit in products[1:]


def _in_registers(t: Tensor) -> bool:
    """Whether a value never reaches memory: pointwise, read by fused work only, not where segments meet."""
    return is_cheap(t.unit) and not t.leaves and not t.cut and all(_fuses(u) for u, _ in t.users)


def _undominated(found: Sequence[Choice], microbatches: int) -> list[Choice]:
    """Of choices that look the same from outside, those that no other beats in time and memory."""
    groups: dict[object, list[Choice]] = {}
    for c in found:
        shared = tuple(w.storage for w in c.weights if len(w.param.users) > 1)
        groups.setdefault((c.needs, c.outs, shared), []).append(c)
    out = []
    for group in groups.values():
        best = float("inf")
        for c in sorted(group, key=lambda c: (c.seconds(microbatches), c.nbytes)):
            if c.nbytes < best:
                out.append(c)
                best = c.nbytes
    return out
