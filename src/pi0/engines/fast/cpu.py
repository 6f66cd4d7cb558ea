"""Engine `cpu`: the processor's fastest way to exact (float32) or close (int8) actions."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.engines.base import Engine
from pi0.engines.fast.int8 import Int8Kernels, NativeKernels
from pi0.engines.fast.keep import load_weights
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.native import Native, Unavailable
from pi0.engines.fast.network import Cache, Network
from pi0.engines.fast.plan import make_plan
from pi0.engines.fast.weights import Scheme
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.pi0 import no_tap

SCHEMES = {
    "float32": Scheme(torch.float32, part=2048),
    "int8": Scheme(torch.float32, {".*": torch.int8}),
}


class CpuEngine(Engine):
    """See `Engine`."""

    precisions = tuple(SCHEMES)
    keeps = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | None = None,
        dtype: str = "float32",
        image_size: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
        cache: bool = False,
    ) -> None:
        if device not in (None, "cpu"):
            raise EngineError(f"device: expected cpu for engine cpu, found {device!r}.")
        kernels = choose_kernels()
        name = f"cpu-{dtype}" if cache else None
        weights = load_weights(checkpoint, SCHEMES[dtype], kernels, image_size, progress, name)
        self.config = weights.config
        self.network = Network(weights, kernels)

    @torch.inference_mode()
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> Cache:
        plan = make_plan(inputs, self.config.vision.num_patches, self.config.suffix_len)
        return self.network.prefill(inputs, plan, tap)

    @torch.inference_mode()
    def velocity(
        self, x_t: Tensor, t: Tensor, state: Tensor, cache: Cache, tap: Tap = no_tap
    ) -> Tensor:
        if cache.state is not None and not torch.equal(cache.state, state):
            cache.state = None
        return self.network.velocity(x_t, self.network.time_terms(t), state, cache, tap)


def choose_kernels() -> Kernels:
    """Native code, or, with a warning that says why not, PyTorch."""
    try:
        return NativeKernels(Native())
    except Unavailable as why:
        warnings.warn(f"engine cpu: slower than it could be: {why}.", stacklevel=2)
        return Int8Kernels()
