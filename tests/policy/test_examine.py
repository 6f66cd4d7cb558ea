"""Files of another model, robot or author around a model that runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import Pi0Error
from pi0.policy import PolicyOptions, prepare
from pi0.policy.examine import placeholder_findings


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """Like openpi's: with statistics of a data set."""
    folder = shutil.copytree(tiny_path, tmp_path / "ckpt")
    write_statistics(folder, "synthetic", 32)
    return folder


def write_statistics(folder: Path, name: str, width: int, std: float = 0.5) -> None:
    shutil.rmtree(folder / "assets", ignore_errors=True)
    path = folder / "assets" / name / "norm_stats.json"
    path.parent.mkdir(parents=True)
    table = {"mean": [0.1] * width, "std": [std] * width}
    path.write_text(json.dumps({"norm_stats": {"state": table, "actions": table}}))


def codes(folder: Path, **options: Any) -> dict[str, str]:
    setup = prepare(open_checkpoint(folder), PolicyOptions(**options))
    return {finding.code: finding.sentence for finding in setup.findings}


def test_nothing_to_say(folder: Path) -> None:
    assert not codes(folder, robot="generic")
    assert list(codes(folder)) == ["robot-assumed"]


def test_placeholders(tiny_path: Path, folder: Path, tmp_path: Path) -> None:
    """Which only the doctor speaks of: they are what `pi0 synth` writes."""
    synthesise(tmp_path / "b", PRESETS["pi05_tiny"], LAYOUTS["openpi"], 0, torch.float32)

    def found(path: Path, **options: Any) -> list[str]:
        setup = prepare(open_checkpoint(path), PolicyOptions(robot="generic", **options))
        assert not setup.findings
        return [finding.code for finding in placeholder_findings(setup)]

    for path in (tiny_path, tmp_path / "b"):
        assert found(path) == ["statistics-placeholder"] * 2
    assert not found(tiny_path, norm_stats="none", preprocessing="openpi")
    assert not found(folder)


def test_statistics_of_another_robot(folder: Path) -> None:
    write_statistics(folder, "droid", 8)
    found = codes(folder, robot="libero")
    assert "--robot droid" in found["statistics-of-another-robot"]
    assert "statistics-of-another-robot" not in codes(folder, robot="droid")
    assert "statistics-of-another-robot" not in codes(folder, robot="generic")
    write_statistics(folder, "libero", 8)
    assert "statistics-of-another-robot" not in codes(folder, robot="pi05_libero")
    write_statistics(folder, "trossen", 14)
    for robot in ("aloha", "aloha_sim"):
        assert not codes(folder, robot=robot)


def test_where_one_works_tells_nothing_of_statistics(
    like_lerobot: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "droid").mkdir()
    monkeypatch.chdir(folder / "droid")
    assert "statistics-of-another-robot" not in codes(like_lerobot, robot="libero")
    assert "statistics-of-another-robot" not in codes(folder, robot="libero", norm_stats="none")


def test_statistics_missing_flat_or_narrow(folder: Path) -> None:
    write_statistics(folder, "synthetic", 32, std=0)
    assert "state-statistics-flat" in codes(folder, robot="generic")
    write_statistics(folder, "synthetic", 5)
    assert "state-statistics-narrow" in codes(folder, robot="libero")
    shutil.rmtree(folder / "assets")
    assert "statistics-unusable" in codes(folder, robot="generic")


def test_no_policy_reads_prompts_with_another_vocabulary(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pi0.policy.tokenizer.PALIGEMMA_VOCABULARY", PRESETS["tiny"].vocab_size)
    setup = prepare(open_checkpoint(folder), PolicyOptions(robot="generic"))
    with pytest.raises(Pi0Error, match="expected PaliGemma's, with <bos> 2 and a line break"):
        setup.require()


@pytest.fixture
def like_lerobot(tmp_path: Path) -> Path:
    synthesise(tmp_path / "b", PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    return tmp_path / "b"


def test_cameras_of_a_named_robot(like_lerobot: Path) -> None:
    found = codes(like_lerobot, robot="libero")
    sentence = found["cameras-by-order"]
    assert "robot libero: expected the cameras of the checkpoint's config.json, obs" in sentence
    assert "observation.images.base_0_rgb, " in sentence
    assert "found observation/image, observation/wrist_image: their order alone" in sentence
    assert "cameras-by-order" not in codes(like_lerobot, robot="generic")  # has their names
    assert "cameras-by-order" not in codes(like_lerobot)
    where = {"norm_stats": "none", "preprocessing": "openpi"}
    assert "cameras-by-order" in codes(like_lerobot, robot="libero", **where)


def test_alohas_conventions_where_lerobot_has_none(like_lerobot: Path) -> None:
    for path in like_lerobot.glob("policy_*.safetensors"):
        save_file({name: value[:14] for name, value in load_file(path).items()}, path)
    path = like_lerobot / "config.json"
    config = json.loads(path.read_text())
    found = codes(like_lerobot, robot="aloha_sim")
    assert "as LeRobot's processors have none, found openpi's of ALOHA" in found["aloha-differs"]
    assert "aloha-differs" not in codes(like_lerobot, robot="generic")
    assert "relative-differs" in codes(like_lerobot, robot="aloha")
    path.write_text(json.dumps(config | {"adapt_to_pi_aloha": True}))
    assert "aloha-differs" not in codes(like_lerobot, robot="aloha_sim")
    # The robot that the flags ask for can be named.
    flags = {"adapt_to_pi_aloha": True, "use_delta_joint_actions_aloha": True}
    path.write_text(json.dumps(config | flags))
    assert "Name the robot with --robot aloha." in codes(like_lerobot)["robot-needed"]
    assert not {"aloha-differs", "relative-differs"} & codes(like_lerobot, robot="aloha").keys()


def test_processors_of_two_checkpoints(like_lerobot: Path) -> None:
    assert "processors-differ" not in codes(like_lerobot)
    (path,) = like_lerobot.glob("policy_postprocessor_step_*.safetensors")
    statistics = load_file(path)
    statistics["action.std"] *= 2
    save_file(statistics, path)
    assert "processors-differ" in codes(like_lerobot)
    statistics = {k: v[:7] if k.startswith("action.") else v for k, v in statistics.items()}
    save_file(statistics, path)
    assert "processors-differ" in codes(like_lerobot)


@pytest.mark.parametrize("steps", [51, 0, "5", True])
def test_more_actions_than_a_chunk_has(folder: Path, steps: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"n_action_steps": steps}))
    assert "expected 1 to 50 actions" in codes(folder)["action-steps"]
    path.write_text(json.dumps(config | {"n_action_steps": 50}))
    assert "action-steps" not in codes(folder)


def test_length_of_prompts_in_two_files(like_lerobot: Path) -> None:
    """The tokenizer step counts, as in LeRobot, and it is said."""
    assert "max-tokens-declared" not in codes(like_lerobot)
    path = like_lerobot / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_max_length": 72}))
    assert "expected 48 as LeRobot's" in codes(like_lerobot)["max-tokens-declared"]


def test_two_origins(like_lerobot: Path, folder: Path) -> None:
    assert "two-origins" not in codes(like_lerobot)
    shutil.copytree(folder / "assets", like_lerobot / "assets")
    assert "assets/synthetic/norm_stats.json is not read" in codes(like_lerobot)["two-origins"]
    where = like_lerobot / "assets/synthetic/norm_stats.json"
    assert "two-origins" not in codes(like_lerobot, norm_stats=where, preprocessing="openpi")
