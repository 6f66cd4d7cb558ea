"""One engine called from many threads gives each the serial answer, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import Engine, EngineOptions, make_engine
from pi0.engines.fast.cuda import engine as cuda
from pi0.engines.fast.cuda.engine import CudaEngine
from pi0.engines.fast.cuda.fp8 import Fp8Kernels
from pi0.inputs import ModelInputs, random_inputs

THREADS, CALLS, STEPS = 8, 10, 2


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Threads take turns every few operations."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(
    params=[
        *(("tiny", name) for name in ("reference", "cpu:float32", "cpu:int8", "cuda")),
        *(("pi05_tiny", name) for name in ("cpu:int8", "cuda")),
    ],
    ids=" ".join,
)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    preset, name = request.param
    checkpoint = open_checkpoint(request.getfixturevalue(f"{preset}_path"))
    if name != "cuda":
        return make_engine(name, checkpoint)
    monkeypatch.setattr(cuda, "find_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(cuda, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "choose_kernels", lambda *_: (Fp8Kernels(), []))
    return CudaEngine(checkpoint, EngineOptions("float32"))


def calls(groups: int) -> list[tuple[ModelInputs, Tensor]]:
    """Calls of a few groups of images and prompts, each with a state and noise of its own."""
    made = []
    for i in range(THREADS * CALLS):
        inputs, _ = random_inputs(PRESETS["tiny"], 1, 4, seed=i % groups)
        other, noise = random_inputs(PRESETS["tiny"], 1, 1, seed=100 + i)
        made.append((replace(inputs, state=other.state), noise))
    return made


def in_threads(
    answer: Callable[[ModelInputs, Tensor], Tensor], work: list[tuple[ModelInputs, Tensor]]
) -> list[Tensor]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda call: answer(*call), work))


@pytest.mark.parametrize("groups", [1, 2])
def test_sampling(engine: Engine, groups: int) -> None:
    work = calls(groups)
    serial = [engine.sample(*call, STEPS) for call in work]
    assert len({tuple(actions.flatten().tolist()) for actions in serial}) == len(work)
    found = in_threads(lambda inputs, noise: engine.sample(inputs, noise, STEPS), work)
    assert [torch.equal(a, b) for a, b in zip(serial, found, strict=True)].count(False) == 0


def test_prefill_and_velocity(engine: Engine) -> None:
    def answer(inputs: ModelInputs, noise: Tensor) -> Tensor:
        cache = engine.prefill(inputs)
        return engine.velocity(noise, torch.ones(1), cache)

    work = calls(2)
    serial = [answer(*call) for call in work]
    found = in_threads(answer, work)
    assert [torch.equal(a, b) for a, b in zip(serial, found, strict=True)].count(False) == 0


def test_native_products_in_engines_of_their_own(tiny_path: Path) -> None:
    """Several engines at once, whose threads are OpenMP's."""
    checkpoint = open_checkpoint(tiny_path)
    engines = [make_engine("cpu:int8", checkpoint) for _ in range(THREADS)]
    work = calls(2)[:THREADS]
    serial = [engines[0].sample(*call, STEPS) for call in work]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(CALLS):
            found = pool.map(lambda engine, call: engine.sample(*call, STEPS), engines, work)
            assert all(torch.equal(a, b) for a, b in zip(serial, found, strict=True))
