"""Checkpoints for the TTNN engine's tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS, Pi0Config

BASE = PRESETS["pi0_base"]
# One block of each tower at full width.
ONE_LAYER: Pi0Config = replace(
    BASE,
    vision=replace(BASE.vision, depth=1),
    vlm=replace(BASE.vlm, depth=1),
    expert=replace(BASE.expert, depth=1),
    vocab_size=512,
)


@pytest.fixture(scope="session")
def one_layer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one full-width block of each tower in bfloat16."""
    folder = tmp_path_factory.mktemp("one_layer")
    synthesise(folder, ONE_LAYER, LAYOUTS["openpi"], seed=0, dtype=torch.bfloat16)
    return folder
