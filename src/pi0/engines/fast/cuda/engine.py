"""Engine `cuda`: a sampling call is one CUDA graph; see `graph.py`.

Fused operations are Triton's where Triton works, else plain PyTorch's: `notes` says what was chosen
and why.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.dtypes import parse_dtype
from pi0.engines.base import Capabilities, Engine, EngineOptions, exclusive
from pi0.engines.fast.cuda import fp8
from pi0.engines.fast.cuda.fp8 import Fp8Kernels
from pi0.engines.fast.cuda.graph import Call, Graphs
from pi0.engines.fast.cuda.parts import make_parts, time_run
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.network import VLM_OUTPUT, Cache, Network
from pi0.engines.fast.plan import TokenPlan, copy, make_token_plan
from pi0.engines.fast.weights import Scheme, pack
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.pi0 import no_tap

BUCKET = 16  # prefix tokens are rounded up to a multiple where prompts change with every call
PART_REPEATS = 20  # replays of a part, of which the median counts
UNSPLIT = 2**31  # the MLPs are not cut: a GPU's caches hold no part of their weights anyway
PRECISIONS = ("bfloat16", "fp8", "float32")
PLAIN = (
    "engine cuda: Triton's fused kernels cannot be used ({why}); plain PyTorch's are used, which "
    "are slower."
)
FP8_CAPABILITY = (8, 9)  # Ada, Hopper and newer


class CudaEngine(Engine):
    """See `Engine`. `prefill` and `velocity` launch the kernels that `sample` replays.

    Attributes:
        notes: sentences on what was chosen for this device, and why.
    """

    name = "cuda"
    capabilities = Capabilities(precisions=PRECISIONS, devices=("cuda",))
    hidden_stages = MappingProxyType({"vlm_transformer": VLM_OUTPUT})
    unrounded = MappingProxyType(dict.fromkeys(PRECISIONS, "cuda:float32"))

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        super().__init__(checkpoint, options)
        self.device = find_device(options.device or "cuda")
        scheme, kept = choose_scheme(checkpoint, options.precision)
        with on_device(self.device):
            kernels, chosen = choose_kernels(self.device, scheme, self.config)
        self.notes = [*chosen, *kept]
        for note in self.notes:
            warnings.warn(note, stacklevel=3)
        weights = pack(checkpoint, scheme, options.image_size, options.progress).to(self.device)
        self.network = Network(weights, kernels)
        self.graphs = Graphs(self.network, self.device)

    @classmethod
    def check_available(cls, config: Pi0Config, options: EngineOptions) -> None:
        """See `Engine`."""
        device = find_device(options.device or "cuda")
        if options.precision == "fp8":
            check_fp8(device)

    @exclusive
    @torch.inference_mode()
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> Cache:
        plan = copy(self._plan(inputs), self.device)
        with on_device(self.device):
            return self.network.prefill(copy(inputs, self.device), plan, guard(tap))

    @exclusive
    @torch.inference_mode()
    def velocity(self, x_t: Tensor, t: Tensor, cache: Cache, tap: Tap = no_tap) -> Tensor:
        with on_device(self.device):
            time = self.network.times(t)
            return self.network.velocity(x_t.to(self.device), time, cache, guard(tap)).cpu()

    @torch.inference_mode()
    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None]
    ) -> Tensor:
        """See `Engine`; all steps are one launch, after which `on_step` is called once per step."""
        with on_device(self.device):
            actions = self.graphs(Call(inputs, self._plan(inputs), noise, steps))
        for _ in range(steps):
            on_step()
        return actions

    @exclusive
    @torch.inference_mode()
    def time_parts(
        self, inputs: ModelInputs, noise: Tensor, steps: int
    ) -> tuple[float, float, float]:
        """See `Engine`; medians of replays of graphs of their own."""
        call = Call(inputs, self._plan(inputs), noise, steps)
        with on_device(self.device):
            runs = make_parts(self.network, call, self.device)
            prefill, vision, step = (
                statistics.median(time_run(runs[name], self.graphs.spare, PART_REPEATS))
                for name in ("prefill", "vision", "step")
            )
        return prefill, vision, step

    def _close(self) -> None:
        del self.graphs, self.network

    def _plan(self, inputs: ModelInputs) -> TokenPlan:
        config = self.config
        return make_token_plan(
            inputs, config.vision.num_patches, config.suffix_len, choose_bucket(config)
        )


def guard(tap: Tap) -> Tap:
    """A tap whose tensors stay as they are: kernels add residuals in place."""
    return tap if tap is no_tap else lambda name, x: tap(name, x).clone()


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Kernels go to this device."""
    return torch.cuda.device(device)


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


def check_fp8(device: torch.device) -> None:
    """Raises EngineError if this device or PyTorch has no products of e4m3 with scales a row."""
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise EngineError(
            f"dtype fp8: expected a device of compute capability {_dotted(FP8_CAPABILITY)} or "
            f"newer, found {_dotted(capability)} ({torch.cuda.get_device_name(device)}). "
            "Use --dtype bfloat16."
        )
    try:
        fp8.check_products(device)
    except RuntimeError as error:
        raise EngineError(
            f"dtype fp8: expected a PyTorch with row-wise scaled products for this device, found "
            f"{torch.__version__} ({error}). Use --dtype bfloat16, or a newer PyTorch."
        ) from error


def choose_bucket(config: Pi0Config) -> int:
    """What prefix tokens are rounded up to, which takes a mask, and that takes time.

    A task's prompt is the same in every call, so its graph has its exact length. In π0.5 the state
    is written into the prompt, and a graph for each number of digits would be too many.
    """
    return 1 if config.state_tokens else BUCKET


def choose_scheme(checkpoint: Checkpoint, precision: str) -> tuple[Scheme, list[str]]:
    """How weights are packed for a precision, and notes on what stays coarser or finer."""
    if precision == "fp8":
        return fp8.make_scheme(checkpoint.config, UNSPLIT)
    return Scheme(parse_dtype(precision), mlp_chunk=UNSPLIT), []


def choose_kernels(
    device: torch.device, scheme: Scheme, config: Pi0Config
) -> tuple[Kernels, list[str]]:
    """The fastest kernels that work on the current device, and notes on why others do not."""
    try:
        from pi0.engines.fast.cuda.triton_check import TritonUnavailable, check
        from pi0.engines.fast.cuda.triton_kernels import TritonKernels
    except ImportError as error:
        return Fp8Kernels(), [PLAIN.format(why=error)]
    try:
        check(device, scheme.dtype, fp8.FP8 in scheme.dtype_by_pattern.values(), config)
    except TritonUnavailable as why:
        return Fp8Kernels(), [PLAIN.format(why=why)]
    return TritonKernels(), []


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
