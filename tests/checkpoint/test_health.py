"""What is wrong with weights, each with its code and the tensor that it names."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from peft_folder import copy_case
from peft_folder import rewrite as rewrite_adapter
from torch import Tensor
from weights_file import rewrite

from pi0.checkpoint.health import header_findings, weight_findings
from pi0.checkpoint.load import open_checkpoint

GATE = "paligemma_with_expert.gemma_expert.model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


def found(path: Path) -> dict[str, tuple[str, str]]:
    opened = open_checkpoint(path)
    findings = header_findings(opened) + weight_findings(opened)
    return {f.code: (f.severity, f.sentence) for f in findings}


def test_healthy(tiny_path: Path, tmp_path: Path) -> None:
    assert not found(tiny_path)
    read: list[int] = []
    opened = open_checkpoint(tiny_path)
    weight_findings(opened, read.append)
    assert sum(read) == opened.read_bytes
    assert not found(copy_case(tmp_path))


def test_not_finite(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["action_in_proj.bias"][:3] = math.nan
        tensors[GATE][0, 0] = math.inf

    rewrite(folder, damage)
    severity, sentence = found(folder)["weights-not-finite"]
    assert severity == "error"
    assert "in action_in_proj.bias (3 values), expert.blocks.0.gate_proj.weight (1 values)." in (
        sentence
    )


def test_constant(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        for name in ("action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in"):
            tensors[f"{name}.bias"].zero_()
        tensors[GATE].fill_(0.5)

    rewrite(folder, damage)
    severity, sentence = found(folder)["weights-constant"]
    assert severity == "warning"
    assert "action_in_proj.bias (all 0), action_out_proj.bias (all 0)" in sentence
    assert "and 2 more" in sentence


def test_huge(folder: Path) -> None:
    """As after a flipped bit of an exponent, which neither safetensors nor JAX folders notice."""

    def damage(tensors: dict[str, Tensor]) -> None:
        bits = {2: torch.int16, 4: torch.int32}[tensors[GATE].element_size()]
        tensors[GATE].view(bits)[0, 0] ^= 1 << (torch.iinfo(bits).bits - 2)

    rewrite(folder, damage)
    severity, sentence = found(folder)["weights-huge"]
    assert severity == "warning"
    assert "found larger ones in expert.blocks.0.gate_proj.weight (up to" in sentence


def test_misfit_and_mixed_dtypes(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["state_proj.bias"]
        tensors[GATE] = tensors[GATE].bfloat16()

    rewrite(folder, damage)
    all_found = found(folder)
    assert set(all_found) == {"weights-unfit", "dtype-mixed"}
    assert "missing: state_proj.bias [32]" in all_found["weights-unfit"][1]
    assert all_found["dtype-mixed"][1].startswith("expert: expected its matrices in one dtype")


def test_double_precision_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({GATE: tensors[GATE].double()}))
    assert "expected BF16, F32 or F16, found F64" in found(folder)["weights-unfit"][1]


def test_adapter_that_changes_nothing(tmp_path: Path) -> None:
    adapter = copy_case(tmp_path)

    def reset(tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            tensors[name] = torch.zeros_like(value) if "lora_B" in name else value

    rewrite_adapter(adapter, reset)
    assert list(found(adapter)) == ["adapter-untrained"]


def test_the_policy_that_ships_is_healthy() -> None:
    """Norms that no action depends on are as they were before training."""
    assert weight_findings(open_checkpoint("tabletop")) == []
