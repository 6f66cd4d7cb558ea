"""Outliers evened out between a norm and its matrices: exact, only where there are any, a gain.

"Displacement error" is ‖a − a_ref‖ / ‖a_ref − noise‖ (`displacement_error`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.checkpoint.synth import FLAT, synthesise
from pi0.cli.main import app
from pi0.config import PRESETS
from pi0.engines.base import make_engine
from pi0.engines.fast import weight_cache
from pi0.engines.fast.cpu.int8 import Int8Kernels
from pi0.engines.fast.equalise import GAIN, equaliser, expected_error, find_equalisers
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import make_token_plan
from pi0.engines.fast.weight_cache import load_weights
from pi0.engines.fast.weights import Scheme, norm_before, pack
from pi0.inputs import random_inputs
from pi0.verify.compare import displacement_error

INT8 = Scheme(torch.float32, {".*": torch.int8})
FLOAT = Scheme(torch.float32)
LIMIT = 0.03  # displacement error
SIZES = st.lists(st.tuples(*[st.floats(0.03, 300)] * 2), min_size=1, max_size=40)

pytestmark = pytest.mark.filterwarnings("ignore:engine cpu. slower")


@pytest.fixture(scope="module", params=["small", "pi05_small"])
def outliers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("outliers")
    config, layout = PRESETS[request.param], LAYOUTS["openpi"]
    statistics = replace(FLAT, outliers=30)
    synthesise(folder, config, layout, seed=0, dtype=torch.bfloat16, statistics=statistics)
    return open_checkpoint(folder)


@torch.inference_mode()
def actions(checkpoint: Checkpoint, scales: Mapping[str, Tensor]) -> Tensor:
    """In float32, with plain kernels."""
    weights = pack(checkpoint, FLOAT, scales=scales)
    network = Network(weights, Kernels())
    config = network.config
    inputs, noise = random_inputs(config, 2, 6, 0)
    plan = make_token_plan(inputs, config.vision.num_patches, config.suffix_len)
    return network.denoise(noise, network.step_times(3), network.prefill(inputs, plan))


@given(SIZES)
def test_the_expected_error_does_not_grow(sizes: list[tuple[float, float]]) -> None:
    a, w = torch.tensor(sizes, dtype=torch.float64).square().t()
    found = equaliser(a, w)
    assert found.after <= found.before * (1 + 1e-6)
    assert found.before == expected_error(a, w)


@given(st.integers(64, 2048), st.floats(0, 0.2), st.integers(0, 1000))
def test_ordinary_norms_stay_as_they_are(width: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = (1 + spread * torch.randn(width, generator=generator)).square()
    w = torch.randn(256, width, generator=generator).square().mean(0)
    found = equaliser(a, w)
    assert found.before < GAIN * found.after


@given(st.integers(128, 2048), st.floats(20, 100), st.integers(0, 1000))
def test_outliers_are_found(width: int, factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = (1 + 0.1 * torch.randn(width, generator=generator)).square()
    a[::100] *= factor**2
    found = equaliser(a, torch.ones(width))
    assert found.before > GAIN * found.after
    assert 0.5 * factor < found.largest < 2 * factor


def test_channels_without_any_weight() -> None:
    """Neither a norm's channel nor a column of zeros makes a scale that is not finite."""
    a, w = torch.ones(16), torch.ones(16)
    a[3], w[5], a[7], w[7] = 0, 0, 0, 0
    scale = equaliser(a, w).scale
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_scales_change_nothing_in_float32(each_path: Path) -> None:
    """Whatever they are, of every norm of every trunk; but for rounding."""
    checkpoint = open_checkpoint(each_path)
    widths = {"vision_tower": 48, "vlm": 64, "expert": 32}
    generator = torch.Generator().manual_seed(0)
    scales = {
        norm: torch.rand(widths[norm.split(".")[0]], generator=generator) * 4 + 0.1
        for norm in sorted({norm_before(name) or "" for name in checkpoint.names.ours.values()})
        if norm
    }
    assert len(scales) == 2 * (2 + 2 + 2)
    expected = actions(checkpoint, {})
    assert (actions(checkpoint, scales) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_without_outliers_bits_are_those_of_before(each_path: Path) -> None:
    checkpoint = open_checkpoint(each_path)
    assert not find_equalisers(checkpoint, INT8)
    before = pack(checkpoint, INT8).state()
    now = load_weights(checkpoint, INT8, Int8Kernels()).state()
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_float32_has_nothing_to_even_out(outliers: Checkpoint) -> None:
    assert not find_equalisers(outliers, FLOAT)
    towers = find_equalisers(outliers, Scheme(torch.float32, {"vlm.*": torch.int8}))
    assert {norm.split(".")[0] for norm in towers} == {"vlm"}


def test_displacement_stays_within_its_limit(
    outliers: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = outliers.config
    # The VLM's last layer has one reader less: nothing reads its MLP.
    count = 2 * (config.vision.depth + config.vlm.depth + config.expert.depth) - 1
    assert len(find_equalisers(outliers, INT8)) == count
    inputs, noise = random_inputs(config, 2, 9, 0)
    expected = make_engine("cpu", outliers).sample(inputs, noise)

    def error() -> float:
        found = make_engine("cpu:int8", outliers).sample(inputs, noise)
        return displacement_error(expected, found, noise)

    now = error()
    monkeypatch.setattr(weight_cache, "find_equalisers", lambda *_: {})
    assert now < LIMIT
    assert now < 0.8 * error()


def test_a_kept_file_has_them(outliers: Checkpoint) -> None:
    inputs, noise = random_inputs(outliers.config, 1, 9, 0)
    plain, packing, mapped = (
        make_engine("cpu:int8", outliers, weight_cache=cache).sample(inputs, noise, 2)
        for cache in (False, True, True)
    )
    assert torch.equal(plain, packing)
    assert torch.equal(plain, mapped)


def test_inspect_says_so(outliers: Checkpoint, tiny_path: Path) -> None:
    def inspect(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["inspect", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    norms = json.loads(inspect(str(outliers.path), "--json"))["int8"]["equalised"]
    assert norms.keys() == find_equalisers(outliers, INT8).keys()
    for norm in norms.values():
        assert norm["expected_error"][1] < norm["expected_error"][0]
    assert f"outliers in {len(norms)} norms" in inspect(str(outliers.path))
    assert "cpu:int8: no outliers" in inspect(str(tiny_path))
