"""Engine cpu in a control loop: one observation after another."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi0 import make_engine, open_checkpoint
from pi0.inputs import random_inputs


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.filterwarnings("ignore:engine cpu. slower")
def test_one_image(tiny_path: Path, dtype: str) -> None:
    """Of a single image torch's convolution leaves another order in memory than of several."""
    checkpoint = open_checkpoint(tiny_path)
    inputs, noise = random_inputs(checkpoint.config, 1, 16, 0)
    expected = make_engine("reference", checkpoint).sample(inputs, noise, 2)
    actions = make_engine("cpu", checkpoint, dtype=dtype).sample(inputs, noise, 2)
    # Eight bits are good for about two digits; float32 differs in the order of sums.
    error = (actions - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == "int8" else 1e-5)
