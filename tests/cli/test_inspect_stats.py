"""`pi0 inspect --stats`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from test_cli import pi0, refused

from pi0.checkpoint.contents import read_contents, total_hash
from pi0.checkpoint.load import open_checkpoint


def test_stats(tiny_path: Path) -> None:
    expected = total_hash(read_contents(open_checkpoint(tiny_path)))
    shown = pi0("inspect", tiny_path, "--stats").stdout
    assert f"hash of all: {expected}" in shown
    assert "vlm.blocks.1.q_proj.weight" in shown
    data = json.loads(pi0("inspect", tiny_path, "--stats", "--json").stdout)["contents"]
    assert data["hash"] == expected
    assert data["tensors"]["action_out_proj.weight"]["shape"] == [32, 32]
    assert "contents" not in json.loads(pi0("inspect", tiny_path, "--json").stdout)


def test_weights_that_are_not_finite(tiny_path: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_path, tmp_path / "ckpt") / "model.safetensors"
    save_file(load_file(path) | {"action_in_proj.bias": torch.full((32,), math.nan)}, path)
    assert "action_in_proj.bias: expected finite weights" in refused("inspect", path, "--stats")
