"""Pipeline schedules of torch.distributed.pipelining, behind one call.

Supported: torch 2.11 to 2.15. One name that is not public is used, and only by 2.11. What a stage sends is counted
where it is handed to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import pipelining

__all__ = ["Message", "run_schedule", "stage_class"]

_SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb1p": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
_ONE = ("gpipe", "1f1b")  # schedules of a single part a stage

Step = Callable[[Any, list[torch.Tensor]], Any]


@dataclass
class Message:
    """What a rank has handed to other stages: messages and bytes."""

    calls: int = 0
    bytes: int = 0


def stage_class(sent: Message) -> type[pipelining.PipelineStage]:
    """A ``PipelineStage`` that counts what it sends, and tells its module which microbatch is next as ``at``."""

    class Stage(pipelining.PipelineStage):
        """A part runs its own backward; what of it is left for later it gives as ``gradients_left``."""

        def __init__(self, submodule: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(submodule, *args, **{**kwargs, "dw_builder": submodule.gradients_left})

        def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
            self.submod.at = fwd_chunk_id  # type: ignore[assignment]
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

        def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
            return _counted(super().get_fwd_send_ops(fwd_chunk_id))

        def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
            return _counted(super().get_bwd_send_ops(bwd_chunk_id))

        def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
            # torch 2.11 lets neighbours greet each other first; of gloo, a rank cannot ask for itself
            return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _counted(ops: list[dist.P2POp]) -> list[dist.P2POp]:
        for op in ops:
            sent.calls += 1
            sent.bytes += op.tensor.numel() * op.tensor.element_size()
        return ops

    return Stage


def run_schedule(name: str, stages: Sequence[Any], microbatches: int, loss: Callable[..., torch.Tensor] | None) -> Step:
    """What runs a step: ``step(target, list for losses)``.

    It gives the last part's results, put together along the first dimension, and None on ranks without it. Without a
    loss it runs forward only.
    """
    own = stages[0] if name in _ONE else list(stages)
    schedule = getattr(pipelining, _SCHEDULES[name])(own, microbatches, loss_fn=loss)
    last = any(s.is_last for s in stages)

    def step(target: Any, losses: list[torch.Tensor]) -> Any:
        if loss is None:
            with torch.no_grad():
                return schedule.step()
        return schedule.step(target=target if last else None, losses=losses if last else None)

    return step
