"""Checkpoints that many tests read, synthesised once a run."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.model import Pi0

# A shell that runs tests in the background ignores SIGINT, which processes would inherit.
with contextlib.suppress(ValueError):  # not in the main thread
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("shared machine", deadline=None)  # timings are no test's business
settings.load_profile("shared machine")
torch.set_num_threads(1)  # the tests run in several processes


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny preset in float32, layout openpi. Read only: copy it to damage it."""
    folder = tmp_path_factory.mktemp("tiny")
    synthesise(folder, PRESETS["tiny"], LAYOUTS["openpi"], seed=0, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def pi05_tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of π0.5, whose inputs are alike."""
    folder = tmp_path_factory.mktemp("pi05_tiny")
    synthesise(folder, PRESETS["pi05_tiny"], LAYOUTS["openpi"], seed=0, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session", params=["tiny", "pi05_tiny"])
def each_path(request: pytest.FixtureRequest) -> Path:
    """`tiny_path`, then `pi05_tiny_path`."""
    path: Path = request.getfixturevalue(f"{request.param}_path")
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Pi0:
    """The tiny model in float32."""
    return load_model(open_checkpoint(tiny_path))
