"""What processes of one test share: their start, a port, an environment, graphs that one of them traced."""

from __future__ import annotations

import copyreg
import multiprocessing
import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tessel.ir.node import INPUT, Op
from tessel.ops import OPS

_DEEP = 50_000  # a graph is pickled from its results back, a node inside the other
_IMPORTED = ["torch._dynamo", "torch.distributed", "tessel.sharding.staged", "transformers.models.llama.modeling_llama"]


def start(process: Callable[..., None], world: int, *args: Any, join: bool = True) -> Any:
    """Run ``process(rank, world, *args)`` in ``world`` processes, which begin where imports are done.

    They are forked from a process that has done nothing else, and importing takes longer than most of what is tested.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    return mp.start_processes(process, (world, *args), nprocs=world, join=join, start_method="forkserver")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(rank: int, world: int, port: int, folder: str) -> None:
    """Join a group over gloo; kernels are kept in ``folder``."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TESSEL_CACHE_DIR=folder)
    dist.init_process_group("gloo", rank=rank, world_size=world)


def write_graphs(what: Any, path: Path) -> None:
    """Write anything that holds graphs, for ``read_graphs`` of another process."""
    sys.setrecursionlimit(_DEEP)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with beside.open("wb") as f:
        pickler = pickle.Pickler(f)
        pickler.dispatch_table = copyreg.dispatch_table.copy()
        pickler.dispatch_table[MappingProxyType] = lambda m: (_proxy, (dict(m),))
        pickler.dispatch_table[Op] = lambda op: (_op, (op.name,))
        pickler.dump(what)
    beside.replace(path)


def read_graphs(path: Path) -> Any:
    """What this test wrote."""
    return pickle.loads(path.read_bytes())


def _proxy(of: dict[str, Any]) -> Any:
    return MappingProxyType(of)


def _op(name: str) -> Op:
    return INPUT if name == INPUT.name else OPS[name]
