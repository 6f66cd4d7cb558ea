"""The memory that training needs, by arithmetic: nothing of it is allocated.

Weights, gradients and the optimizer's two moments are counted. What a forward and backward pass
holds beside them at its peak is measured on tensors without data (PyTorch's fake tensors), which
go through the same operations as real ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pi0.checkpoint.load import empty_model
from pi0.config import Pi0Config
from pi0.inputs import ModelInputs
from pi0.model import Pi0
from pi0.train.loss import Batch, TrainingModel
from pi0.train.trainer import TrainerOptions, autocast, keep_float32

FLOAT32 = 4  # bytes of a weight, of its gradient, of each moment and of the moving average


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process needs.

    Attributes:
        weights: float32, frozen ones, too.
        gradients, optimizer, average: of what is trained.
        passes: what forward and backward hold besides, at their peak, for one micro-batch.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    passes: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.passes


def estimate(
    config: Pi0Config,
    prepare: Callable[[Pi0], None],
    options: TrainerOptions,
    batch: int,
    cameras: int,
    tokens: int,
    draws: int,
    ema: bool,
) -> TrainingMemory:
    """What a run needs on one device.

    Args:
        prepare: freezes parameters of a model, or adds an adapter to it.
        batch: samples that are computed at once.
        tokens: of the longest prompt.
    """
    model = empty_model(config, torch.float32).requires_grad_(True)
    prepare(model)
    with FakeTensorMode():
        _make_fake(model)
        if options.bfloat16:
            keep_float32(model, "cpu")
        module = TrainingModel(model, config.action_dim, recompute=options.recompute)
        inputs = _inputs(config, batch, cameras, tokens, draws)
        learning = [p for p in model.parameters() if p.requires_grad]
        trained = sum(p.numel() for p in learning) * FLOAT32
        for parameter in learning:  # there already, as in all parts of a batch but the first
            parameter.grad = torch.zeros_like(parameter)
        with _LiveBytes() as live:
            with autocast("cpu", options.bfloat16):
                loss = module(inputs)["total"]
            loss.backward()
    return TrainingMemory(
        weights=sum(p.numel() for p in model.parameters()) * FLOAT32,
        gradients=trained,
        optimizer=2 * trained,
        average=trained if ema else 0,
        passes=live.peak,
    )


def _make_fake(model: nn.Module) -> None:
    """Gives a model on the meta device, which has no autocast, fake parameters of the CPU."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
            setattr(module, name, fake)


def _inputs(config: Pi0Config, batch: int, cameras: int, tokens: int, draws: int) -> Batch:
    size = config.vision.image_size
    return Batch(
        ModelInputs(
            images=torch.zeros(batch, cameras, 3, size, size),
            image_mask=torch.ones(batch, cameras, dtype=torch.bool),
            tokens=torch.zeros(batch, tokens, dtype=torch.int64),
            token_mask=torch.ones(batch, tokens, dtype=torch.bool),
            state=torch.zeros(batch, config.state_dim),
        ),
        actions=torch.zeros(batch, config.horizon, config.action_dim),
        noise=torch.zeros(batch, draws, config.horizon, config.action_dim),
        time=torch.zeros(batch, draws),
        columns={},
    )


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # What an operation gets was made before, or belongs to the model.
        given: set[int] = set()
        tree_map_only(Tensor, lambda t: given.add(t.untyped_storage()._cdata), (args, kwargs))
        tree_map_only(Tensor, lambda t: self._add(t, given), out)
        return out

    def _add(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
