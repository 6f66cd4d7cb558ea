"""On a card or on Tenstorrent's simulator: the same network, for real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import make_engine
from pi0.engines.tenstorrent.ttnn_import import has_device
from pi0.inputs import random_inputs
from pi0.verify.cases import default_cases
from pi0.verify.run import verify

pytestmark = [
    pytest.mark.tt_device,
    pytest.mark.skipif(
        not has_device(), reason="no Tenstorrent card (/dev/tenstorrent) or TT_METAL_SIMULATOR"
    ),
]


@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("mode", ["chained", "isolated"])
def test_agrees_with_the_reference(either_path: Path, precision: str, mode: str) -> None:
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


def test_replays_are_the_call(either_path: Path) -> None:
    """The first call builds, the second captures, the third replays: all give the same bits, and
    another observation gives others."""
    engine = make_engine("ttnn", open_checkpoint(either_path))
    inputs, noise = random_inputs(engine.config, 2, 10, 0)
    first, second, third = (engine.sample(inputs, noise) for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    other, _ = random_inputs(engine.config, 2, 10, 1)
    assert not torch.equal(engine.sample(other, noise), first)
