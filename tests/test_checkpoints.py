"""Shards that are never whole on a rank, checkpoints that change plans, and failures that stop every rank."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from groups import environment, free_port, start
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tessel
from tessel.errors import TesselError
from tessel.frontend.joint import capture_step
from tessel.ir.sharding import Sharding
from tessel.runtime.shares import share
from tessel.sharding import materialize
from tessel.sharding.distributed import Distributed, distribute
from tessel.sharding.materialize import Files, drawn, region
from tessel.sharding.spmd import lay_out

WIDTH = 32


class Net(nn.Module):
    """Two products and a norm, with a table whose padding row is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH, padding_idx=3)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))  # type: ignore[no-any-return]


def init(model: nn.Module) -> None:
    """As torch does, but for one weight that takes a chain of operators."""
    for m in model.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    with torch.no_grad():
        model.get_parameter("down.weight").uniform_(-0.9, 0.9).erfinv_().mul_(0.02).clamp_(-0.03, 0.03)


def empty() -> Net:
    with torch.device("meta"):
        return Net()


MESH = tessel.Mesh({"dp": 2, "tp": 2})
IDS = torch.arange(32).reshape(4, 8)
DATA = [("inputs[0]", ("dp", None), {})]
KEPT = [(n, ("dp", None), {"gather": ["dp"]}) for n in ("up.weight", "down.weight", "embed.weight")]
TENSOR = [("up.weight", ("tp", None), {}), ("up.bias", ("tp",), {}), ("down.weight", (None, "tp"), {})]


def annotated(lines: list[Any]) -> tessel.Annotations:
    a = tessel.Annotations()
    for name, dims, options in lines:
        a.shard(name, dims, **options)
    return a


def placed(mesh: dict[str, int], lines: list[Any], **options: Any) -> Distributed:
    return distribute(
        empty(), mesh=tessel.Mesh(mesh), args=(IDS.to("meta"),), annotations=annotated(lines), train=True,
        run="interpreted", **options,
    )  # fmt: skip


class Largest(TorchDispatchMode):
    """The most elements that any tensor has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("slab", [1 << 20, 256])
def test_shards_are_drawn_as_one_device_draws(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialize, "SLAB", slab)
    torch.manual_seed(5)
    whole = Net()
    torch.manual_seed(6)
    init(whole)
    model, mesh = empty(), tessel.Mesh({"dp": 2, "tp": 2})
    lies = {"up.weight": "{tp,dp}", "embed.weight": "{dp.tp,·}", "down.weight": "{·,tp}", "up.bias": "{dp}"}
    shardings = {n: Sharding.parse(s) for n, s in lies.items()}
    recorded = drawn(model, init, [n for n, _ in model.named_parameters()])
    for rank in range(4):
        torch.manual_seed(6)
        with Largest() as largest:
            parts = recorded.shards(shardings, mesh, rank)
        assert largest.numel <= max(slab, 4 * WIDTH * WIDTH // 2)
        for name, p in whole.named_parameters():
            want = share(p.detach(), shardings.get(name, Sharding.replicated(p.dim())), mesh, rank)
            assert torch.equal(parts[name], want), name


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m: None, "init writes nothing to embed.weight"),
        (lambda m: nn.init.orthogonal_(m.up.weight), "on a tensor of its own"),
        # Torch 2.11 draws it in place: then it is the others that are missing.
        (lambda m: nn.init.trunc_normal_(m.up.weight), "tensor of its own|cannot be done by shards|to embed.weight"),
        (lambda m: m.up.weight[:, 0].zero_(), "a part of it that is no row"),
    ],
)
def test_what_cannot_be_drawn_by_shards_is_refused(act: Callable[[Any], Any], words: str) -> None:
    model = empty()
    with pytest.raises(TesselError, match=words):
        drawn(model, act, [n for n, _ in model.named_parameters()])


# ---------------------------------------------------------------- processes


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()


def checkpoint(rank: int, folder: str) -> None:
    """Trained and saved under dp=4 with ZeRO-3, loaded under tp=2 x dp=2: identical, and goes on as one device."""
    torch.manual_seed(0)
    single = Net()
    torch.manual_seed(0)
    init(single)
    torch.manual_seed(0)
    first = placed({"dp": 4}, DATA + KEPT, init=init)
    # a small eps makes whole steps of gradients that are rounding noise
    both = [(m, torch.optim.AdamW(m.parameters(), lr=0.01, eps=1e-3)) for m in (single, first)]
    for m, optimizer in both:
        steps(m, optimizer, 2)
    state = {"model": first.state_dict(), "optimizer": first.optimizer_state_dict(both[1][1])}
    up = state["model"]["up.weight"]
    assert tuple(up.shape) == (4 * WIDTH, WIDTH) and tuple(up.to_local().shape) == (WIDTH, WIDTH)
    dcp.save(state, checkpoint_id=folder)

    zeros = {n: torch.zeros(p.shape) for n, p in single.named_parameters()}
    second = placed({"dp": 2, "tp": 2}, DATA + TENSOR, weights=zeros)
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.5)
    loaded = {"model": second.state_dict(), "optimizer": second.optimizer_state_dict(optimizer)}
    dcp.load(loaded, checkpoint_id=folder)
    second.load_state_dict(loaded["model"])
    second.load_optimizer_state_dict(optimizer, loaded["optimizer"])
    for name, x in loaded["model"].items():
        assert torch.equal(x.full_tensor(), state["model"][name].full_tensor()), name
    for name, values in loaded["optimizer"]["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            want = state["optimizer"]["state"][name][key].full_tensor()
            assert torch.equal(values[key].full_tensor(), want), (name, key)
    assert optimizer.param_groups[0]["lr"] == 0.01
    steps(single, both[0][1], 1)
    steps(second, optimizer, 1)
    for name, p in single.named_parameters():
        got = second.state_dict()[name].full_tensor()
        torch.testing.assert_close(got, p.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # a whole state, and one of another layout, are taken too
    second.load_state_dict(first.state_dict())
    second.load_state_dict(single.state_dict())
    with pytest.raises(TesselError, match="missing up.weight; unknown nothing"):
        second.load_state_dict({n: x for n, x in single.state_dict().items() if n != "up.weight"})


def files(rank: int, folder: str) -> None:
    """Slices of a safetensors file; a shape that differs is refused."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    whole = Net()
    path = Path(folder) / "model.safetensors"
    if rank == 0:
        save_file(whole.state_dict(), path)
    dist.barrier()
    got = placed({"dp": 2, "tp": 2}, DATA + TENSOR, weights=folder)
    part = Files(folder).part(
        "up.weight", whole.up.weight, region((4 * WIDTH, WIDTH), Sharding.parse("{tp,dp}"), MESH, rank)
    )
    assert part.untyped_storage().nbytes() == 4 * WIDTH * WIDTH
    for name, p in whole.named_parameters():
        assert torch.equal(got.state_dict()[name].full_tensor(), p.detach())
    with pytest.raises(TesselError, match="on the meta device, and no weights hold them"):
        placed({"dp": 4}, DATA)


def wrong(rank: int, folder: str) -> None:
    """A rank whose program is another, and one that calls another collective than its program has."""
    torch.manual_seed(0)
    module = Net()
    captured = capture_step(module, (IDS,), train=True)
    lines = DATA + (KEPT if rank == 1 else [])
    with pytest.raises(TesselError, match=r"collective 0 of the step is .* on rank 0 and .* on rank 1"):
        distribute(module, lay_out(captured, tessel.Mesh({"dp": 4}), annotated(lines)), run="interpreted")
    dist.barrier()
    mesh = tessel.Mesh({"dp": 2, "tp": 2})
    got = distribute(module, lay_out(captured, mesh, annotated(DATA + TENSOR)), run="interpreted")
    if rank == 1:
        run = got.by.run
        got.by.run = lambda name, x, attrs: run("all_gather", x, {**attrs, "dim": 0})  # type: ignore[method-assign]
    words = "rank 1 calls all_gather over .* where its program has all_reduce over .*collective 0 of the forward, at "
    start = time.monotonic()
    with pytest.raises(TesselError, match=words) as e:
        got(IDS)
    assert "test_checkpoints.py:" in str(e.value) and time.monotonic() - start < 30
    if rank != 1:
        assert "another rank stopped: rank 1" in str(e.value)


def dying(rank: int, folder: str) -> None:
    """One rank is killed between forward and backward; the others say so, and where they were."""
    torch.manual_seed(0)
    module = Net()
    lines = annotated(DATA + TENSOR)
    got = distribute(module, mesh=tessel.Mesh({"dp": 2, "tp": 2}), args=(IDS,), annotations=lines, run="interpreted")
    loss = got(IDS).square().mean()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(TesselError, match=r"all_reduce over .* \(collective \d+ of the backward, at .*failed: ") as e:
        loss.backward()
    assert "is gone" in str(e.value) or "another rank stopped" in str(e.value)
    assert "test_checkpoints.py:" in str(e.value) and time.monotonic() - start < 30
    Path(folder, f"told {rank}").write_text(str(e.value))
    os._exit(0)  # an orderly end would wait for the rank that is gone


def process(rank: int, world: int, port: int, folder: str, whats: tuple[Callable[[int, str], None], ...]) -> None:
    environment(rank, world, port, folder)
    for i, what in enumerate(whats):
        own = Path(folder, str(i))
        own.mkdir(exist_ok=True)
        what(rank, str(own))
    Path(folder, f"done {rank}").touch()
    while rank == 0 and len(list(Path(folder).glob("done *"))) < world:  # they read in its store why all stopped
        time.sleep(0.05)
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_processes_save_load_and_stop_together() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        start(process, 4, free_port(), folder, (checkpoint, files, wrong))


@pytest.mark.slow
def test_a_rank_that_dies_stops_all() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
            context = start(process, 4, free_port(), folder, (dying,), join=False)
            while not context.join(timeout=120, grace_period=60):
                pass
        told = sorted(p.name for p in Path(folder, "0").iterdir())
        assert told == ["told 0", "told 1", "told 3"]
