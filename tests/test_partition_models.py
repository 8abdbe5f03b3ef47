"""Models under data, tensor, sequence and fully sharded data parallelism, all ranks in one process.

Results and every gradient equal those of one device in float64; the collectives are those of the papers.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from ranks import annotations, counts, same_as_one_device

from tessel.errors import TesselError
from tessel.frontend.joint import Step, capture_step, tensors_of
from tessel.models import load_model
from tessel.sharding.spmd import Spmd, lay_out
from tessel.sharding.verify import verify_program
from tessel.targets.mesh import Mesh

pytest.importorskip("transformers")

INPUT = {"vit": ("dp", None, None, None)}
# What is split over tp; the rest follows. GPT-2 keeps q, k and v in one matrix, whose split is not that of heads.
TENSOR: dict[str, list[tuple[str, tuple[Any, ...]]]] = {
    "llama": [("**.q_proj.weight", ("tp", None)), ("**.up_proj.weight", ("tp", None))],
    "mixtral": [("**.q_proj.weight", ("tp", None))],
    "gpt2": [("**.c_fc.weight", (None, "tp"))],
    "bert": [("**.query.weight", ("tp", None)), ("**.intermediate.dense.weight", ("tp", None))],
    "vit": [("**.q_proj.weight", ("tp", None)), ("**.fc1.weight", ("tp", None))],
}
LAYERS = {"llama": "layers.*", "mixtral": "layers.*", "gpt2": "h.*", "bert": "layer.*"}
MODELS = sorted(TENSOR)


@cache
def captured(name: str) -> tuple[torch.nn.Module, list[torch.Tensor], Step]:
    model, args, kwargs = load_model(f"hf:{name}", layers=1, batch=4, seq=8)
    return model, tensors_of(args, kwargs), capture_step(model, args, kwargs, train=True)


def data(name: str) -> list[tuple[Any, ...]]:
    return [("shard", "inputs[0]", INPUT.get(name, ("dp", None)))]


def tensor(name: str) -> list[tuple[Any, ...]]:
    return [("shard", pattern, dims) for pattern, dims in TENSOR[name]]


def sequence(name: str, batch: str | None) -> list[tuple[Any, ...]]:
    return [("output", LAYERS[name], (batch, "tp", None))]


def kept(name: str) -> list[tuple[Any, ...]]:
    """Every matrix kept split by dp and gathered where it is used."""
    (step,) = captured(name)[2:]
    return [
        ("shard", str(n.attrs["name"]), ("dp", *[None] * (n.out.type.rank - 1)), {"gather": ["dp"]})
        for n in step.forward.graph.inputs
        if n.attrs["role"] == "param" and n.out.shape[0] % 2 == 0 and "position" not in str(n.attrs["name"])
    ]


def laid(name: str, mesh: dict[str, int], lines: list[tuple[Any, ...]]) -> Spmd:
    model, user, step = captured(name)
    spmd = lay_out(step, Mesh(mesh), annotations(lines))
    same_as_one_device(spmd, model, user)
    assert spmd.forward.warnings == []
    return spmd


@pytest.mark.parametrize("name", MODELS)
def test_data_parallel(name: str) -> None:
    spmd = laid(name, {"dp": 2}, data(name))
    assert spmd.backward is not None
    if name in ("mixtral", "vit"):
        return  # tokens sorted by expert, and the gradient of a convolution, an opaque call, need whole batches
    graph = spmd.forward.graph
    params = sum(n.out.type.nbytes for n in graph.inputs if n.attrs["role"] == "param")
    # 2 * (bytes of the parameters) * (n - 1) / n; less where positions are learned, of which only 8 are used
    assert counts(spmd.backward).keys() == {"all_reduce dp"}
    assert spmd.backward.bytes == params if name == "llama" else spmd.backward.bytes <= params


@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel(name: str) -> None:
    spmd = laid(name, {"tp": 2}, tensor(name))
    # Megatron: one all-reduce where attention ends and one where the MLP ends, and the same in the backward
    parts = 1 if name in ("gpt2", "mixtral") else 2
    assert counts(spmd.forward) == {"all_reduce tp": parts}
    assert spmd.backward is not None and counts(spmd.backward) == {"all_reduce tp": parts}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_tensor_and_sequence_parallel(name: str) -> None:
    spmd = laid(name, {"tp": 2}, tensor(name) + sequence(name, None))
    found = counts(spmd.forward)
    assert found["reduce_scatter tp"] == (1 if name in ("gpt2", "mixtral") else 2)
    assert found["all_reduce tp"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_fully_sharded(name: str) -> None:
    """ZeRO-3: parameters gathered before use, their gradients scattered."""
    lines = kept(name)
    spmd = laid(name, {"dp": 2}, data(name) + lines)
    assert spmd.backward is not None
    if name != "mixtral":
        assert counts(spmd.forward)["all_gather dp"] == len(lines) + 1  # and the logits
        assert len(lines) - 2 <= counts(spmd.backward)["reduce_scatter dp"] <= len(lines)  # less: as above


@pytest.mark.parametrize("name", MODELS)
def test_two_dimensions(name: str) -> None:
    lines = data(name) + tensor(name)
    laid(name, {"dp": 2, "tp": 2}, lines + sequence(name, "dp") if name in LAYERS else lines)


@pytest.mark.parametrize(("name", "ring"), [("llama", True), ("gpt2", True), ("bert", False), ("mixtral", True)])
def test_split_sequences(name: str, ring: bool) -> None:
    """Several sequences a rank, each of them split: no activation of a linear layer is gathered."""
    model, user, step = captured(name)
    lines = annotations([("shard", "inputs[0]", (None, "sp"))])
    spmd = lay_out(step, Mesh({"sp": 2}), lines, whole_results=False, ring=("sp",) if ring else ())
    same_as_one_device(spmd, model, user)
    assert spmd.backward is not None
    found, back = counts(spmd.forward), counts(spmd.backward)
    # keys and values go round, their gradients one place further; else they are gathered, and the gradients scattered
    assert (found["collective_permute sp"], back["collective_permute sp"]) == ((2, 6) if ring else (0, 0))
    if name in ("llama", "gpt2"):  # Mixtral's experts read all tokens
        assert all(c.bytes <= 256 for c in spmd.forward.collectives() if c.kind == "all_gather")  # positions
    for program in spmd.programs():
        assert verify_program(program).proved


@pytest.mark.parametrize("tokens", [False, True])
def test_expert_parallel(tokens: bool) -> None:
    """Each rank has half of the experts; tokens that are split too are gathered for them, and their sums scattered."""
    model, user, step = captured("mixtral")
    experts = [n for n, p in model.named_parameters() if p.dim() == 3]
    lines: list[tuple[Any, ...]] = [("shard", n, ("ep", None, None)) for n in experts]
    spmd = lay_out(step, Mesh({"ep": 2}), annotations(lines + [("shard", "inputs[0]", ("ep", None))] * tokens))
    same_as_one_device(spmd, model, user)
    sent = Counter(
        {(c.kind, c.bytes): 1 for c in spmd.forward.collectives() if "32,64" in c.tensor or "4,8,64" in c.tensor}
    )
    share = 32 * 64 * 4 // 2
    assert sent == (
        {("all_gather", share): 1, ("reduce_scatter", share): 1} if tokens else {("all_reduce", 2 * share): 1}
    )
    for program in spmd.programs():
        assert verify_program(program).proved


def test_a_split_vocabulary() -> None:
    """The embedding reads a masked piece of its table, the logits leave whole."""
    lines = [("shard", "embed_tokens.weight", ("tp", None)), ("shard", "lm_head.weight", ("tp", None))]
    spmd = laid("llama", {"tp": 4}, lines)
    assert counts(spmd.forward) == {"all_reduce tp": 1, "all_gather tp": 1}


def test_a_length_that_does_not_divide_is_refused() -> None:
    """ViT has 17 tokens: both numbers, the user's line and the tensor are named."""
    _, _, step = captured("vit")
    lines = annotations([("output", "layers.*", (None, "tp", None))])
    with pytest.raises(TesselError, match=r"test_partition_models.*|ranks\.py.*size 17 does not divide by 2 \(tp=2\)"):
        lay_out(step, Mesh({"tp": 2}), lines)
