"""What a checkpoint does not declare, and statistics that older files hold among the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pi0.checkpoint import infer
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.report import report
from pi0.config import PRESETS
from pi0.errors import CheckpointError, ConfigError

BUFFERS = {
    "normalize_inputs.buffer_observation_state.mean": torch.arange(6.0),
    "normalize_inputs.buffer_observation_state.std": torch.ones(6),
    "normalize_targets.buffer_action.mean": torch.zeros(7),
    "normalize_targets.buffer_action.std": torch.full((7,), 0.5),
    "unnormalize_outputs.buffer_action.mean": torch.zeros(7),
    "unnormalize_outputs.buffer_action.std": torch.full((7,), 0.5),
    "normalize_inputs.buffer_observation_images_top_left.mean": torch.zeros(3, 1, 1),
}


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy to do as one likes with."""
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


def undeclare(folder: Path, *names: str) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in names}))


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path)


def test_nothing_to_say_of_what_is_declared(tiny_path: Path) -> None:
    assert open_checkpoint(tiny_path).findings == []


def test_assumptions_are_findings(folder: Path) -> None:
    undeclare(folder, "horizon", "max_tokens")
    opened = open_checkpoint(folder)
    findings = {finding.code: finding for finding in opened.findings}
    assert list(findings) == ["horizon-assumed", "max-tokens-assumed"]
    assert findings["horizon-assumed"].sentence == (
        "horizon: neither the tensors nor config.json say how long a chunk of actions is; 50 is "
        "assumed, but fine-tunes with 10, 15 and 16 exist. Name it with --horizon N."
    )
    assert "48 is assumed" in findings["max-tokens-assumed"].sentence
    assert "--max-tokens N" in findings["max-tokens-assumed"].sentence
    assert {finding.severity for finding in opened.findings} == {"warning"}


def test_statements_replace_assumptions(folder: Path) -> None:
    undeclare(folder, "horizon", "max_tokens")
    opened = open_checkpoint(folder, horizon=10, max_tokens=180)
    assert (opened.config.horizon, opened.config.max_tokens) == (10, 180)
    assert opened.findings == []


@pytest.mark.parametrize("field", ["paligemma_variant", "action_expert_variant", "lora"])
def test_lora_that_the_weights_lack(
    folder: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openpi's converter drops it and writes the variant all the same."""
    for name in ("vlm", "expert"):
        monkeypatch.setitem(infer.VARIANTS, f"{name}_lora", getattr(PRESETS["tiny"], name))
    stated = {
        "paligemma_variant": "vlm_lora",
        "action_expert_variant": "expert_lora",
        "lora": {"alpha": 4},
    }
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {field: stated[field]}))
    assert [finding.code for finding in open_checkpoint(folder).findings] == ["lora-lost"]
    path.write_text(json.dumps(settings | {"lora": None}))
    assert open_checkpoint(folder).findings == []


def test_statements_that_contradict(folder: Path) -> None:
    assert open_checkpoint(folder, horizon=50).config.horizon == 50
    for stated, message in (
        ({"horizon": 10}, "horizon (--horizon): expected 50 as config.json says, found 10"),
        ({"max_tokens": 9}, "max_tokens (--max-tokens): expected 48 as config.json says, found 9"),
        ({"horizon": 0}, "expected a count, found 0"),
        ({"horizon": 2.5}, "expected a count, found 2.5"),
        ({"horizon": True}, "expected a count, found True"),
        ({"max_tokens": 10**30}, "expected a count, found 1000"),
    ):
        with pytest.raises(ConfigError) as error:
            open_checkpoint(folder, **stated)  # type: ignore[arg-type]
        assert message in str(error.value)


def test_settings(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapt_to_pi_aloha": True}))
    assert open_checkpoint(folder).settings["adapt_to_pi_aloha"] is True


@pytest.mark.parametrize("root", ["", "model."])
def test_statistics_among_the_weights(folder: Path, root: str, tiny: torch.nn.Module) -> None:
    """Beside weights without a root, and beside LeRobot's, which have one."""
    path = folder / "model.safetensors"
    weights = {root + name: value for name, value in load_file(path).items()}
    save_file({**weights, **BUFFERS}, path)
    opened = open_checkpoint(folder)
    assert opened.names.unexpected == []
    loaded = load_model(opened).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in tiny.state_dict().items())
    statistics = opened.statistics_buffers
    assert sorted(statistics) == [
        "action.mean",
        "action.std",
        "observation.images.top_left.mean",
        "observation.state.mean",
        "observation.state.std",
    ]
    assert statistics["observation.state.mean"].tolist() == [0, 1, 2, 3, 4, 5]
    assert {value.dtype for value in statistics.values()} == {torch.float64}
    rows = {row["module"]: row["tensors"] for row in report(opened, 1, 8, 28)["modules"]}
    assert rows["statistics"] == len(BUFFERS)


def test_no_statistics_among_the_weights(tiny_path: Path) -> None:
    assert open_checkpoint(tiny_path).statistics_buffers == {}


def test_buffers_that_were_never_filled(folder: Path) -> None:
    name = "unnormalize_outputs.buffer_action.std"
    add(folder, {**BUFFERS, name: torch.full((7,), torch.inf)})
    opened = open_checkpoint(folder)
    load_model(opened)  # the weights are as good as any
    with pytest.raises(CheckpointError) as error:
        _ = opened.statistics_buffers
    assert f"{name}: expected statistics, found infinite placeholders" in str(error.value)
    assert "lerobot/processor/migrate_policy_normalization.py" in str(error.value)


def test_buffers_that_contradict(folder: Path) -> None:
    add(folder, {**BUFFERS, "normalize_targets.buffer_action.std": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"expected the same action\.std as in"):
        _ = open_checkpoint(folder).statistics_buffers


@pytest.mark.parametrize("name", ["normalize_inputs.weight", "normalize_inputs.buffer_x.mean"])
def test_other_tensors_stay_unexpected(folder: Path, name: str) -> None:
    add(folder, {name: torch.ones(3)})
    with pytest.raises(CheckpointError, match=f"unexpected: {name}"):
        load_model(open_checkpoint(folder))
