"""Engine: what computes the stages of π0, and how one is made.

Knows nothing of robots, and no engine by its type: what an engine can do, its class declares.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, Progress, require_flow
from pi0.closing import Closing
from pi0.config import Pi0Config
from pi0.engines.guidance import Guidance
from pi0.engines.registry import find_engine, plugin_errors
from pi0.engines.spec import EngineSpec
from pi0.engines.threshold import Threshold
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.flow import SAMPLERS, check_sampler, integrate
from pi0.model.pi0 import no_tap

NOTHING: Mapping[str, Any] = MappingProxyType({})

SeeOperation = Callable[[str, Tensor, Tensor], None]  # its name, expected, computed

P = ParamSpec("P")
R = TypeVar("R")
AnEngine = TypeVar("AnEngine", bound="Engine")


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is made.

    Attributes:
        precision: one of the engine's precisions.
        device: as the engine calls it; None: its default.
        image_size: pixels that the model runs at; None: the checkpoint's.
        weight_cache: keep packed weights in a file beside the checkpoint, for the next start.
        progress: called with the number of bytes of weights read since the last call.
    """

    precision: str
    device: str | None = None
    image_size: int | None = None
    weight_cache: bool = False
    progress: Progress = lambda _: None


@dataclass(frozen=True)
class Capabilities:
    """What a class of engines can do.

    Attributes:
        precisions: their names, the first is the default.
        devices: the first is the default: "cpu", "cuda" (which stands for "cuda:1", too), or what
            an engine names itself, such as the number of a card.
        batch: `sample` takes more than one observation, and unless it is the engine's own,
            `prefill` and `velocity` do.
        weight_cache: it can keep packed weights beside the checkpoint.
        shows_stages: its taps see the stages, but for those of `Engine.hidden_stages`.
        feedable: what a tap returns replaces the tensor.
        differentiable: autograd follows `velocity` from an x_t that requires a gradient, with the
            cache of a `prefill` outside inference mode.
        whole_logits: it holds a block's attention logits all at once, for estimates of memory.
        peer: another implementation of π0, with which ours are compared.
    """

    precisions: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    batch: bool = True
    weight_cache: bool = False
    shows_stages: bool = True
    feedable: bool = True
    differentiable: bool = False
    whole_logits: bool = False
    peer: bool = False


def exclusive(
    method: Callable[Concatenate[AnEngine, P], R],
) -> Callable[Concatenate[AnEngine, P], R]:
    """A method of an engine that one thread at a time runs, and that a closed engine refuses."""

    @functools.wraps(method)
    def run(self: AnEngine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            if self._closed:
                raise EngineError(f"engine {self.name}: expected an open engine, found it closed.")
            with plugin_errors(self.name, "compute"):
                return method(self, *args, **kwargs)

    return run


class Engine(Closing):
    """Computes actions. Inputs and results are float32 tensors on the CPU.

    A subclass declares `name` and `capabilities`, loads weights in `__init__`, and implements
    `prefill` and `velocity`, decorated with `exclusive`. docs/engines.md shows a whole one, and
    `pi0.testing.check_engine` tells whether it keeps what is promised here.

    Many threads may call one engine: `sample` and `exclusive` methods run in one of them at a time,
    so that an engine may keep state between calls without mixing them up.

    `tap` sees every stage's result under its name in `pi0.model.STAGES`, and of every block the
    output (`vlm_transformer.block.3`) and in the trunks keys and values [B, T, K, D]
    (`vlm_transformer.block.3.keys`), shaped as in the model. Its return value replaces the tensor.

    Attributes:
        name: the engine's name in specs; that of the entry point for a plug-in.
        capabilities: see `Capabilities`.
        thresholds: limits of `pi0 verify` in its own precisions, by stage ("*": all others).
        hidden_stages: stages that its taps do not see though it shows stages, with the reason.
        unrounded: by precision, the engine (a spec) that runs the same code in float32, where `pi0
            verify` tests the computation; what code differs is shown by `show_operations`.
        config: the model's sizes, with the image size that it runs at.
        options: how it was made.
        notes: sentences that belong beside its results, such as which kernels were chosen.
        own_seconds: of its last call, if it measures this itself (in another process), or None.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    thresholds: ClassVar[Mapping[str, Mapping[str, Threshold]]] = NOTHING
    hidden_stages: ClassVar[Mapping[str, str]] = NOTHING
    unrounded: ClassVar[Mapping[str, str]] = NOTHING
    notes: Sequence[str] = ()
    own_seconds: float | None = None

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        """Subclasses call this first. Use `make_engine` or `from_checkpoint` to make an engine."""
        self.options = options
        size = options.image_size
        self.config = checkpoint.config if size is None else checkpoint.config.with_image_size(size)
        self._lock = threading.RLock()
        self._closed = False

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, options: EngineOptions) -> Engine:
        """An engine with a checkpoint's weights.

        Raises:
            EngineError: it cannot do what the options ask for, or is not available here.
            CheckpointError, ConfigError: see `load_model`.
        """
        if options.weight_cache and not cls.capabilities.weight_cache:
            raise EngineError(
                f"weight cache: expected an engine that keeps packed weights, found {cls.name}. "
                "Leave out --weight-cache."
            )
        cls.check_available(checkpoint.config, options)
        return cls(checkpoint, options)

    @classmethod
    def check_available(cls, config: Pi0Config, options: EngineOptions) -> None:
        """Says before the work what is missing for an engine: a library, a device, a size.

        Args:
            config: the checkpoint's, before `options.image_size`.

        Raises:
            EngineError: it cannot be made here.
        """
        kind, devices = (options.device or "").partition(":")[0], cls.capabilities.devices
        if kind and kind not in devices:
            raise EngineError(
                f"device: expected {' or '.join(devices)} for engine {cls.name}, found "
                f"{options.device!r}."
            )

    @abstractmethod
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> Any:
        """Runs the prefix, once for all denoising steps.

        Returns what `velocity` takes as `cache`, the state included; its type is engine-specific.
        """

    @abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, cache: Any, tap: Tap = no_tap) -> Tensor:
        """dx/dt [B, horizon, action_dim] of noisy actions x_t of that shape at t [B]."""

    @exclusive
    def sample(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        steps: int = 10,
        on_step: Callable[[], None] = lambda: None,
        guidance: Guidance | None = None,
        sampler: str = "euler",
    ) -> Tensor:
        """Actions [B, horizon, action_dim] from noise of that shape.

        Calls from several threads are computed one after another.

        Args:
            on_step: called once per denoising step of the whole batch.
            guidance: changes each velocity.
            sampler: see `integrate`. Another than Euler's, and guidance, go through `prefill` and
                `velocity`, not through a faster way that the engine may have.

        Raises:
            ConfigError: there is no such sampler.
            EngineError: the result is not finite, the engine is closed, or it cannot differentiate
                what the guidance differentiates.
        """
        if guidance is None and check_sampler(sampler) == "euler":
            actions = self._sample(inputs, noise, steps, on_step)
        else:
            actions = self._integrate(inputs, noise, steps, on_step, guidance, sampler)
        self._require_shape("actions", actions, noise)
        return require_finite(actions)

    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None]
    ) -> Tensor:
        """What `sample` returns by Euler's method, without guidance. An engine that has a faster
        way than this overrides it."""
        return self._integrate(inputs, noise, steps, on_step)

    @torch.inference_mode(False)  # of the caller: its tensors cannot be differentiated
    def _integrate(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        steps: int,
        on_step: Callable[[], None],
        guidance: Guidance | None = None,
        sampler: str = "euler",
    ) -> Tensor:
        """What `sample` returns, by `prefill` and `velocity`."""
        if guidance is not None:
            self.check_guidance(guidance.differentiates)
        cache = self.prefill(inputs)
        done = count(1)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if guidance is None:
                v = self.velocity(x, t, cache)
            else:
                v = guidance(lambda x_t: self.velocity(x_t, t, cache), x, t)
            self._require_shape("velocities", v, x)  # another would be broadcast
            if next(done) % SAMPLERS[sampler] == 0:
                on_step()
            return v

        return integrate(velocity, noise.clone(), steps, sampler)

    def _require_shape(self, what: str, value: Any, like: Tensor) -> None:
        kind, shape = getattr(value, "dtype", None), list(getattr(value, "shape", ()))
        kind = kind if isinstance(value, Tensor) else type(value).__name__
        if not (isinstance(value, Tensor) and value.is_floating_point() and shape == [*like.shape]):
            raise EngineError(
                f"engine {self.name}: expected {what} of shape {list(like.shape)}, found {shape} "
                f"of {kind}; they are to be a tensor of float32."
            )

    @classmethod
    def check_guidance(cls, differentiates: bool) -> None:
        """Raises EngineError if guidance differentiates the velocity and this engine cannot."""
        if differentiates and not cls.capabilities.differentiable:
            raise EngineError(
                f"engine {cls.name}: expected one whose velocity autograd can follow, found one "
                'that computes without it. Use jacobian="identity" (--real-time identity), or '
                "engine reference."
            )

    @classmethod
    def check_batch(cls, size: int) -> None:
        """Raises EngineError if the engine cannot take this number of observations at once."""
        if size > 1 and not cls.capabilities.batch:
            raise EngineError(
                f"batch: expected an engine that takes several observations at once, found "
                f"{cls.name}. Leave --batch out."
            )

    def time_parts(
        self, inputs: ModelInputs, noise: Tensor, steps: int
    ) -> tuple[float, float, float] | None:
        """Milliseconds of prefill, of vision in it, and of a step, inside `sample`; None, unless an
        engine runs them there in another way than `prefill` and `velocity`, which can be timed."""
        return None

    def close(self) -> None:
        """Releases what the engine holds; waits for a call that runs. Closing twice is harmless."""
        with self._lock:
            if not self._closed:
                self._closed = True
                with plugin_errors(self.name, "close"):
                    self._close()

    def _close(self) -> None:
        """Releases weights, device or process; called once, by `close`."""

    @property
    def implementation(self) -> str:
        """The package that computes, and its version."""
        package = type(self).__module__.partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", None)
        return f"{package} {version}" if version else package

    @property
    def torch_version(self) -> str:
        """The version of PyTorch that it runs on."""
        return torch.__version__

    @property
    def info(self) -> dict[str, Any]:
        """What this engine is, as plain data."""
        return {
            "name": self.name,
            "precision": self.options.precision,
            "device": self.options.device or self.capabilities.devices[0],
            "implementation": self.implementation,
            "torch": self.torch_version,
            "notes": list(self.notes),
        }

    @contextmanager
    def show_operations(self, see: SeeOperation) -> Iterator[None]:
        """Shows each operation that this precision has code of its own for: what it should compute
        from its operands, in float32, and what it did compute, less what rounding explains."""
        yield

    @classmethod
    def why_hidden(cls, stage: str) -> str:
        """Why a stage that its taps did not see is not shown: a phrase."""
        if not cls.capabilities.shows_stages:
            return f"engine {cls.name} does not show its stages"
        return cls.hidden_stages.get(stage, f"engine {cls.name} does not show it")

    def peak_memory(self) -> tuple[int, int]:
        """The most bytes that its process has held in memory, and of a CUDA device's memory."""
        import resource  # not everywhere

        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return host, torch.cuda.max_memory_allocated()


def require_finite(actions: Tensor) -> Tensor:
    """The actions themselves, if they are finite.

    Raises:
        EngineError: they are not.
    """
    if not torch.isfinite(actions).all():
        raise EngineError(
            "actions: expected finite values, found NaN or infinite ones. The weights or "
            "statistics are damaged: `pi0 trace` shows at which stage."
        )
    return actions


def make_engine(
    spec: EngineSpec | str,
    checkpoint: Checkpoint,
    *,
    image_size: int | None = None,
    weight_cache: bool = False,
    progress: Progress = lambda _: None,
) -> Engine:
    """An engine with a checkpoint's weights.

    Args:
        spec: which one, as an `EngineSpec` or as the text that `EngineSpec.parse` reads.
        image_size, weight_cache, progress: see `EngineOptions`.

    Raises:
        EngineError: no such engine, precision or device; one that keeps no packed weights, or no
            room to write, if these are to be kept; a plug-in that fails.
        CheckpointError, ConfigError: see `load_model` and `require_flow`.
    """
    spec = EngineSpec.parse(spec) if isinstance(spec, str) else spec
    options = EngineOptions(spec.precision, spec.device, image_size, weight_cache, progress)
    engine = find_engine(spec.name)
    require_flow(checkpoint)
    with plugin_errors(spec.name, "make an engine"):
        made = engine.from_checkpoint(checkpoint, options)
        if not isinstance(made, Engine):
            raise EngineError(
                f"engine {spec.name}: expected from_checkpoint to return one, found {made!r:.80}."
            )
        json.dumps(made.info)  # plain data, as the metadata of a policy
    return made
