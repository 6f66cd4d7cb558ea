"""Engines by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch._inductor.exc

from pi0.checkpoint.load import open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import EngineOptions, make_engine
from pi0.engines.registry import find_engine
from pi0.errors import EngineError
from pi0.inputs import random_inputs


def test_a_device_that_is_not_there_is_said_before_the_work() -> None:
    def check(name: str, device: str) -> None:
        find_engine(name).check_available(PRESETS["tiny"], EngineOptions("float32", device))

    with pytest.raises(EngineError, match="expected cpu for engine cpu, found 'cuda'"):
        check("cpu", "cuda")
    with pytest.raises(EngineError, match="expected cuda or cuda:N for engine cuda"):
        check("cuda", "cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's of itself
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
