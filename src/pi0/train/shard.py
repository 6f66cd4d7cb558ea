"""Weights, gradients and optimizer cut into equal parts, one for each process (FSDP2).

A block's weights are put together for the time of its computation. Blocks of Gemma are not called
as modules but by their two halves, and linear layers of adaptive norms from outside their block:
each is told to FSDP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from pi0.errors import ConfigError
from pi0.train.loss import TrainingModel
from pi0.train.processes import Processes


def shard(module: TrainingModel, processes: Processes) -> None:
    """Cuts the weights of a model, in place; its parameters are other objects afterwards.

    Raises:
        ConfigError: there is one process.
    """
    if processes.count == 1:
        raise ConfigError(
            "--shard: expected several processes, found one. Start them with torchrun, or leave "
            "out --shard."
        )
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    model = module.model
    for block in model.vision_tower.blocks:
        fully_shard(block, mesh=mesh)
    for trunk in (model.vlm, model.expert):
        for block in trunk.blocks:
            for name, inner in block.named_modules():
                if name.endswith(".dense"):
                    fully_shard(inner, mesh=mesh)
            fully_shard(block, mesh=mesh)
            for half in ("qkv", "post_attention"):
                register_fsdp_forward_method(block, half)
    fully_shard(module, mesh=mesh)


def gather(value: Any) -> Any:
    """Plain data with every tensor whole; every process has to call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {name: gather(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [gather(inner) for inner in value]
    return value


def like(whole: Tensor, part: Tensor) -> Tensor:
    """A whole tensor as this process's part of it, if `part` is one; else itself."""
    if not isinstance(part, DTensor):
        return whole
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)


def scatter_optimizer(state: Mapping[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimizer's state, as `gather` made it, for parameters that are cut.

    Args:
        parameters: in the optimizer's order.
    """
    cut = {
        index: {
            name: like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": cut}
