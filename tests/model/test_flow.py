"""Time embedding and Euler's method, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

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


def test_euler_times_and_sign() -> None:
    """A constant velocity is followed exactly; times run from 1 down to 1/steps."""
    times = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t.tolist())
        return torch.full_like(x, 2.0)

    out = integrate(velocity, torch.ones(2, 3, 4), steps=10)
    torch.testing.assert_close(out, torch.full((2, 3, 4), -1.0))
    assert times == [pytest.approx([1 - i / 10] * 2) for i in range(10)]


def test_no_steps_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        integrate(lambda x, t: x, torch.ones(1, 1, 1), steps=0)
