"""Synthesised checkpoints: deterministic, whatever the layout, and of a sane scale."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.report import report
from pi0.checkpoint.synth import FLAT, byte_tokenizer, random_tensor, synthesise, tensor_list
from pi0.config import PRESETS
from pi0.inputs import random_inputs


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesise(tmp_path / name, PRESETS["tiny"], LAYOUTS["openpi"], seed, torch.bfloat16)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_safetensors_itself_reads_it(tiny_path: Path) -> None:
    tensors = load_file(tiny_path / "model.safetensors")
    assert len(tensors) == 89
    assert all(value.dtype == torch.float32 for value in tensors.values())


@pytest.mark.parametrize("outliers", [1.0, 30.0])
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_activations_keep_their_scale(preset: str, outliers: float, tmp_path: Path) -> None:
    """The residual stream neither dies nor explodes from block to block."""
    statistics = replace(FLAT, outliers=outliers)
    synthesise(
        tmp_path, PRESETS[preset], LAYOUTS["openpi"], 0, torch.float32, statistics=statistics
    )
    model = load_model(open_checkpoint(tmp_path))
    scales: dict[str, float] = {}

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.is_floating_point():
            scales[name] = float(value.std())
        return value

    inputs, noise = random_inputs(model.config, cameras=2, tokens=8, seed=0)
    with torch.no_grad():
        model(inputs, noise, torch.tensor([1.0]), tap)
    assert sum(re.search(r"block\.\d+$", name) is not None for name in scales) == sum(
        tower.depth for tower in (model.config.vision, model.config.vlm, model.config.expert)
    )
    assert all(0.1 < scale < 10 for scale in scales.values()), scales


@pytest.mark.parametrize("preset", ["tiny", "pi05_tiny"])
def test_outliers(preset: str) -> None:
    """Every hundredth channel of what a norm multiplies with is so many times as large; its readers
    are smaller as a whole; everything else is as it was."""
    config = PRESETS[preset]
    for theirs, (ours, shape) in tensor_list(config, LAYOUTS["openpi"]).items():
        plain, with_outliers = (
            random_tensor(ours, shape, config, 0, replace(FLAT, outliers=f)) for f in (1, 30)
        )
        conditioned = ".dense." in ours
        if ".blocks." in ours and "norm" in ours and (conditioned or ours.endswith("weight")):
            # SigLIP's weights are the scale, Gemma's are added to 1; a conditioned norm's scale is
            # the first third of its layer's outputs.
            one = 0 if "vision" in ours or ours.endswith("dense.weight") else 1
            expected = plain.clone()
            scale = expected.chunk(3)[0] if conditioned else expected
            scale[::100] = (scale[::100] + one) * 30 - one
            assert torch.allclose(with_outliers, expected), theirs
        elif re.search(r"blocks.*(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)\.weight", ours):
            width = shape[1]
            sizes = [30 if i % 100 == 0 else 1 for i in range(width)]
            rms = (sum(size**2 for size in sizes) / width) ** 0.5
            assert torch.allclose(with_outliers * rms, plain), theirs
        else:
            assert torch.equal(with_outliers, plain), theirs


def test_byte_tokenizer() -> None:
    ids = byte_tokenizer().encode("aé\n", add_special_tokens=False).ids
    assert ids == [4 + byte for byte in "aé\n".encode()]


def test_report(tiny_path: Path) -> None:
    data = report(open_checkpoint(tiny_path), cameras=2, tokens=32, image_size=56)
    assert data["tensors"] == 89
    assert data["layout"] == "openpi"
    assert sum(row["tensors"] for row in data["modules"]) == 89
    assert data["sequence"]["prefix"] == 2 * 16 + 32
    assert data["sequence"]["total"] == 64 + 51
    weights = {row["dtype"]: row["weights"] for row in data["memory"]}
    model = load_model(open_checkpoint(tiny_path), image_size=56)
    assert weights["float32"] == sum(p.nbytes for p in model.parameters())


def test_report_says_that_embeddings_differ(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.bfloat16)
    said = report(open_checkpoint(tmp_path), 1, 8, 28)["embedding"]
    assert "embed_tokens.weight; not from" in said
    assert "the same" in said
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.paligemma_with_expert.paligemma.lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert "DIFFERS" in report(open_checkpoint(tmp_path), 1, 8, 28)["embedding"]
