"""Shards as DTensors: what ``torch.distributed.checkpoint`` saves under one plan and loads under another.

dcp.save({"model": dist.state_dict(), "optimizer": dist.optimizer_state_dict(optimizer)}, checkpoint_id=folder)
state = {"model": other.state_dict(), "optimizer": other.optimizer_state_dict(its_optimizer)}
dcp.load(state, checkpoint_id=folder)                                 # parameters are loaded in place
other.load_optimizer_state_dict(its_optimizer, state["optimizer"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import TesselError, check
from ..ir.sharding import Sharding
from ..runtime.shares import share
from ..targets.mesh import Mesh

__all__ = ["DTensors"]


class DTensors:
    """Turns this rank's shards into DTensors and back.

    Args:
        mesh: of the plan; every rank of the world is on it.
        rank: this one.
        device: the kind of device that the shards are on.
    """

    def __init__(self, mesh: Mesh, rank: int, device: str) -> None:
        self.mesh, self.rank, self.device = mesh, rank, device
        self._meshes: dict[tuple[str, ...], DeviceMesh] = {}

    def device_mesh(self, order: Sequence[str]) -> DeviceMesh:
        """The devices with the mesh's axes in an order. Every rank has to ask for the same ones in one order."""
        key = tuple(order)
        if key not in self._meshes:
            names = list(self.mesh)
            ranks = torch.arange(self.mesh.devices).reshape([self.mesh[a] for a in names])
            self._meshes[key] = DeviceMesh(
                self.device, ranks.permute([names.index(a) for a in key]), mesh_dim_names=key
            )
        return self._meshes[key]

    def of(self, part: torch.Tensor, sharding: Sharding, shape: Sequence[int]) -> DTensor:
        """A shard as a DTensor of ``shape``; it shares the shard's memory."""
        # a DTensor splits a dimension by the axes in the order of its mesh: one in which each dimension's are in order
        order = [*sharding.axes, *(a for a in self.mesh if a not in sharding.axes)]
        if all(tuple(a for a in self.mesh if a in axes) == axes for axes in sharding.dims):
            order = list(self.mesh)
        dims = [sharding.dim_of(a) for a in order]
        placements = [Replicate() if d is None else Shard(d) for d in dims]
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(
            part.detach(), self.device_mesh(order), placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def into(self, part: torch.Tensor, value: Any, sharding: Sharding, name: str, shape: Sequence[int]) -> None:
        """Write a value (a DTensor of any layout, or the whole tensor) into a shard.

        Raises:
            TesselError: it has another shape.
        """
        check(isinstance(value, torch.Tensor), lambda: f"{name}: expected a tensor, got {type(value).__name__}")
        if tuple(value.shape) != tuple(shape):
            raise TesselError(f"{name}: {list(value.shape)} in the state, {list(shape)} in the model")
        with torch.no_grad():
            if isinstance(value, DTensor):
                like = self.of(part, sharding, shape)
                if value.device_mesh != like.device_mesh or tuple(value.placements) != tuple(like.placements):
                    part.copy_(share(value.full_tensor(), sharding, self.mesh, self.rank))
                elif value.to_local().data_ptr() != part.data_ptr():
                    part.copy_(value.to_local())
            else:
                part.copy_(share(value, sharding, self.mesh, self.rank))

    # ------------------------------------------------------------ optimizers

    def optimizer_state(
        self, optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor], shardings: Mapping[str, Sharding],
        shapes: Mapping[str, Sequence[int]],
    ) -> dict[str, Any]:  # fmt: skip
        """The state of an optimizer over shards: by parameter's name, what has its shape as DTensors.

        An optimizer that has not stepped yet gets its state first, without a change of any parameter.
        """
        names = {id(p): n for n, p in named.items()}
        _make_state(optimizer)
        state: dict[str, Any] = {}
        for p, values in optimizer.state.items():
            name = names.get(id(p))
            if name is None:
                raise TesselError(
                    "the optimizer has a parameter that is none of this model's: build it from .parameters()"
                )
            sharding = shardings.get(name, Sharding.replicated(p.dim()))
            state[name] = {
                k: self.of(v, sharding, shapes[name]) if isinstance(v, torch.Tensor) and v.shape == p.shape else v
                for k, v in values.items()
            }
        groups = [
            {**{k: v for k, v in g.items() if k != "params"}, "params": [names[id(p)] for p in g["params"]]}
            for g in optimizer.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, given: Mapping[str, Any], named: Mapping[str, torch.Tensor],
        shardings: Mapping[str, Sharding], shapes: Mapping[str, Sequence[int]],
    ) -> None:  # fmt: skip
        """Write a state back.

        Raises:
            TesselError: a parameter is missing in the state, or a value has another shape.
        """
        own = self.optimizer_state(optimizer, named, shardings, shapes)
        for name, values in own["state"].items():
            check(name in given["state"], lambda n=name: f"the state holds nothing of {n}")  # type: ignore[misc]
            p = named[name]
            for key, value in values.items():
                new = given["state"][name][key]
                if isinstance(value, DTensor):
                    sharding = shardings.get(name, Sharding.replicated(p.dim()))
                    self.into(optimizer.state[p][key], new, sharding, f"{name} ({key})", shapes[name])
                elif isinstance(value, torch.Tensor):
                    optimizer.state[p][key].copy_(new)
                else:
                    optimizer.state[p][key] = new
        for group, new in zip(optimizer.param_groups, given["param_groups"], strict=True):
            group.update({k: v for k, v in new.items() if k != "params"})


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make its state: a step with a rate of zero and gradients of zero."""
    if optimizer.state:
        return
    kept = [(g, g["lr"], [(p, p.grad) for p in g["params"]]) for g in optimizer.param_groups]
    for group, rate, params in kept:
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, torch.Tensor) else 0.0
        for p, _ in params:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, rate, params in kept:
        group["lr"] = rate
        for p, grad in params:
            p.grad = grad
            for key, value in optimizer.state[p].items():  # the step that was taken did not count
                if isinstance(value, torch.Tensor):
                    value.zero_()
                elif key == "step":
                    optimizer.state[p][key] = 0
