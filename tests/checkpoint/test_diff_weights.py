"""Tensors of two checkpoints: every layout and dtype, and what differs."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pi0.checkpoint import files
from pi0.checkpoint.diff import WeightsDiff, _pieces, diff_weights
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import CheckpointError

NAME = "action_out_proj.weight"


def diff(a: Path, b: Path, tolerance: float = 0) -> WeightsDiff:
    read: list[int] = []
    left, right = open_checkpoint(a), open_checkpoint(b)
    result = diff_weights(left, right, tolerance, read.append)
    if not any(d.rel_l2 is None for d in result.differences):
        assert sum(read) == left.read_bytes + right.read_bytes
    return result


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


def change(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(load_file(path) | named, path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_in_every_layout_and_dtype(
    layout: str, dtype: torch.dtype, tiny_path: Path, tmp_path: Path
) -> None:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS[layout], seed=0, dtype=dtype)
    for a, b in ((tiny_path, tmp_path), (tmp_path, tiny_path)):
        result = diff(a, b)
        assert not result.differences
        assert result.compared == 88
        assert result.rounded == ({} if dtype == torch.float32 else {"bfloat16": 88})


def test_slabs_of_different_lengths(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], seed=1, dtype=torch.bfloat16)
    whole = diff(tiny_path, tmp_path)
    monkeypatch.setattr(files, "SLAB_BYTES", 1000)
    parts = diff(tiny_path, tmp_path)
    assert [d.name for d in parts.differences] == [d.name for d in whole.differences]
    assert parts.differences[0].rel_l2 == pytest.approx(whole.differences[0].rel_l2)


def test_numbers(tiny_path: Path, folder: Path) -> None:
    a = load_file(tiny_path / "model.safetensors")[NAME].double()
    b = a.float() + 0.01 * torch.randn(a.shape)
    change(folder, action_out_proj__weight=b)
    (found,) = diff(tiny_path, folder).differences
    assert (found.name, found.what) == (NAME, "values")
    d = b.double() - a
    assert found.rel_l2 == pytest.approx(float(d.norm() / a.norm()), rel=1e-9)
    assert found.max_abs == pytest.approx(float(d.abs().max()), rel=1e-9)
    pcc = np.corrcoef(a.flatten(), b.double().flatten())[0, 1]
    assert found.pcc == pytest.approx(pcc, rel=1e-9)
    assert found.rel_l2 is not None
    within = diff(tiny_path, folder, tolerance=found.rel_l2)
    assert diff(tiny_path, folder, tolerance=found.rel_l2 / 2).differences == [found]
    assert (within.within, within.differences) == (1, [])


def test_one_bit(tiny_path: Path, folder: Path) -> None:
    value = load_file(folder / "model.safetensors")["action_out_proj.bias"]
    value[3] = torch.nextafter(value[3], torch.tensor(1.0))
    change(folder, action_out_proj__bias=value)
    (found,) = diff(tiny_path, folder).differences
    assert 0 < (found.rel_l2 or 0) < 1e-6


def test_constant_tensors_have_no_correlation(tiny_path: Path, folder: Path) -> None:
    change(folder, action_out_proj__bias=torch.zeros(32))
    (found,) = diff(folder, tiny_path).differences
    assert math.isnan(found.rel_l2 or 0)
    assert math.isnan(found.pcc or 0)
    assert (found.max_abs or 0) > 0


def test_shapes_and_names(tiny_path: Path, tmp_path: Path) -> None:
    synthesise(tmp_path, PRESETS["pi05_tiny"], LAYOUTS["openpi"], seed=0, dtype=torch.float32)
    found = {d.name: d.what for d in diff(tiny_path, tmp_path).differences}
    assert found["state_proj.weight"] == "only in A"
    assert found["time_mlp_in.weight"] == "only in B"
    assert "vlm.blocks.0.q_proj.weight" not in found
    change(tmp_path, action_out_proj__bias=torch.zeros(31))
    found = {d.name: d.what for d in diff(tiny_path, tmp_path).differences}
    assert found["action_out_proj.bias"] == "shape [32] and [31]"


def test_values_that_are_not_finite(tiny_path: Path, folder: Path) -> None:
    change(folder, action_out_proj__bias=torch.full((32,), math.nan))
    with pytest.raises(CheckpointError, match=r"action_out_proj.bias: expected finite weights"):
        diff(tiny_path, folder)


@given(st.lists(st.integers(1, 9)), st.lists(st.integers(1, 9)))
def test_pieces_meet(a: list[int], b: list[int]) -> None:
    """However two tensors of a length are cut, each element meets its own."""
    length = min(sum(a), sum(b))

    def cut(sizes: list[int]) -> list[torch.Tensor]:
        ends = np.minimum(np.cumsum([0, *sizes]), length)
        return [torch.arange(i, j) for i, j in pairwise(ends) if j > i]

    met = list(_pieces(iter(cut(a)), iter(cut(b))))
    assert all(torch.equal(x, y) for x, y in met)
    assert sum(len(x) for x, _ in met) == length
