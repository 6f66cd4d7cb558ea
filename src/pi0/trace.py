"""One forward pass, watched: the result of every stage of π0, and how long it took.

Knows no engine's internals: it uses the tap that all engines offer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pi0.engines.base import Engine
from pi0.inputs import ModelInputs
from pi0.model import STAGES


@dataclass(frozen=True)
class StageRow:
    """One stage: its result's shape, dtype and statistics, and milliseconds.

    `ms` is the time since the stage before; for the last stage, `velocity`, that of the whole pass.
    """

    stage: str
    shape: list[int]
    dtype: str
    min: float
    max: float
    mean: float
    std: float
    ms: float


@dataclass(frozen=True)
class MaskSlice:
    """A part of the attention mask, and who uses it. `visible` is the share of True."""

    name: str
    shape: list[int]
    visible: float
    used_by: str


@dataclass(frozen=True)
class Trace:
    """Stages in order, and how the sequence is made up.

    `not_shown` are the stages that the engine's tap does not see, and why; without `sequence` there
    are no mask slices.
    """

    stages: list[StageRow]
    not_shown: dict[str, str]
    prefix: int
    suffix: int
    total: int
    slices: list[MaskSlice]


class _Recorder:
    """A tap that measures; the time its own statistics take is not counted."""

    def __init__(self) -> None:
        self.rows: dict[str, StageRow] = {}
        self.mask: Tensor | None = None
        self._last = time.perf_counter()

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name not in STAGES:
            return value
        if value.is_cuda:
            torch.cuda.synchronize(value.device)
        ms = (time.perf_counter() - self._last) * 1e3
        if name == "sequence":
            self.mask = value
        if name == "velocity":
            ms += sum(row.ms for row in self.rows.values())
        flat = value.float()
        self.rows[name] = StageRow(
            stage=name,
            shape=list(value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            min=float(flat.min()),
            max=float(flat.max()),
            mean=float(flat.mean()),
            std=float(flat.std()),
            ms=ms,
        )
        self._last = time.perf_counter()
        return value


def trace(engine: Engine, inputs: ModelInputs, noise: Tensor, t: float = 1.0) -> Trace:
    """Runs prefill and one velocity at time t, and reports all stages that the engine shows.

    Args:
        noise: the noisy actions [B, horizon, action_dim].
    """
    recorder = _Recorder()
    cache = engine.prefill(inputs, recorder)
    engine.velocity(noise, torch.full((len(noise),), t), cache, recorder)
    x = engine.config.prefix_len(inputs.image_mask.shape[1], inputs.tokens.shape[1])
    suffix = engine.config.suffix_len
    return Trace(
        stages=[recorder.rows[name] for name in STAGES if name in recorder.rows],
        not_shown={name: engine.why_hidden(name) for name in STAGES if name not in recorder.rows},
        prefix=x,
        suffix=suffix,
        total=x + suffix,
        slices=[] if recorder.mask is None else _slices(recorder.mask[0], x),
    )


def _slices(mask: Tensor, x: int) -> list[MaskSlice]:
    """The parts of a mask [S, S] whose first x rows are the prefix."""
    return [
        _slice("prefix→prefix", mask[:x, :x], "VLM, in prefill"),
        _slice("suffix→suffix", mask[x:, x:], "expert: its own tokens, part of the next"),
        _slice("suffix→prefix+suffix", mask[x:], "expert, in every denoising step"),
    ]


def _slice(name: str, mask: Tensor, used_by: str) -> MaskSlice:
    return MaskSlice(name, list(mask.shape), float(mask.float().mean()), used_by)
