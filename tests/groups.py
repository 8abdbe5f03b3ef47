"""Groups of processes on one machine, for the tests."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist


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
