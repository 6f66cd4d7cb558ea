"""An observation between the parts of `Policy.infer`: before the engine and after it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pi0.engines.guidance import Guidance
from pi0.inputs import ModelInputs


@dataclass(frozen=True)
class Encoded:
    """What an engine is given of one observation.

    Attributes:
        inputs: of the model, a batch of 1.
        state: [D] as observed.
        noise: [1, horizon, action_dim of the model] float32.
        guidance: towards a previous chunk; None: there is none.
        seconds: that it took.
    """

    inputs: ModelInputs
    state: NDArray[np.float64]
    noise: Tensor
    guidance: Guidance | None
    seconds: float

    @property
    def batch_key(self) -> Hashable:
        """Equal for observations that one call of the engine can sample; None: it has one alone,
        since guidance is for one observation."""
        return self.inputs.shape if self.guidance is None else None


@dataclass(frozen=True)
class Sampled:
    """What an engine returned for one observation.

    Attributes:
        actions: [horizon, action_dim of the model] float32, in the model's units.
        seconds: of the engine's call, however many observations it had.
    """

    actions: NDArray[np.float32]
    seconds: float
