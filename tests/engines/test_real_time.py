"""Engine cpu in a control loop: one observation after another."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import numpy as np
import pytest

from pi0 import Policy, make_engine, open_checkpoint
from pi0.inputs import random_inputs


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.filterwarnings("ignore:engine cpu. slower")
def test_one_image(tiny_path: Path, dtype: str) -> None:
    """Of a single image torch's convolution leaves another order in memory than of several."""
    checkpoint = open_checkpoint(tiny_path)
    inputs, noise = random_inputs(checkpoint.config, 1, 16, 0)
    expected = make_engine("reference", checkpoint).sample(inputs, noise, 2)
    actions = make_engine(f"cpu:{dtype}", checkpoint).sample(inputs, noise, 2)
    # Eight bits are good for about two digits; float32 differs in the order of sums.
    error = (actions - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == "int8" else 1e-5)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("calls", [1000, pytest.param(10_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.filterwarnings("ignore:engine cpu. slower")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow(tiny_path: Path, dtype: str, calls: int) -> None:
    policy = Policy.from_checkpoint(tiny_path, robot="generic", engine="cpu", dtype=dtype, steps=1)
    # Pictures change from call to call: the engine keeps the prefix of the last.
    observations = [
        {
            "images": {"base": np.full((28, 28, 3), i, np.uint8)},
            "state": np.zeros(8),
            "prompt": "pick up the cube",
        }
        for i in range(2)
    ]
    for i in range(200):
        policy.infer(observations[i % 2])
    gc.collect()
    objects, resident = len(gc.get_objects()), resident_bytes()
    for i in range(calls):
        policy.infer(observations[i % 2])
    gc.collect()
    # Not one object in a hundred calls. The allocators take a megabyte now and then, however many
    # calls there are; the pixels of a call, kept by mistake, would be 9 MB in a thousand.
    assert len(gc.get_objects()) - objects < calls / 100
    assert resident_bytes() - resident < 4 << 20
