"""One step of training: a batch, its losses, the gradient, the weights, their moving average."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pi0.errors import ConfigError, Pi0Error
from pi0.model import Pi0
from pi0.model.precision import Float32
from pi0.train.loss import AuxiliaryHead, PointingHead, TrainingModel
from pi0.train.optimizer import MovingAverage, OptimizerOptions, make_optimizer
from pi0.train.processes import Processes
from pi0.train.samples import Samples
from pi0.train.shard import gather, like, scatter_optimizer, shard


@dataclass(frozen=True)
class TrainerOptions:
    """How a step is computed.

    Attributes:
        micro_batch: samples that one process computes at once; None: its whole share.
        bfloat16: matrix products in bfloat16 (autocast); weights stay float32.
        recompute: gradient checkpointing in the prefix.
        compile: torch.compile.
        shard: cut weights, gradients and optimizer among processes (FSDP) instead of copying them
            (DDP).
    """

    micro_batch: int | None = None
    bfloat16: bool = False
    recompute: bool = False
    compile: bool = False
    shard: bool = False


class Trainer:
    """A model in training.

    Attributes:
        done: steps taken.
        parameters: what is trained, by name; names of the model begin with "model.".
        average: their moving average; None: there is none.
    """

    def __init__(
        self,
        model: Pi0,
        samples: Samples,
        heads: Sequence[AuxiliaryHead | PointingHead],
        optimizer_options: OptimizerOptions,
        options: TrainerOptions,
        processes: Processes,
    ) -> None:
        self.samples, self.options, self.processes = samples, options, processes
        self.optimizer_options = optimizer_options
        self.share = processes.share(samples.options.batch_size)
        if options.bfloat16:
            keep_float32(model, processes.device.type)
        action_dim = samples.pipeline.action_dim
        module = TrainingModel(model, action_dim, heads, options.recompute)
        self.module = module.to(processes.device)
        if options.shard:
            shard(module, processes)
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(module, optimizer_options)
        trained = list(self.parameters.values())
        ema = optimizer_options.ema
        self.average = MovingAverage(trained, ema) if ema > 0 else None
        self.done = 0
        self._forward: nn.Module = module
        if processes.count > 1 and not options.shard:
            self._forward = DistributedDataParallel(module)
        if options.compile:
            self._forward = torch.compile(self._forward)  # type: ignore[assignment]

    def step(self) -> dict[str, float]:
        """Takes a step; returns its losses, "learning_rate" and "gradient_norm".

        Raises:
            Pi0Error: a loss or the gradient is not finite; the weights are as before.
        """
        options = self.optimizer_options
        batch = self.samples.batch(self.done, self.share, self.processes.device)
        size = self.options.micro_batch or len(batch)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(batch), size):
            part = batch.part(slice(start, start + size))
            weight = len(part) / len(batch)
            with self._synchronised(last=start + size >= len(batch)):
                with autocast(self.processes.device.type, self.options.bfloat16):
                    losses = self._forward(part)
                (losses["total"] * weight).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * weight
        trained = list(self.parameters.values())
        norm = gather(nn.utils.clip_grad_norm_(trained, options.clip))
        values = self.processes.mean(torch.stack([*sums.values(), norm])).tolist()
        metrics = dict(zip([*sums, "gradient_norm"], values, strict=True))
        self._require_finite(metrics)
        rate = options.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update(trained, self.done)
        self.done += 1
        return {**metrics, "learning_rate": rate}

    def exported(self) -> dict[str, Tensor]:
        """The weights of the model to be written, by our names, averaged where there is an
        average; every process calls it."""
        values = {f"model.{n}": p.detach() for n, p in self.module.model.named_parameters()}
        if self.average:
            values |= dict(zip(self.parameters, self.average.values, strict=True))
        return {
            name.removeprefix("model."): gather(value)
            for name, value in values.items()
            if name.startswith("model.")
        }

    def state(self) -> dict[str, Any]:
        """All that a step changes; every process calls it."""
        state = {
            "done": self.done,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average.values if self.average else None,
            "optimizer": self.optimizer.state_dict(),
        }
        return dict(gather(state))

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from another trainer's `state`.

        Raises:
            Pi0Error: it is of other weights.
        """
        shapes, saved = (
            {name: tuple(value.shape) for name, value in values.items()}
            for values in (self.parameters, state["parameters"])
        )
        for name in {**shapes, **saved}:
            if shapes.get(name) != saved.get(name):
                raise Pi0Error(
                    f"--resume: {name}: expected {saved.get(name, 'nothing')}, which the run has "
                    f"saved, found {shapes.get(name, 'nothing')}. Go on with the release of pi0 "
                    "that the run began with."
                )
        self.done = state["done"]
        for name, parameter in self.parameters.items():
            parameter.copy_(like(state["parameters"][name], parameter))
        if self.average:
            for value, saved in zip(self.average.values, state["average"], strict=True):
                value.copy_(like(saved, value))
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(scatter_optimizer(state["optimizer"], order))

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients of several processes are averaged once a step, with the last part."""
        if self.options.shard:
            cast(FSDPModule, self.module).set_requires_gradient_sync(last)
        if isinstance(self._forward, DistributedDataParallel) and not last:
            return self._forward.no_sync()
        return contextlib.nullcontext()

    def _require_finite(self, metrics: dict[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            self.optimizer.zero_grad()
            raise Pi0Error(
                f"step {self.done}: {bad[0]}: expected a finite number, found {metrics[bad[0]]}. "
                "The weights before this step are kept. Lower --learning-rate or --clip, or look "
                "for outliers in the data."
            )


def autocast(device: str, bfloat16: bool) -> contextlib.AbstractContextManager[None]:
    """Matrix products in bfloat16, or as they are."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16)


def keep_float32(model: Pi0, device: str) -> None:
    """Keeps autocast out of the modules that compute in float32 by `model/precision.py`."""
    for module in model.modules():
        if isinstance(module, Float32):
            module.forward = torch.autocast(device, enabled=False)(module.forward)


def freeze(model: Pi0, patterns: Sequence[str], read_blocks: Sequence[int]) -> int:
    """Takes parameters out of training: those that a pattern names, and those that no loss reads.

    The output of the VLM's last block is read by auxiliary heads alone; the actions see its keys
    and values.

    Args:
        patterns: as in shells, over our names: "vision_tower.*", "*.norm1.weight".
        read_blocks: blocks of the VLM whose output is read.

    Returns:
        How many values are trained.

    Raises:
        ConfigError: a pattern that fits nothing, or nothing is left.
    """
    names = dict(model.named_parameters())
    last = model.config.vlm.depth - 1
    ends = ["vlm.norm."]
    if last not in read_blocks:
        parts = ("q_proj", "o_proj", "norm2", "gate_proj", "up_proj", "down_proj")
        ends += [f"vlm.blocks.{last}.{part}." for part in parts]
    unread = {name for name in names if name.startswith(tuple(ends))}
    for pattern in patterns:
        found = set(fnmatch.filter(names, pattern))
        if not found:
            raise ConfigError(
                f"--freeze {pattern}: expected a pattern of parameters such as vision_tower.*, "
                "found none that fits."
            )
        unread |= found
    for name in unread:
        names[name].requires_grad_(False)
    trained = sum(p.numel() for p in names.values() if p.requires_grad)
    if not trained:
        raise ConfigError("--freeze: expected something left to train, found nothing.")
    return trained
