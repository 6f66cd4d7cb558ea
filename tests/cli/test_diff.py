"""`pi0 diff`: what is the same, what is not, and what cannot be told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from jax_folder import copy_oracle
from peft_folder import copy_case
from safetensors.torch import load_file, save_file
from test_cli import pi0, refused

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.policy import PolicyOptions, prepare
from pi0.policy.diff import diff_policies


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_path, tmp_path / "ckpt")


def statistics(folder: Path, **values: object) -> None:
    (path,) = folder.glob("assets/*/norm_stats.json")
    content = json.loads(path.read_text())
    content["norm_stats"]["state"] |= values
    path.write_text(json.dumps(content))


def settings(a: Path, b: Path, **options: str) -> dict[str, tuple[object, object]]:
    wishes = PolicyOptions(**options)  # type: ignore[arg-type]
    found = diff_policies(*(prepare(open_checkpoint(path), wishes) for path in (a, b)))
    return {d.what: (d.a, d.b) for first in found.differences for d in (first, *first.also)}


def test_same(tiny_path: Path, folder: Path) -> None:
    done = pi0("diff", tiny_path, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the same policy: 88 tensors" in done.stdout
    data = json.loads(pi0("diff", tiny_path, folder, "--json").stdout)
    assert data["same"]
    assert data["weights"]["compared"] == 88


def test_same_in_bfloat16(tiny_path: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "b", PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.bfloat16)
    done = pi0("diff", tiny_path, tmp_path / "b")
    assert done.returncode == 0
    assert "88 tensors were rounded to bfloat16, in which one of the two is stored" in done.stdout


def test_different_weights(tiny_path: Path, folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["action_out_proj.weight"] *= 1.5
    save_file(tensors, path)
    done = pi0("diff", tiny_path, folder)
    assert done.returncode == 1
    assert "action_out_proj.weight" in done.stdout
    assert "different: 1 tensor (88 compared), 0 settings" in done.stdout
    assert pi0("diff", tiny_path, folder, "--tolerance", "0.6").returncode == 0


def test_statistics(tiny_path: Path, folder: Path) -> None:
    statistics(folder, mean=[0.0] * 7 + [0.25] + [0.0] * 24)
    assert settings(tiny_path, folder) == {"statistics.state.offset[7], the largest": (0.0, 0.25)}
    statistics(folder, mean=[0.0] * 7, std=[1.0] * 7)
    found = settings(tiny_path, folder)
    assert found["statistics.state.offset: length"] == (32, 7)
    done = pi0("diff", tiny_path, folder)
    assert done.returncode == 1
    assert "0 tensors (88 compared)" in done.stdout


def test_large_units_of_one_value_hide_no_difference_of_another(
    tiny_path: Path, folder: Path, tmp_path: Path
) -> None:
    """Such as ticks of an encoder, or a time, beside joints in radians."""
    ticks = [1e6] + [0.0] * 31
    statistics(folder, mean=ticks)
    other = shutil.copytree(folder, tmp_path / "other")
    statistics(other, mean=[1e6 + 0.5, 0.1] + [0.0] * 30)
    assert list(settings(folder, other)) == ["statistics.state.offset[1], the largest"]


def test_statistics_beyond_float32_are_the_same(tiny_path: Path, folder: Path) -> None:
    statistics(folder, std=[1.0 + 1e-12] * 32)
    assert not settings(tiny_path, folder)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", ["jax_pi0", "jax_pi05"])
def test_constants_of_openpi_and_lerobot_are_no_difference(case: str, tmp_path: Path) -> None:
    """Which they add to a spread; beside a tiny spread they count."""
    source, out = copy_oracle(case, tmp_path / "source"), tmp_path / "out"
    kind = "std" if case == "jax_pi0" else "q99"
    (path,) = source.glob("assets/*/norm_stats.json")
    content = json.loads(path.read_text())
    state = content["norm_stats"]["state"]
    state |= {"q01": [0.0] * len(state["q01"]), kind: [0.04] * len(state["std"])}
    path.write_text(json.dumps(content))
    assert pi0("convert", source, out, "--to", "lerobot").returncode == 0
    assert pi0("diff", source, out).returncode == 0
    state |= {kind: [2e-5] * len(state["std"])}
    path.write_text(json.dumps(content))
    assert pi0("convert", source, tmp_path / "flat", "--to", "lerobot").returncode == 0
    done = pi0("diff", source, tmp_path / "flat")
    assert (done.returncode, "statistics.state." in done.stdout) == (1, True)


def test_settings(tiny_path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"horizon": 10}))
    found = settings(tiny_path, folder)
    assert found == {"model.horizon": (50, 10), "n_action_steps": (50, 10)}


def test_conventions_of_lerobot(tiny_path: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "b", PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    found = settings(tiny_path, tmp_path / "b")
    assert found["resize"] == found["prompt.convention"] == ("openpi", "lerobot")
    assert found["robot.cameras"][1] == [
        f"observation.images.{name} (optional)"
        for name in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    ]


def test_one_row_for_each_cause(tiny_path: Path, tmp_path: Path) -> None:
    """With the option that makes both the same; a statistic is named once."""
    other = tmp_path / "b"
    synthesise(other, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.float32)
    path = other / "assets/synthetic/norm_stats.json"
    content = json.loads(path.read_text())
    content["norm_stats"]["actions"] |= {"mean": [0.5] * 32, "std": [2.0] * 32}
    path.write_text(json.dumps(content))
    (row,) = [r for r in pi0("diff", tiny_path, other).stdout.splitlines() if "statistics" in r]
    assert row.split("  ")[0] == "statistics.actions.offset[0], the largest"
    for words in ("0.5", "statistics.actions, statistics.targets", "--norm-stats, --norm-mode"):
        assert row.count(words) == 1
    synthesise(tmp_path / "c", PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    done = pi0("diff", tiny_path, tmp_path / "c")
    assert "different: 0 tensors (88 compared), 2 settings" in done.stdout
    assert [line.split()[-1] for line in done.stdout.splitlines() if "lerobot  " in line] == [
        "--robot",
        "--preprocessing",
    ]
    words = ("--robot", "generic", "--preprocessing", "openpi", "--norm-stats", path)
    assert pi0("diff", other, tmp_path / "c", *words).returncode == 0


def test_tokenizers(tiny_path: Path, folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["<0x41>"], vocabulary["<0x70>"] = vocabulary["<0x70>"], vocabulary["<0x41>"]
    path.write_text(json.dumps(content))
    assert list(settings(tiny_path, folder)) == ["tokenizer.ids of 'pick up the red cube'"]


def test_what_cannot_be_prepared(tiny_path: Path, folder: Path) -> None:
    """One without statistics is another policy; of two without, only the weights are known."""
    shutil.rmtree(folder / "assets")
    done = pi0("diff", tiny_path, folder)
    assert done.returncode == 1
    assert "policy  can be made  cannot be made" in done.stdout
    assert "conventions and tokenizer not compared. B: statistics:" in done.stdout
    done = pi0("diff", folder, folder)
    assert done.returncode == 0
    assert "the same weights: 88 tensors" in done.stdout
    assert "the same policy" in pi0("diff", folder, folder, "--norm-stats", "none").stdout


def test_statistics_are_compared_without_a_tokenizer(tiny_path: Path, tmp_path: Path) -> None:
    a, b = (shutil.copytree(tiny_path, tmp_path / name) for name in "ab")
    for copy in (a, b):
        (copy / "tokenizer.json").unlink()
    path = b / "assets/synthetic/norm_stats.json"
    content = json.loads(path.read_text())
    content["norm_stats"]["actions"]["std"][3] *= 1 + 1e-8  # as float32 the same
    path.write_text(json.dumps(content))
    assert pi0("diff", a, b).returncode == 0
    content["norm_stats"]["actions"]["std"][3] = 9.0
    path.write_text(json.dumps(content))
    done = pi0("diff", a, b)
    assert done.returncode == 1
    assert "statistics.actions.scale[3]" in done.stdout


def test_adapter_beside_its_merged_model(tmp_path: Path) -> None:
    adapter = copy_case(tmp_path)
    merged = shutil.copytree(tmp_path / "base", tmp_path / "merged")
    base = open_checkpoint(merged)
    model = load_model(open_checkpoint(adapter)).state_dict()
    tensors = {theirs: model[ours].clone() for theirs, ours in base.names.ours.items()}
    save_file(tensors, merged / "model.safetensors")
    shutil.move(adapter, tmp_path / "far" / "away" / "adapter")
    adapter = tmp_path / "far" / "away" / "adapter"
    words = ("diff", adapter, merged, "--base", tmp_path / "base")
    done = pi0(*words)
    assert done.returncode == 0, done.stdout
    assert json.loads(pi0(*words, "--json").stdout)["same"]
    assert pi0("diff", adapter, tmp_path / "base", "--base", tmp_path / "base").returncode == 1


def test_bad_input(tiny_path: Path, tmp_path: Path) -> None:
    assert "found nothing there" in refused("diff", tiny_path, tmp_path / "no")
    assert "expected an adapter among the two" in refused(
        "diff", tiny_path, tiny_path, "--base", tiny_path
    )
    assert "tolerance" in pi0("diff", tiny_path, tiny_path, "--tolerance", "-1").stderr
