"""What training minimises: the flow matching loss of π0, and auxiliary losses beside it.

    time t ~ Beta(1.5, 1) · 0.999 + 0.001, noise ~ N(0, 1)
    x_t = t · noise + (1 − t) · actions          target: noise − actions

The prefix does not depend on noise and time. It runs once, and K draws of both share its keys and
values: K losses for one pass through the VLM.

Dimensions that only pad an action to the model's width are zeros in the data, but the sampler
starts them from noise and integrates what the model predicts for them. They are trained like the
others, as in openpi, and left out of the loss that is reported.

Source: openpi `pi0.py` (`compute_loss`); arXiv 2410.24164.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pi0.config import GemmaConfig, Pi0Config
from pi0.inputs import ModelInputs
from pi0.model import Pi0, PrefixCache
from pi0.train.recompute import prefill, recompute_vision

TIME_EXPONENT = 1.5  # the first parameter of the Beta distribution; the second is 1
TIME_SCALE, TIME_OFFSET = 0.999, 0.001


@dataclass(frozen=True)
class Batch:
    """One batch of training samples, K draws of noise and time for each.

    Attributes:
        actions: [B, H, action_dim of the model] float32, normalised and zero-padded.
        noise: [B, K, H, action_dim of the model] float32.
        time: [B, K] float32.
        columns: what auxiliary heads predict, by column: [B, D] float32, normalised but for points.
    """

    inputs: ModelInputs
    actions: Tensor
    noise: Tensor
    time: Tensor
    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.actions)

    def part(self, rows: slice) -> Batch:
        """Some samples of the batch."""
        return Batch(
            ModelInputs(**{name: value[rows] for name, value in vars(self.inputs).items()}),
            self.actions[rows],
            self.noise[rows],
            self.time[rows],
            {name: values[rows] for name, values in self.columns.items()},
        )


def time_of_uniform(uniform: Tensor) -> Tensor:
    """Times from uniform numbers in [0, 1), by the inverse of the distribution u = x^1.5."""
    return uniform ** (1 / TIME_EXPONENT) * TIME_SCALE + TIME_OFFSET


def repeat_cache(cache: PrefixCache, draws: int) -> PrefixCache:
    """The cache of a batch with every row `draws` times: rows [B·K], those of a sample together."""
    layers = [
        (k.repeat_interleave(draws, dim=0), v.repeat_interleave(draws, dim=0))
        for k, v in cache.layers
    ]
    return PrefixCache(
        layers,
        cache.valid.repeat_interleave(draws, dim=0),
        cache.state.repeat_interleave(draws, dim=0),
    )


def squared_errors(model: Pi0, cache: PrefixCache, batch: Batch) -> Tensor:
    """Squared errors of the velocity: [B, K, H, action_dim of the model]."""
    t = batch.time[..., None, None]
    actions = batch.actions[:, None]
    x_t = t * batch.noise + (1 - t) * actions
    draws = batch.time.shape[1]
    shared = repeat_cache(cache, draws) if draws > 1 else cache
    velocity = model.velocity(x_t.flatten(0, 1), batch.time.flatten(), shared)
    return (velocity.view_as(batch.noise) - (batch.noise - actions)).square()


class AuxiliaryHead(nn.Module):
    """Predicts a column of the dataset from the text tokens' output of one block of the VLM.

    It ties words to what they stand for; training-only, in no checkpoint.

    Attributes:
        column: of the dataset.
        block: whose output is read.
        weight: of its loss.
    """

    def __init__(
        self, column: str, width: int, block: int, weight: float, config: GemmaConfig
    ) -> None:
        super().__init__()
        self.column, self.block, self.weight = column, block, weight
        self.linear = nn.Linear(config.width, width)
        nn.init.zeros_(self.linear.weight)  # not drawn, for what is random follows from the seed
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """hidden [B, X, E], valid [B, L] bool of the text → [B, width] float32."""
        out: Tensor = self.linear(text_mean(hidden, valid))
        return out.float()

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The mean square error; hidden as `forward`'s."""
        return F.mse_loss(self(hidden, batch.inputs.token_mask), batch.columns[self.column])


class PointingHead(nn.Module):
    """Says which patch of the first camera's picture holds a point, or each of several.

    Queries come from the text tokens' output of one block of the VLM, keys from the patches' of the
    same block. It teaches the model to find what words name, which a mean square error on
    positions does not in a model that starts from random weights (docs/log.md). Training-only.

    Attributes:
        column: of the dataset, points as (u, v) in [0, 1] from the top left; others are left out.
        block, weight: as an `AuxiliaryHead`'s.
    """

    def __init__(
        self, column: str, points: int, block: int, weight: float, config: Pi0Config
    ) -> None:
        super().__init__()
        self.column, self.block, self.weight = column, block, weight
        self.points, self.grid = points, config.vision.grid
        width = config.vlm.width
        self.query = nn.Linear(width, points * width)
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """hidden [B, X, E], valid [B, L] bool of the text → logits [B, points, P] float32."""
        query = self.query(text_mean(hidden, valid)).float().unflatten(1, (self.points, -1))
        patches = hidden[:, : self.grid**2].float()
        keys = self.key(F.layer_norm(patches, patches.shape[-1:])).float()
        logits: Tensor = query @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        return logits

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The mean cross entropy over the points that are in the picture."""
        logits = self(hidden, batch.inputs.token_mask)
        u, v = batch.columns[self.column].view(-1, self.points, 2).unbind(-1)
        inside = (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
        patch = (v * self.grid).long() * self.grid + (u * self.grid).long()
        patch = patch.clamp(0, self.grid**2 - 1)
        each = F.cross_entropy(logits.flatten(0, 1), patch.flatten(), reduction="none")
        loss: Tensor = (each * inside.flatten()).sum() / inside.sum().clamp_min(1)
        return loss


def text_mean(hidden: Tensor, valid: Tensor) -> Tensor:
    """The mean [B, E] float32 over the valid text tokens at the end of hidden [B, X, E], at one
    scale: residual streams grow with depth."""
    text = hidden[:, -valid.shape[1] :].float()
    weights = valid.float() / valid.sum(dim=1, keepdim=True)
    mean = (text * weights[..., None]).sum(dim=1)
    return F.layer_norm(mean, mean.shape[-1:])


class TrainingModel(nn.Module):
    """The model with all of its losses; what is differentiated, and what DDP and FSDP wrap.

    Args:
        action_dim: how many dimensions of an action are not padding.
        heads: auxiliary heads.
        recompute: recompute the blocks of the prefix in the backward pass instead of keeping what
            they computed (gradient checkpointing).
    """

    def __init__(
        self,
        model: Pi0,
        action_dim: int,
        heads: Sequence[AuxiliaryHead | PointingHead] = (),
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.action_dim = action_dim
        self.heads = nn.ModuleList(heads)
        self.recompute = recompute
        if recompute:
            recompute_vision(model)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean losses of a batch: "total", which is minimised, "flow", and one for each column."""
        cache, outputs = prefill(self.model, batch.inputs, self.recompute)
        errors = squared_errors(self.model, cache, batch)
        losses = {"flow": errors[..., : self.action_dim].mean()}
        # Weighs padding like any other dimension: a sum over all, by the count of real values.
        total = errors.sum() / errors[..., : self.action_dim].numel()
        for head in self.heads:
            assert isinstance(head, AuxiliaryHead | PointingHead)
            losses[head.column] = head.loss(outputs[head.block], batch)
            total = total + head.weight * losses[head.column]
        return {"total": total, **losses}
