"""Moments against numpy's, and hashes that are the same in every layout."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_folder import copy_case
from safetensors.torch import load_file, save_file

from pi0.checkpoint import contents, files
from pi0.checkpoint.contents import read_contents, total_hash
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import CheckpointError

NAME = "action_out_proj.weight"


def hash_of(path: Path) -> str:
    return total_hash(read_contents(open_checkpoint(path)))


def test_numbers(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor comes in many pieces; float64 sums, so nearly numpy's."""
    monkeypatch.setattr(files, "SLAB_BYTES", 1000)
    monkeypatch.setattr(contents, "PIECE", 37)
    read: list[int] = []
    opened = open_checkpoint(tiny_path)
    found = read_contents(opened, read.append)
    assert sum(read) == opened.read_bytes
    model = load_model(opened).state_dict()
    assert list(found) == sorted(model)
    for name, value in model.items():
        x = value.double().numpy()
        assert found[name].shape == x.shape
        np.testing.assert_allclose(found[name].mean, x.mean(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found[name].std, x.std(), rtol=1e-9)
        assert found[name].max_abs == np.abs(x).max()
        assert not found[name].constant
    monkeypatch.undo()
    assert {n: c.hash for n, c in read_contents(opened).items()} == {
        n: c.hash for n, c in found.items()
    }


def test_hash_is_the_same_in_every_layout(tmp_path: Path) -> None:
    hashes = {}
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS.values():
            folder = tmp_path / f"{layout.name}-{dtype}"
            synthesise(folder, PRESETS["tiny"], layout, seed=0, dtype=dtype)
            hashes[layout.name, dtype] = hash_of(folder)
    assert len(set(hashes.values())) == 2
    assert len({hashes[name, torch.bfloat16] for name in LAYOUTS}) == 1


def test_hash_across_dtypes_is_that_of_the_values(tmp_path: Path) -> None:
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    synthesise(narrow, PRESETS["tiny"], LAYOUTS["openpi"], seed=0, dtype=torch.bfloat16)
    shutil.copytree(narrow, wide)
    tensors = load_file(wide / "model.safetensors")
    save_file({n: t.float() for n, t in tensors.items()}, wide / "model.safetensors")
    assert hash_of(narrow) == hash_of(wide)
    tensors[NAME][0, 0] += 1
    save_file(tensors, wide / "model.safetensors")
    assert hash_of(narrow) != hash_of(wide)


def test_hash_knows_shapes(tmp_path: Path, tiny_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME] = tensors[NAME].reshape(16, 64)
    save_file(tensors, folder / "model.safetensors")
    a, b = (read_contents(open_checkpoint(path))[NAME] for path in (tiny_path, folder))
    assert (a.mean, a.max_abs) == (b.mean, b.max_abs)
    assert a.hash != b.hash


def test_constant_and_not_finite(tmp_path: Path, tiny_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    tensors["action_out_proj.bias"].fill_(2)
    tensors["action_in_proj.bias"][3:5] = math.inf
    save_file(tensors, folder / "model.safetensors")
    found = read_contents(open_checkpoint(folder), check_finite=False)
    assert found["action_out_proj.bias"].constant
    assert found["action_out_proj.bias"].std == 0
    assert found["action_in_proj.bias"].not_finite == 2
    assert not found["action_in_proj.bias"].constant
    with pytest.raises(CheckpointError, match=r"action_in_proj.bias: expected finite weights"):
        hash_of(folder)


def test_adapter_is_merged(tmp_path: Path) -> None:
    adapter = copy_case(tmp_path)
    assert hash_of(adapter) != hash_of(tmp_path / "base")
    assert read_contents(open_checkpoint(adapter))[NAME].dtype == "float32"
