"""`pi0 doctor`: exit codes, table and JSON."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import pi0, refused

from pi0.cli import show


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


def damage(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"action_in_proj.bias": torch.full((32,), math.nan)}, path)


def test_warnings_only(tiny_path: Path) -> None:
    done = pi0("doctor", tiny_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "robot-assumed" in done.stdout
    assert "0 errors, 3 warnings" in done.stdout


def test_nothing_found(tiny_path: Path) -> None:
    words = ("--robot", "generic", "--norm-stats", "none", "--preprocessing", "openpi")
    assert pi0("doctor", tiny_path, *words).stdout == f"{tiny_path}: 0 errors, 0 warnings\n"


def test_one_error_is_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    words = ("--robot", "generic", "--norm-stats", "none", "--preprocessing", "openpi")
    shown = pi0("doctor", folder, "--no-weights", *words).stdout
    assert f"{folder}: 1 error, 0 warnings" in shown


def test_errors_come_first(folder: Path) -> None:
    damage(folder)
    (folder / "tokenizer.json").unlink()
    done = pi0("doctor", folder, "--json")
    assert done.returncode == 1
    data = json.loads(done.stdout)
    assert (data["errors"], data["warnings"]) == (2, 1)
    assert [finding["severity"] for finding in data["findings"]] == ["error", "error", "warning"]
    found = {finding["code"] for finding in data["findings"]}
    assert found == {"tokenizer-unusable", "weights-not-finite", "robot-assumed"}


def test_no_weights(folder: Path) -> None:
    damage(folder)
    assert pi0("doctor", folder).returncode == 1
    assert pi0("doctor", folder, "--no-weights").returncode == 0


def test_config_json_of_another_model(folder: Path) -> None:
    """A finding, unless what was named on the command line may be what is wrong."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"type": "pi05"}))
    done = pi0("doctor", folder)
    assert done.returncode == 1
    assert "config-contradicts" in done.stdout
    assert "config.json" in refused("doctor", folder, "--horizon", "10")


def test_assumptions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["horizon"], config["max_tokens"]
    (folder / "config.json").write_text(json.dumps(config))
    shown = pi0("doctor", folder, "--no-weights").stdout
    assert "horizon-assumed" in shown
    assert "max-tokens-assumed" in shown
    shown = pi0("doctor", folder, "--no-weights", "--horizon", "50").stdout
    assert "horizon-assumed" not in shown


def test_bad_input(tiny_path: Path, tmp_path: Path) -> None:
    assert "found nothing there" in refused("doctor", tmp_path / "no")
    assert "at least one patch" in refused("doctor", tiny_path, "--image-size", "3")
    assert pi0("doctor", tiny_path, "--robot", "no-such").returncode == 1


def test_words_in_brackets_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show.table("", ["[/a] [b]"], [["[True, False] [red]"]])
    printed = capsys.readouterr().out
    assert "[/a] [b]" in printed
    assert "[True, False] [red]" in printed
