"""The dtype policy: what is float32 in a bfloat16 model, and how far the two are apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.dtypes import parse_dtype
from pi0.errors import ConfigError
from pi0.inputs import random_inputs
from pi0.model import Pi0
from pi0.model.gemma import Rope

FLOAT32 = ("norm", "patch_embedding", "state_proj", "action_")


@pytest.fixture(scope="module")
def bfloat16(tiny_path: Path) -> Pi0:
    return load_model(open_checkpoint(tiny_path), torch.bfloat16)


def test_which_parameters_stay_float32(bfloat16: Pi0) -> None:
    for name, parameter in bfloat16.named_parameters():
        kept = any(word in name for word in FLOAT32)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_bfloat16_is_close(tiny: Pi0, bfloat16: Pi0) -> None:
    """bfloat16 has 8 bits: 2 % of the scale after 10 steps is what rounding alone gives here."""
    inputs, noise = random_inputs(tiny.config, cameras=2, tokens=8, seed=0)
    exact = tiny.sample_actions(inputs, noise)
    rounded = bfloat16.sample_actions(inputs, noise)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() / exact.norm() < 0.02


def test_trunks_compute_in_bfloat16(bfloat16: Pi0) -> None:
    dtypes = {}

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        dtypes[name] = value.dtype
        return value

    inputs, noise = random_inputs(bfloat16.config, cameras=1, tokens=8, seed=0)
    with torch.no_grad():
        bfloat16(inputs, noise, torch.tensor([1.0]), tap)
    trunk = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert trunk >= {"vision_tower", "projector", "prefix", "suffix", "vlm_transformer.block.1"}
    assert dtypes["action_projection"] == torch.float32


def test_rotary_table_is_float32() -> None:
    """At position 800 a frequency rounded to bfloat16 is off by more than a radian."""
    x = torch.ones(1, 1, 1, 256, dtype=torch.bfloat16)
    positions = torch.tensor([[800]])
    got = Rope()(x, positions).float()
    expected = Rope()(x.float(), positions)
    torch.testing.assert_close(got, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("name", ["float16", "int8", "fp32"])
def test_other_dtypes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"float16: π0's activations|expected one of float32"):
        parse_dtype(name)
