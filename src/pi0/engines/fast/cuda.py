"""Engine `cuda`: a sampling call is one CUDA graph; see `graph.py`.

Fused operations are Triton's where Triton works, else plain PyTorch's: `notes` says what was chosen
and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.engines.base import Engine, need_finite
from pi0.engines.fast.graph import Call, Graphs, copy
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.network import Cache, Network
from pi0.engines.fast.plan import Plan, make_plan
from pi0.engines.fast.weights import Scheme, pack
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.pi0 import no_tap

BUCKET = 16  # prefix tokens are rounded up to a multiple, so that like prompts share a graph
WHOLE = 2**31  # the MLPs are not cut: a GPU's caches hold no part of their weights anyway
SCHEMES = {
    "bfloat16": Scheme(torch.bfloat16, part=WHOLE),
    "float32": Scheme(torch.float32, part=WHOLE),
}


class CudaEngine(Engine):
    """See `Engine`. `prefill` and `velocity` launch the kernels that `sample` replays.

    Attributes:
        notes: sentences on what was chosen for this device, and why.
    """

    precisions = tuple(SCHEMES)

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | None = None,
        dtype: str = "bfloat16",
        image_size: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.device = find_device(device or "cuda")
        kernels, self.notes = choose_kernels()
        for note in self.notes:
            warnings.warn(note, stacklevel=2)
        weights = pack(checkpoint, SCHEMES[dtype], image_size, progress).to(self.device)
        self.config = weights.config
        self.network = Network(weights, kernels)
        self.graphs = Graphs(self.network, self.device)

    @torch.inference_mode()
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> Cache:
        plan = copy(self._plan(inputs), self.device)
        with on_device(self.device):
            return self.network.prefill(copy(inputs, self.device), plan, guard(tap))

    @torch.inference_mode()
    def velocity(
        self, x_t: Tensor, t: Tensor, state: Tensor, cache: Cache, tap: Tap = no_tap
    ) -> Tensor:
        x_t, state = x_t.to(self.device), state.to(self.device)
        if cache.state is not None and not torch.equal(cache.state, state):
            cache = replace(cache, state=None)
        with on_device(self.device):
            terms = self.network.time_terms(t)
            return self.network.velocity(x_t, terms, state, cache, guard(tap)).cpu()

    @torch.inference_mode()
    def sample(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        steps: int = 10,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """See `Engine.sample`; all steps are one launch, after which `on_step` is told of them."""
        with on_device(self.device):
            actions = self.graphs(Call(inputs, self._plan(inputs), noise, steps))
        for _ in range(steps):
            on_step()
        return need_finite(actions)

    def _plan(self, inputs: ModelInputs) -> Plan:
        config = self.config
        return make_plan(inputs, config.vision.num_patches, config.suffix_len, BUCKET)


def guard(tap: Tap) -> Tap:
    """A tap whose tensors stay as they are: kernels add residuals in place."""
    return tap if tap is no_tap else lambda name, x: tap(name, x).clone()


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Kernels go to this device; convolutions are exact (by default cuDNN's are TF32)."""
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with torch.cuda.device(device), exact:
        yield


def find_device(name: str) -> torch.device:
    """A CUDA device that is there.

    Raises:
        EngineError: the name is none, this PyTorch has no CUDA, or this machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device: expected cuda or cuda:N, found {name!r}.") from error
    if device.type != "cuda":
        raise EngineError(
            f"device: expected cuda or cuda:N for engine cuda, found {name!r}. Use --engine cpu."
        )
    if not torch.backends.cuda.is_built():
        raise EngineError(
            f"device {name}: expected a PyTorch built for CUDA, found {torch.__version__}. Install "
            "one (pytorch.org), or use --engine cpu."
        )
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (device.index or 0) >= count:
        raise EngineError(
            f"device {name}: expected one of this machine's CUDA devices, found {count} of them. "
            "See nvidia-smi, or use --engine cpu."
        )
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


def choose_kernels() -> tuple[Kernels, list[str]]:
    """The fastest kernels that work on the current device, and notes on what does not."""
    return Kernels(), []
