"""Engine cuda on a CUDA device: accuracy, and that a replay is the call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.engines.base import make_engine
from pi0.engines.fast.cuda.engine import FP8_CAPABILITY, CudaEngine, on_device
from pi0.inputs import random_inputs
from pi0.verify.cases import default_cases
from pi0.verify.run import verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", params=["tiny", "small", "pi05_tiny", "pi05_small"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    synthesise(folder, PRESETS[request.param], LAYOUTS["openpi"], seed=0, dtype=torch.float32)
    return folder


def make(path: Path, precision: str) -> CudaEngine:
    if precision == "fp8" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("no fp8 on this CUDA device")
    engine = make_engine(f"cuda:{precision}", open_checkpoint(path))
    assert isinstance(engine, CudaEngine)
    return engine


@pytest.mark.parametrize("precision", CudaEngine.capabilities.precisions)
@pytest.mark.parametrize("mode", ["chained", "isolated"])
def test_agrees_with_the_reference(path: Path, precision: str, mode: str) -> None:
    """Within the limits of `pi0.verify.thresholds`, which say why."""
    opened = open_checkpoint(path)
    result = verify(
        lambda: make_engine("reference", opened),
        lambda: make(path, precision),
        default_cases(opened.config, cameras=3, tokens=40),
        precisions=("float32", precision),
        mode=mode,
        layers=True,
        steps=4,
    )
    assert result.first_failure is None


@pytest.mark.parametrize("precision", CudaEngine.capabilities.precisions)
def test_replays_are_the_call(path: Path, precision: str) -> None:
    """Bit for bit: the same kernels in the same order. Two shapes take turns, with a graph each."""
    engine = make(path, precision)
    calls = [random_inputs(engine.config, cameras, 20, cameras) for cameras in (2, 1)]
    first = [engine.sample(*call) for call in calls]
    graphs = list(engine.graphs.kept.values())
    for _ in range(3):
        assert all(map(torch.equal, first, [engine.sample(*call) for call in calls]))
    assert list(engine.graphs.kept.values()) == graphs
    assert all(graph.captured is not None for graph in graphs)
    for graph, actions in zip(graphs, first, strict=True):
        graph.actions.zero_()
        with torch.inference_mode(), on_device(engine.device):
            graph.run()
        assert torch.equal(graph.actions.cpu(), actions)


def test_engines_agree_bit_for_bit(path: Path) -> None:
    """Two engines, one after the other, give the same actions."""
    call = random_inputs(make(path, "bfloat16").config, 2, 20, 0)
    a, b = (make(path, "bfloat16").sample(*call) for _ in range(2))
    assert torch.equal(a, b)


def test_triton_is_used(path: Path) -> None:
    assert make(path, "bfloat16").notes == []
