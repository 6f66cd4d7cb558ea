"""Time embedding and samplers, against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pi0.config import PRESETS
from pi0.errors import ConfigError
from pi0.model.flow import embed_time, integrate


def test_time_embedding_by_hand() -> None:
    """Width 4: periods 4e-3 and 4.0."""
    t = 0.3
    expected = [
        math.sin(2 * math.pi * t / 4e-3),
        math.sin(2 * math.pi * t / 4.0),
        math.cos(2 * math.pi * t / 4e-3),
        math.cos(2 * math.pi * t / 4.0),
    ]
    got = embed_time(torch.tensor([t], dtype=torch.float64), 4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0], torch.tensor(expected), atol=1e-6, rtol=0)


def test_an_odd_width_is_refused() -> None:
    """Half of the embedding are sines; towers without it may have odd widths."""
    tiny = PRESETS["tiny"]
    replace(tiny, vlm=replace(tiny.vlm, width=63))
    with pytest.raises(ConfigError, match="expert width: expected an even number, .* found 31"):
        replace(tiny, expert=replace(tiny.expert, width=31))


def test_euler_times_and_sign() -> None:
    """A constant velocity is followed exactly; times run from 1 down to 1/steps."""
    times = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t.tolist())
        return torch.full_like(x, 2.0)

    out = integrate(velocity, torch.ones(2, 3, 4), steps=10)
    torch.testing.assert_close(out, torch.full((2, 3, 4), -1.0))
    assert times == [pytest.approx([1 - i / 10] * 2) for i in range(10)]


def test_midpoint_by_hand() -> None:
    """One step of dx/dt = x · t from t = 1: half way x is 1 - 1/2, the velocity there 1/4."""
    times = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t.tolist())
        return x * t[:, None]

    out = integrate(velocity, torch.ones(2, 1), steps=1, sampler="midpoint")
    torch.testing.assert_close(out, torch.full((2, 1), 0.75))
    assert times == [[1.0, 1.0], [0.5, 0.5]]


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("midpoint", 2)])
def test_order_of_a_sampler(sampler: str, order: int) -> None:
    """Twice the steps divide the error by 2 to the order. dx/dt = x · t has e^(t²/2)."""

    def error(steps: int) -> float:
        one = torch.ones(1, dtype=torch.float64)
        return float((integrate(lambda x, t: x * t, one, steps, sampler) - math.exp(-0.5)).abs())

    assert error(32) / error(64) == pytest.approx(2**order, rel=0.05)


def test_no_such_sampler() -> None:
    with pytest.raises(ConfigError, match="expected one of euler, midpoint, found 'heun'"):
        integrate(lambda x, t: x, torch.ones(1, 1, 1), steps=1, sampler="heun")


@pytest.mark.parametrize("steps", [0, 10_001, 10**8])
def test_such_numbers_of_steps_are_errors(steps: int) -> None:
    with pytest.raises(ConfigError, match=f"expected 1 to 10000, found {steps}"):
        integrate(lambda x, t: x, torch.ones(1, 1, 1), steps=steps)
