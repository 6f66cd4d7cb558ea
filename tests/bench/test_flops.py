"""The arithmetic, beside figures that were worked out by hand from the published sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pi0.bench.flops import needed, published
from pi0.checkpoint.load import empty_model
from pi0.config import PRESETS, Pi0Config
from pi0.inputs import random_inputs

FULL = PRESETS["pi0_base"]
ROUNDING = 3e-3  # the figures have three or four digits


@pytest.mark.parametrize(
    ("cameras", "vision", "language", "linears", "attention", "step", "total"),
    [
        (2, 440e9, 2266e9, 2220e9, 46.2e9, 36.7e9, 3073e9),
        (3, 661e9, 3333e9, 3234e9, 98.2e9, 38.6e9, 4379e9),
    ],
)
def test_published(
    cameras: int,
    vision: float,
    language: float,
    linears: float,
    attention: float,
    step: float,
    total: float,
) -> None:
    count = published(FULL, cameras, tokens=48)
    assert count.vision.flop == pytest.approx(vision, rel=ROUNDING)
    assert count.language.flop == pytest.approx(language, rel=ROUNDING)
    assert count.language.linears == pytest.approx(linears, rel=ROUNDING)
    assert count.language.attention == pytest.approx(attention, rel=ROUNDING)
    assert count.step.flop == pytest.approx(step, rel=ROUNDING)
    assert count.total(10).flop == pytest.approx(total, rel=ROUNDING)


def test_parts_of_vision() -> None:
    """An image: linears 210.5 with patches 0.35 and projector 1.2, attention 8.2 GFLOP."""
    vision = published(FULL, cameras=1, tokens=0).vision
    assert vision.linears == pytest.approx(212.05e9, rel=ROUNDING)
    assert vision.attention == pytest.approx(8.15e9, rel=ROUNDING)


def test_weights() -> None:
    """Parameters in matrices: vision 414 M, Gemma's layers 1982 M, the expert's 311 M."""
    count = published(FULL, cameras=2, tokens=48)
    assert count.vision.weights == pytest.approx(414e6, rel=ROUNDING)
    assert count.language.weights == pytest.approx(1982e6, rel=ROUNDING)
    assert count.step.weights == pytest.approx(311e6 + 3.2e6, rel=ROUNDING)


@pytest.mark.parametrize(("cameras", "total"), [(2, 2948e9), (3, 4196e9)])
def test_last_layer_of_the_language_model(cameras: int, total: float) -> None:
    """Of it only keys and values are needed; the state token's nine rows are 0.2 % more."""
    count = needed(FULL, cameras, tokens=48)
    saved_rows = published(FULL, cameras, 48).step.flop / 51 * 9
    assert count.total(10).flop + saved_rows == pytest.approx(total, rel=ROUNDING)


@pytest.mark.parametrize("preset", ["tiny", "pi05_tiny"])
def test_is_what_the_model_computes(preset: str) -> None:
    """torch counts the same when the plain model runs, here on shapes alone."""
    config = PRESETS[preset]
    model = empty_model(config, torch.float32)
    inputs, noise = random_inputs(config, cameras=2, tokens=7, seed=0)
    count = published(config, cameras=2, tokens=7)
    meta = torch.device("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model.prefill(inputs.to(meta))
    assert counter.get_total_flops() == count.prefill.flop
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.velocity(noise.to(meta), torch.ones(1, device="meta"), cache)
    assert counter.get_total_flops() == count.step.flop


@given(
    st.sampled_from([FULL, PRESETS["pi05_base"]]),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_needed_is_less(
    config: Pi0Config, cameras: int, masked: int, valid: int, padding: int
) -> None:
    whole = published(config, cameras + masked, valid + padding)
    least = needed(config, cameras, valid)
    for part in ("vision", "prefill", "step"):
        assert getattr(least, part).flop <= getattr(whole, part).flop
    assert least.total(10).flop < whole.total(10).flop


def test_batch() -> None:
    one, four = (needed(FULL, 3, 9, batch) for batch in (1, 4))
    assert four.total(10).flop == 4 * one.total(10).flop
    assert four.total(10).weights == one.total(10).weights
