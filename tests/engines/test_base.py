"""Making engines, and what their base class promises."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.exc

import pi0
from pi0.checkpoint.load import open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import Engine, EngineOptions, make_engine
from pi0.engines.fastest import fastest_engine
from pi0.engines.reference import ReferenceEngine
from pi0.engines.registry import find_engine
from pi0.errors import ConfigError, EngineError
from pi0.inputs import random_inputs
from pi0.model.flow import integrate


def test_a_device_that_is_not_there_is_said_before_the_work() -> None:
    def check(name: str, device: str) -> None:
        find_engine(name).check_available(PRESETS["tiny"], EngineOptions("float32", device))

    with pytest.raises(EngineError, match="expected cpu for engine cpu, found 'cuda'"):
        check("cpu", "cuda")
    with pytest.raises(EngineError, match="expected cuda or cuda:N for engine cuda"):
        check("cuda", "cpu")


def make(path: Path, spec: str = "reference") -> Engine:
    return make_engine(spec, open_checkpoint(path))


def test_what_an_engine_is(tiny_path: Path) -> None:
    info = make(tiny_path, "reference:bfloat16").info
    assert info == {
        "name": "reference",
        "precision": "bfloat16",
        "device": "cpu",
        "implementation": f"pi0 {pi0.__version__}",
        "torch": torch.__version__,
        "notes": [],
    }


@pytest.mark.parametrize("spec", ["reference", "cpu"])
def test_close(tiny_path: Path, spec: str) -> None:
    with make(tiny_path, spec) as engine:
        inputs, noise = random_inputs(engine.config, 1, 8, 0)
        cache = engine.prefill(inputs)
        engine.sample(inputs, noise, 1)
    engine.close()
    sentence = f"engine {spec}: expected an open engine, found it closed."
    with pytest.raises(EngineError, match=sentence):
        engine.sample(inputs, noise, 1)
    with pytest.raises(EngineError, match=sentence):
        engine.prefill(inputs)
    with pytest.raises(EngineError, match=sentence):
        engine.velocity(noise, torch.ones(1), cache)


@pytest.mark.parametrize("spec", ["reference", "cpu", "cpu:int8"])
@pytest.mark.filterwarnings("ignore:engine cpu. slower")
def test_midpoint(tiny_path: Path, spec: str) -> None:
    """Every engine takes the steps that the sampler takes with its velocities."""
    with make(tiny_path, spec) as engine:
        inputs, noise = random_inputs(engine.config, 1, 8, 0)
        steps: list[int] = []
        actions = engine.sample(inputs, noise, 3, lambda: steps.append(1), None, "midpoint")
        cache = engine.prefill(inputs)
        expected = integrate(lambda x, t: engine.velocity(x, t, cache), noise, 3, "midpoint")
        assert torch.equal(actions, expected)
        assert not torch.equal(actions, engine.sample(inputs, noise, 3))
        assert len(steps) == 3
        with pytest.raises(ConfigError, match="sampler: expected one of euler, midpoint"):
            engine.sample(inputs, noise, 3, sampler="rk4")


class OneAtATime(ReferenceEngine):
    """Counts the calls that run at the same time."""

    running = most = 0

    def _sample(self, inputs: Any, noise: Any, steps: int, on_step: Any) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.01)
        self.running -= 1
        return noise


def test_threads_wait_for_each_other(tiny_path: Path) -> None:
    engine = OneAtATime(open_checkpoint(tiny_path), EngineOptions("float32"))
    inputs, noise = random_inputs(engine.config, 1, 8, 0)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: engine.sample(inputs, noise + i), range(16)))
    assert engine.most == 1
    assert all(torch.equal(answer, noise + i) for i, answer in enumerate(answers))


def test_close_waits_for_a_call(tiny_path: Path) -> None:
    engine = make(tiny_path)
    inputs, noise = random_inputs(engine.config, 1, 8, 0)
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(engine.sample, inputs, noise, 5, started.set)
        started.wait()
        engine.close()
        assert answer.result().isfinite().all()


def no_cuda(config: Any, options: EngineOptions) -> None:
    raise EngineError("device cuda: expected a CUDA device, found none.")


def test_the_fastest_engine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_engine("cuda"), "check_available", no_cuda)
    config = PRESETS["tiny"]
    spec, reason = fastest_engine(config)
    assert (spec.label, reason) == ("cpu:float32", "the fastest engine without a CUDA device")
    assert fastest_engine(config, "int8")[0].label == "cpu:int8"
    with pytest.raises(EngineError, match="precision fp8, found none: device cuda: expected a CU"):
        fastest_engine(config, "fp8")
    with pytest.raises(EngineError, match="precision float32 on device cuda, found none: "):
        fastest_engine(config, device="cuda")


@pytest.mark.parametrize(("free", "label"), [(10**9, "cuda:float32"), (10**3, "cpu:float32")])
def test_the_fastest_engine_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, free: int, label: str
) -> None:
    """A GPU whose memory the weights do not fit into is not chosen."""
    monkeypatch.setattr(find_engine("cuda"), "check_available", lambda config, options: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    assert fastest_engine(PRESETS["tiny"])[0].label == label


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's of itself
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # on Python 3.13.0 alone
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
def test_compiled_computes_the_model(tiny_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_path)
    inputs, noise = random_inputs(checkpoint.config, 2, 8, 0)
    expected = make_engine("reference", checkpoint).sample(inputs, noise, 2)
    actions = make_engine("compiled", checkpoint).sample(inputs, noise, 2)
    torch.testing.assert_close(actions, expected, atol=1e-5, rtol=0)  # fused: other roundings
    assert not torch.equal(actions, expected)  # it was compiled


def test_compiled_without_a_compiler(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_path)
    inputs, noise = random_inputs(checkpoint.config, 1, 8, 0)

    def fail(*args: object) -> None:
        raise torch._inductor.exc.InductorError(RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda part, dynamic: fail)
    with pytest.raises(EngineError, match="engine compiled: expected PyTorch to compile .* no com"):
        make_engine("compiled", checkpoint).sample(inputs, noise, 2)
