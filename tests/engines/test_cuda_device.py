"""Engine cuda on a CUDA device: accuracy, and that a replay is the call."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from cuda_replays import require_replays

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.engines.base import make_engine
from pi0.engines.fast.cuda.engine import FP8_CAPABILITY, CudaEngine
from pi0.engines.fast.cuda.graph import LIMIT
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
        mode=mode,
        layers=True,
        steps=4,
    )
    assert result.first_failure is None


@pytest.mark.parametrize("precision", CudaEngine.capabilities.precisions)
def test_replays_are_the_call(path: Path, precision: str) -> None:
    engine = make(path, precision)
    require_replays(engine)
    assert all(graph.captured is not None for graph in engine.graphs.kept.values())


def test_graphs_that_go_leave_the_others(path: Path) -> None:
    """Numbers stay as they are while graphs come and go, with their workspaces."""
    engine = make(path, "bfloat16")
    calls = [random_inputs(engine.config, 1 + i % 3, 20, i) for i in range(2)]
    first = [engine.sample(*call) for call in calls]
    for steps in range(1, 2 * LIMIT):
        engine.sample(*calls[0], steps=steps)
        assert all(map(torch.equal, first, [engine.sample(*call) for call in calls]))


def test_another_thread_allocates_during_a_capture(path: Path) -> None:
    """As one does that fetches images."""
    engine, done = make(path, "bfloat16"), threading.Event()

    def allocate() -> None:
        while not done.is_set():
            torch.empty(torch.randint(1, 1 << 24, (1,)).item(), device=engine.device)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for steps in range(1, 4):
            engine.sample(*random_inputs(engine.config, 2, 20, 0), steps=steps)
    finally:
        done.set()
        thread.join()


def test_parts_are_timed(path: Path) -> None:
    engine = make(path, "bfloat16")
    inputs, noise = random_inputs(engine.config, 2, 20, 0)
    prefill, vision, step = engine.time_parts(inputs, noise, 10)
    assert 0 < vision < prefill
    assert step > 0


def test_engines_agree_bit_for_bit(path: Path) -> None:
    """Two engines, one after the other, give the same actions."""
    call = random_inputs(make(path, "bfloat16").config, 2, 20, 0)
    a, b = (make(path, "bfloat16").sample(*call) for _ in range(2))
    assert torch.equal(a, b)


def test_triton_is_used(path: Path) -> None:
    assert make(path, "bfloat16").notes == []
