"""An engine of a few lines, so that everything above engines is tested without a model."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from pi0.config import PRESETS
from pi0.engines.base import Capabilities, Engine, EngineOptions
from pi0.inputs import ModelInputs
from pi0.model import PrefixCache, Tap
from pi0.model.pi0 import no_tap


class FakeEngine(Engine):
    """Its velocity is such that sampling returns `answer`; keeps the inputs it saw."""

    name = "fake"
    capabilities = Capabilities(precisions=("float32",))

    def __init__(self, answer: Tensor) -> None:
        super().__init__(SimpleNamespace(config=PRESETS["tiny"]), EngineOptions("float32"))
        self.answer = answer
        self.seen: list[ModelInputs] = []

    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> PrefixCache:
        self.seen.append(inputs)
        valid = torch.ones(inputs.batch_size, 1, dtype=torch.bool)
        return PrefixCache([], valid, inputs.state)

    def velocity(self, x_t: Tensor, t: Tensor, cache: PrefixCache, tap: Tap = no_tap) -> Tensor:
        return (x_t - self.answer) / t[:, None, None]
