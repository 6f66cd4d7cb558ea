"""The conformance check passes engines that keep the contract and names what others do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.engines.base import Capabilities, Engine, EngineOptions, make_engine
from pi0.engines.reference import ReferenceEngine
from pi0.engines.threshold import Threshold
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.testing import check_engine

OnStep = Callable[[], None]


class Float32(ReferenceEngine):
    """The reference in one precision, which takes less time."""

    name = "float32"
    capabilities = Capabilities(precisions=("float32",))


def test_the_reference_keeps_the_contract() -> None:
    check_engine(ReferenceEngine)


def test_a_function_and_a_checkpoint(tiny_path) -> None:
    made = []

    def make(checkpoint) -> Engine:
        made.append(Float32(checkpoint, EngineOptions("float32")))
        return made[-1]

    check_engine(make, open_checkpoint(tiny_path))
    assert made


@pytest.fixture(scope="module")
def pi05(pi05_tiny_path: Path) -> Checkpoint:
    return open_checkpoint(pi05_tiny_path)


@pytest.mark.parametrize("engine", ["reference", "cpu:float32", "cpu:int8"])
def test_engines_keep_the_contract_for_pi05(pi05: Checkpoint, engine: str) -> None:
    check_engine(lambda checkpoint: make_engine(engine, checkpoint), pi05)


class ReadsTheState(Float32):
    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        return super()._sample(inputs, noise, steps, on_step) + 1e-9 * inputs.state[:, None]


def test_a_state_that_pi05_must_not_read(pi05: Checkpoint) -> None:
    with pytest.raises(AssertionError, match="expected the same actions for other state, found"):
        check_engine(lambda checkpoint: ReadsTheState(checkpoint, EngineOptions("float32")), pi05)


class NotAvailable(Float32):
    @classmethod
    def check_available(cls, config: Any, options: EngineOptions) -> None:
        raise EngineError("engine float32: expected a card, found none.")


def test_an_engine_that_is_not_available() -> None:
    with pytest.raises(EngineError, match="expected a card"):
        check_engine(NotAvailable)


class NoCapabilities(ReferenceEngine):
    capabilities = None


class NoPrecisions(ReferenceEngine):
    capabilities = Capabilities(precisions=())


class BadName(ReferenceEngine):
    name = "my:engine"


class NoLimits(ReferenceEngine):
    capabilities = Capabilities(precisions=("int3",))


class NoLimitForTheRest(NoLimits):
    thresholds = {"int3": {"actions": Threshold(0.9, 0.1, "rough")}}  # noqa: RUF012


class NoThresholds(NoLimits):
    thresholds = {"int3": {"*": 0.1}}  # noqa: RUF012


class Shape(Float32):
    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        return super()._sample(inputs, noise, steps, on_step)[0]


class Double(Float32):
    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        return super()._sample(inputs, noise, steps, on_step).double()


class HalfVelocity(Float32):
    def velocity(self, x_t: Tensor, *args: Any) -> Tensor:
        return super().velocity(x_t, *args).bfloat16()


class Noisy(Float32):
    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        actions = super()._sample(inputs, noise, steps, on_step)
        return actions + 1e-6 * torch.rand(actions.shape)


class Stale(Float32):
    """Keeps the first call's inputs, but for what it is told to take from the call."""

    fresh: tuple[str, ...] = ()
    first: ModelInputs | None = None

    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        self.first = self.first or inputs
        taken = {name: getattr(inputs, name) for name in self.fresh}
        return super()._sample(replace(self.first, **taken), noise, steps, on_step)


class StalePrompt(Stale):
    fresh = ("images", "image_mask", "state")


class StaleState(Stale):
    fresh = ("images", "image_mask", "tokens", "token_mask")


class HalfTheState(Float32):
    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        state = inputs.state.clone()
        state[:, 16:] = 0
        return super()._sample(replace(inputs, state=state), noise, steps, on_step)


class SeesMasked(Float32):
    def prefill(self, inputs: ModelInputs, *tap: Any) -> Any:
        everything = torch.ones_like(inputs.image_mask)
        return super().prefill(replace(inputs, image_mask=everything), *tap)


class OneRow(Float32):
    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        actions = super()._sample(inputs.row(0), noise[:1], steps, on_step)
        return actions.expand_as(noise)


class Unlocked(Float32):
    """Its own `sample` mixes up calls, as one does that shares buffers between threads."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counter = itertools.count()
        self.running = 0

    def sample(self, inputs: ModelInputs, noise: Tensor, *args: Any) -> Tensor:
        self.running += 1
        try:
            actions = super().sample(inputs, noise, *args)
            return actions + 1 if self.running > 1 else actions
        finally:
            self.running -= 1


class BrokenByAnError(Unlocked):
    def sample(self, inputs: ModelInputs, noise: Tensor, *args: Any) -> Tensor:
        self.running += not noise.isfinite().all()
        return super().sample(inputs, noise, *args)


class Detached(Float32):
    capabilities = Capabilities(precisions=("float32",), differentiable=True)

    def velocity(self, x_t: Tensor, *args: Any) -> Tensor:
        return super().velocity(x_t.detach(), *args)


class AnothersGradient(Detached):
    def velocity(self, x_t: Tensor, *args: Any) -> Tensor:
        return super().velocity(x_t, *args) + x_t - x_t.detach()


class FirstSteps(Float32):
    """As if it had captured the first call's steps."""

    steps: int | None = None

    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        self.steps = self.steps or steps
        return super()._sample(inputs, noise, self.steps, on_step)


class TimesOfEuler(Float32):
    """Its table of times has no other steps than Euler's."""

    table = torch.tensor([1 / 3, 1 / 2, 2 / 3, 1])

    def velocity(self, x_t: Tensor, t: Tensor, *args: Any) -> Tensor:
        nearest = (self.table[:, None] - t).abs().argmin(0)
        return super().velocity(x_t, self.table[nearest], *args)


class ShortPrompts(Float32):
    def prefill(self, inputs: ModelInputs, *tap: Any) -> Any:
        short = {name: getattr(inputs, name)[:, :12] for name in ("tokens", "token_mask")}
        return super().prefill(replace(inputs, **short), *tap)


class TwoCameras(Float32):
    def prefill(self, inputs: ModelInputs, *tap: Any) -> Any:
        two = {name: getattr(inputs, name)[:, :2] for name in ("images", "image_mask")}
        return super().prefill(replace(inputs, **two), *tap)


class ClippedState(Float32):
    def prefill(self, inputs: ModelInputs, *tap: Any) -> Any:
        return super().prefill(replace(inputs, state=inputs.state.clamp(-4, 4)), *tap)


class ScratchInputs(Float32):
    def _sample(self, inputs: ModelInputs, *args: Any) -> Tensor:
        actions = super()._sample(inputs, *args)
        inputs.images.zero_()
        return actions


class ScratchNoise(Float32):
    def _sample(self, inputs: ModelInputs, noise: Tensor, *args: Any) -> Tensor:
        return noise.copy_(super()._sample(inputs, noise, *args))


class SilentSteps(Float32):
    def _sample(self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: OnStep) -> Tensor:
        return super()._sample(inputs, noise, steps, lambda: None)


class HidesNan(Float32):
    def _sample(self, *args: Any) -> Tensor:
        return super()._sample(*args).nan_to_num()


class NeverCloses(Float32):
    def close(self) -> None:
        pass


class OtherStages(Float32):
    def prefill(self, inputs: ModelInputs, tap: Any = None) -> Any:
        if tap is None:
            return super().prefill(inputs)
        return super().prefill(
            inputs, lambda name, value: tap(name, 2 * value if name == "projector" else value)
        )


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (NoCapabilities, "NoCapabilities.capabilities: expected pi0.engines.base.Capabilities"),
        (NoPrecisions, "capabilities.precisions: expected a tuple of at least one name"),
        (BadName, "BadName.name: expected a word without colon and at sign, found 'my:engine'"),
        (NoLimits, "precision int3: expected limits for `pi0 verify`, found none. Declare them on"),
        (NoLimitForTheRest, "precision int3: expected limits"),
        (NoThresholds, r"precision int3: expected limits for `pi0 verify`, found {'\*': 0.1}"),
        (Shape, r"expected actions of shape \[1, 50, 32\], found \[50, 32\]"),
        (Double, "expected actions as float32 on the CPU, found float64 on cpu"),
        (HalfVelocity, "expected a velocity as float32 on the CPU, found bfloat16 on cpu"),
        (Noisy, "expected the same bits from the same call, found a difference of"),
        (Stale, "expected other actions for other images, found the same"),
        (StalePrompt, "expected other actions for other tokens, found the same"),
        (StaleState, "expected other actions for other state, found the same"),
        (HalfTheState, "expected the reference's actions for other images within"),
        (SeesMasked, "expected other actions for other image_mask, found the same"),
        (OneRow, "expected row 1 of a batch to be what it is alone"),
        (Unlocked, "expected the same bits from 4 threads as from one, found"),
        (BrokenByAnError, "expected the same actions after an error as before, found other"),
        (Detached, "expected a velocity that autograd can follow, as capabilities.differentiable"),
        (AnothersGradient, "expected the velocity to change as its gradient says, by"),
        (FirstSteps, "expected the reference's actions for 3 steps by euler within"),
        (TimesOfEuler, "expected the reference's actions for 3 steps by midpoint within"),
        (ShortPrompts, "for another number of cameras and tokens, 3 and 48, within"),
        (TwoCameras, "for another number of cameras and tokens, 3 and 48, within"),
        (ClippedState, "expected the reference's actions for other state within"),
        (ScratchInputs, "expected images as given after sample, found other values"),
        (ScratchNoise, "expected noise as given after sample, found other values"),
        (SilentSteps, "expected on_step to be called once for each of 2 steps, found 0 calls"),
        (HidesNan, "expected an EngineError for noise with NaN in it, found finite actions"),
        (NeverCloses, "expected an EngineError from sample after close, found an answer"),
        (OtherStages, r"expected the reference's projector \(all valid\), found that"),
    ],
)
def test_names_what_an_engine_does_not_keep(engine: type[Engine], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence) as error:
        check_engine(engine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("numbers", [(float("nan"), 0.1), (0.9, float("nan")), (1.1, 0.1), (1, -1)])
def test_limits_that_nothing_is_beyond(numbers: tuple[float, float]) -> None:
    with pytest.raises(EngineError, match="threshold: expected min_pcc up to 1, max_rel_l2 and"):
        Threshold(*numbers, "no reason")


class OpenAfterClose(Float32):
    """`prefill` without `exclusive`, of an engine that holds nothing."""

    def prefill(self, inputs: ModelInputs, *tap: Any) -> Any:
        return ReferenceEngine.prefill.__wrapped__(self, inputs, *tap)

    def _close(self) -> None:
        pass


def test_prefill_has_to_be_exclusive() -> None:
    with pytest.raises(AssertionError, match="EngineError from prefill after close"):
        check_engine(OpenAfterClose)
