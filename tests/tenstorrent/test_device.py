"""On a card, on Tenstorrent's simulator or on the kernel emulator: the same network, for real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import EngineOptions, make_engine
from pi0.engines.tenstorrent.engine import TtnnEngine
from pi0.engines.tenstorrent.ttnn_import import DRIVER, EMULATOR, SIMULATOR, has_device
from pi0.inputs import ModelInputs, random_inputs
from pi0.verify.cases import default_cases
from pi0.verify.run import verify

pytestmark = [
    pytest.mark.tt_device,
    pytest.mark.skipif(
        not has_device(), reason=f"no Tenstorrent card ({DRIVER}), {SIMULATOR} or {EMULATOR}"
    ),
]
VIEWS, TOKENS, STEPS = 2, 10, 2
REPLAYS = 1000 if DRIVER.exists() else 4  # a simulator takes minutes for each


@pytest.fixture
def engine(either_path: Path) -> Iterator[TtnnEngine]:
    """The engine in precision fast."""
    with TtnnEngine.from_checkpoint(open_checkpoint(either_path), EngineOptions("fast")) as engine:
        assert isinstance(engine, TtnnEngine)
        yield engine


@pytest.fixture
def capturing(engine: TtnnEngine) -> TtnnEngine:
    """One that captures its calls."""
    if not engine.captures:
        pytest.skip("slow dispatch and the emulator cannot capture")
    return engine


def observation(engine: TtnnEngine, seed: int) -> tuple[ModelInputs, Tensor]:
    return random_inputs(engine.config, VIEWS, TOKENS, seed)


def uncaptured(engine: TtnnEngine, inputs: ModelInputs, noise: Tensor) -> Tensor:
    """The same call, operation by operation."""
    engine.captures, before = False, engine.captures
    engine.prefill(inputs.row(0))  # releases a capture
    try:
        return engine.sample(inputs, noise, STEPS)
    finally:
        engine.captures = before


@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("mode", ["chained", "isolated"])
def test_agrees_with_the_reference(either_path: Path, precision: str, mode: str) -> None:
    """PCC and error of every stage and block, among the cases one with masked cameras."""
    opened = open_checkpoint(either_path)
    result = verify(
        lambda: make_engine("reference", opened),
        lambda: make_engine(f"ttnn:{precision}", opened),
        default_cases(opened.config, cameras=3, tokens=40),
        mode=mode,
        layers=True,
        steps=2,
    )
    assert result.first_failure is None


def test_a_replay_is_the_call(capturing: TtnnEngine) -> None:
    inputs, noise = observation(capturing, 0)
    expected = uncaptured(capturing, inputs, noise)
    for _ in range(3):  # the first one captures
        assert torch.equal(capturing.sample(inputs, noise, STEPS), expected)


@pytest.mark.parametrize("changed", [*(field.name for field in fields(ModelInputs)), "noise"])
def test_a_replay_sees_every_input(capturing: TtnnEngine, changed: str) -> None:
    """Each input changed by itself after the capture gives what an uncaptured call gives."""
    inputs, noise = observation(capturing, 0)
    other, other_noise = observation(capturing, 1)
    first = capturing.sample(inputs, noise, STEPS)
    if changed == "noise":
        noise = other_noise
    elif changed.endswith("_mask"):
        mask = getattr(inputs, changed).clone()
        mask[:, -1] = False
        inputs = replace(inputs, **{changed: mask})
    else:
        inputs = replace(inputs, **{changed: getattr(other, changed)})
    replayed = capturing.sample(inputs, noise, STEPS)
    assert torch.equal(replayed, uncaptured(capturing, inputs, noise))
    ignored = changed == "state" and not capturing.config.state_tokens  # π0.5 has it in the prompt
    assert torch.equal(replayed, first) == ignored


def test_both_queues(engine: TtnnEngine) -> None:
    """Passes of a batch, each uploaded while the one before it is computed, are what they are
    uncaptured, and a row what it is alone but for how products are cut into blocks."""
    rows = [observation(engine, seed) for seed in range(6)]
    inputs = ModelInputs(
        *(torch.cat([getattr(row, field.name) for row, _ in rows]) for field in fields(ModelInputs))
    )
    noise = torch.cat([noise for _, noise in rows])
    together = engine.sample(inputs, noise, STEPS)
    assert torch.equal(uncaptured(engine, inputs, noise), together)
    for row, (alone, start) in zip(together, rows, strict=True):
        off = engine.sample(alone, start, STEPS)[0] - row
        assert off.norm() <= 0.02 * (row - start[0]).norm()


def test_stages_between_replays(capturing: TtnnEngine) -> None:
    """A prefix made before a capture and used after it, and a replay after that."""
    inputs, noise = observation(capturing, 0)
    prefix = capturing.prefill(inputs)
    t = torch.ones(1)
    velocity = capturing.velocity(noise, t, prefix)
    actions = capturing.sample(inputs, noise, STEPS)
    assert torch.equal(capturing.velocity(noise, t, prefix), velocity)
    assert torch.equal(capturing.sample(inputs, noise, STEPS), actions)


def test_a_thousand_replays(capturing: TtnnEngine) -> None:
    """Two observations in turn: the same bits every time, and no hang."""
    rows = [observation(capturing, seed) for seed in range(2)]
    expected = [capturing.sample(*row, STEPS) for row in rows]
    assert not torch.equal(*expected)
    for i in range(REPLAYS):
        assert torch.equal(capturing.sample(*rows[i % 2], STEPS), expected[i % 2]), f"replay {i}"
