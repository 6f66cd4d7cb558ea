"""Checkpoints for the TTNN engine's tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS, Pi0Config


@pytest.fixture(scope="session", params=["tiny", "pi05_tiny"])
def either_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny π0 in float32, then one with the tiny π0.5."""
    folder = tmp_path_factory.mktemp(request.param)
    synthesise(folder, PRESETS[request.param], LAYOUTS["openpi"], seed=0, dtype=torch.float32)
    return folder


def one_layer(base: Pi0Config) -> Pi0Config:
    """One block of each tower at full width."""
    return replace(
        base,
        vision=replace(base.vision, depth=1),
        vlm=replace(base.vlm, depth=1),
        expert=replace(base.expert, depth=1),
        vocab_size=512,
    )


@pytest.fixture(scope="session", params=["pi0_base", "pi05_base"])
def one_layer_path(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with one full-width block of each tower in bfloat16, π0's, then π0.5's."""
    folder = tmp_path_factory.mktemp(f"one_layer_{request.param}")
    config = one_layer(PRESETS[request.param])
    synthesise(folder, config, LAYOUTS["openpi"], seed=0, dtype=torch.bfloat16)
    return folder
