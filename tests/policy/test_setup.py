"""What is assumed is said, and what does not fit between checkpoint, statistics and robot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot_folder import CAMERAS, LerobotFolder
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pi0.checkpoint.convert import convert
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import Pi0Error
from pi0.policy import ROBOTS, Camera, PolicyOptions, PolicySetup, Robot, prepare
from pi0.policy.export import export_files

Edit = Callable[[Path], object]


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A checkpoint in openpi's form, with statistics of 14 values."""
    folder = shutil.copytree(tiny_path, tmp_path / "checkpoint")
    shutil.rmtree(folder / "assets")
    write_stats(folder / "assets/mine/norm_stats.json", 14, 14)
    return folder


def write_stats(path: Path, state: int, actions: int, /, **changes: Any) -> Path:
    def unit(width: int) -> dict[str, list[float]]:
        return {"mean": [0.0] * width, "std": [1.0] * width}

    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"norm_stats": {"state": unit(state), "actions": unit(actions)}}
    path.write_text(json.dumps(content | changes))
    return path


def made(folder: Path, **options: Any) -> PolicySetup:
    return prepare(open_checkpoint(folder), PolicyOptions(**options))


def codes(setup: PolicySetup) -> dict[str, str]:
    return {finding.code: finding.severity for finding in setup.findings}


def test_everything_said(folder: Path) -> None:
    setup = made(folder, robot="generic")
    assert codes(setup) == {}
    pipeline = setup.require()
    assert (pipeline.resize, pipeline.prompt.convention) == ("openpi", "openpi")
    described = setup.describe()
    assert described["robot"]["name"] == "generic"
    assert described["robot"]["state"] == {"state": 14}
    assert described["sources"]["statistics"].endswith("norm_stats.json (mean_std)")
    assert described["sources"]["tokenizer"].endswith("tokenizer.json")
    assert json.dumps(described)  # plain data


def test_an_assumed_robot_is_said(folder: Path) -> None:
    setup = made(folder)
    assert codes(setup) == {"robot-assumed": "warning"}
    with pytest.warns(UserWarning, match="robot: no file of the checkpoint names one; generic is"):
        setup.require()


@pytest.mark.parametrize(
    ("asset", "robot"),
    [
        ("trossen", "aloha"),
        ("trossen_mobile", "aloha"),
        ("aloha_sim_transfer_cube_human", "aloha_sim"),
        ("aloha_pen_uncap", "aloha"),
        ("droid", "droid"),
        ("DROID-100", "droid"),
        ("libero_spatial", "libero"),
    ],
)
def test_statistics_of_a_known_robot(folder: Path, asset: str, robot: str) -> None:
    shutil.move(folder / "assets/mine", folder / f"assets/{asset}")
    setup = made(folder)
    assert codes(setup) == {"robot-unknown": "error"}
    with pytest.raises(Pi0Error, match=f"statistics are those of {asset}.*--robot {robot}"):
        setup.require()
    assert made(folder, robot="generic").pipeline is not None


@pytest.mark.parametrize(
    ("robot", "state", "actions", "code", "severity"),
    [
        ("aloha", 14, 7, "actions-statistics-narrow", "error"),
        ("droid", 8, 7, "actions-statistics-narrow", "error"),
        ("libero", 8, 6, "actions-statistics-narrow", "error"),
        ("libero", 7, 7, "state-statistics-narrow", "error"),
        ("libero", 14, 14, "actions-statistics-wide", "warning"),
        ("libero", 14, 7, "state-statistics-wide", "warning"),
        ("generic", 40, 14, "state-too-wide", "error"),
        ("generic", 14, 33, "actions-too-wide", "error"),
    ],
)
def test_widths(
    folder: Path, robot: str, state: int, actions: int, code: str, severity: str
) -> None:
    path = write_stats(folder / "stats.json", state, actions)
    assert codes(made(folder, robot=robot, norm_stats=path))[code] == severity


@pytest.mark.parametrize(
    ("robot", "state", "actions"), [("aloha", 14, 14), ("libero", 8, 7), ("libero", 32, 32)]
)
def test_widths_that_fit(folder: Path, robot: str, state: int, actions: int) -> None:
    """32 values are statistics padded to the model's width, as openpi's released ones are."""
    path = write_stats(folder / "stats.json", state, actions)
    assert codes(made(folder, robot=robot, norm_stats=path)) == {}


def test_values_beyond_the_robots_that_are_no_padding(folder: Path) -> None:
    whole = {"mean": [0.1] * 32, "std": [0.5] * 32}
    path = folder / "stats.json"
    write_stats(path, 8, 7, norm_stats={"state": whole, "actions": whole})
    assert codes(made(folder, robot="libero", norm_stats=path)) == {
        "state-statistics-wide": "warning",
        "actions-statistics-wide": "warning",
    }


def test_flat_statistics(folder: Path) -> None:
    flat = {"mean": [0.0] * 14, "std": [1.0] * 12 + [0.0, 1e-9]}
    whole = {"mean": [0.0] * 14, "std": [1.0] * 14}
    path = write_stats(folder / "stats.json", 14, 14, norm_stats={"state": flat, "actions": whole})
    setup = made(folder, robot="generic", norm_stats=path)
    assert codes(setup) == {"state-statistics-flat": "warning"}
    assert "no spread in 12, 13" in setup.findings[0].sentence
    # Padding beyond the robot's own values has no spread, and nobody reads it.
    path = write_stats(
        folder / "stats.json",
        14,
        14,
        norm_stats={
            what: {"mean": [0.0] * 32, "std": [1.0] * 8 + [0.0] * 24}
            for what in ("state", "actions")
        },
    )
    assert codes(made(folder, robot="libero", norm_stats=path)) == {}


@pytest.mark.parametrize(
    "place",
    ["norm_stats.json", "physical-intelligence/libero/norm_stats.json", "libero/norm_stats.json"],
)
def test_places_of_statistics(folder: Path, place: str) -> None:
    shutil.rmtree(folder / "assets")
    path = write_stats(folder / place, 14, 14)
    setup = made(folder, robot="generic", preprocessing="openpi")
    assert codes(setup) == {}
    assert setup.sources["statistics"].startswith(str(path))


def test_statistics_in_another_place_are_named(folder: Path) -> None:
    shutil.rmtree(folder / "assets")
    path = write_stats(folder / "a/b/c/norm_stats.json", 14, 14)
    setup = made(folder, robot="generic", preprocessing="openpi")
    assert codes(setup) == {"statistics-unusable": "error"}
    assert f"found {path}." in setup.findings[0].sentence


def test_nothing_says_whose_preprocessing(folder: Path) -> None:
    path = write_stats(folder.parent / "elsewhere.json", 14, 14)
    shutil.rmtree(folder / "assets")
    setup = made(folder, robot="generic", norm_stats=path)
    assert codes(setup) == {"preprocessing-assumed": "warning"}
    assert codes(made(folder, robot="generic", norm_stats=path, preprocessing="openpi")) == {}
    setup = made(folder, robot="generic", norm_stats=path, resize="lerobot", prompt="openpi")
    assert codes(setup) == {}
    assert setup.require().resize == "lerobot"


@pytest.mark.parametrize("mode", ["QUANTILES", "QUANTILE10"])
def test_a_converted_checkpoint_keeps_its_mode_of_normalisation(folder: Path, mode: str) -> None:
    theirs, out = folder.parent / "theirs", folder.parent / "out"
    synthesise(theirs, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    for path in theirs.glob("policy_*.json"):
        path.write_text(path.read_text().replace("MEAN_STD", mode))
    checkpoint = open_checkpoint(theirs)
    convert(checkpoint, out, "openpi", export_files(checkpoint, "openpi", "float32").files)
    setup = made(out, robot="generic")
    if mode == "QUANTILES":
        assert setup.require().state_stats.shift == 1.0
        again = export_files(open_checkpoint(out), "lerobot", "float32").files
        assert b'"STATE": "QUANTILES"' in again["policy_preprocessor.json"]
        return
    message = "config.json norm_mode: expected one of mean_std, quantiles, min_max, found 'quantile"
    assert any(message in finding.sentence for finding in setup.findings)
    assert made(out, robot="generic", norm_mode="mean_std").require().state_stats.shift == 0.0
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"norm_mode": ["quantile10"]}))
    assert any(message[:74] in finding.sentence for finding in made(out, robot="generic").findings)
    with pytest.raises(Pi0Error, match=r"^config.json norm_mode: .* found .*quantile10"):
        export_files(open_checkpoint(out), "lerobot", "float32")


def test_a_converted_checkpoint_keeps_its_preprocessing(folder: Path) -> None:
    theirs, out = folder.parent / "theirs", folder.parent / "out"
    synthesise(theirs, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    checkpoint = open_checkpoint(theirs)
    convert(checkpoint, out, "openpi", export_files(checkpoint, "openpi", "float32").files)
    setup = made(out, robot="generic")
    assert (setup.require().resize, setup.require().prompt.convention) == ("lerobot", "lerobot")
    assert made(out, robot="generic", preprocessing="openpi").require().resize == "openpi"
    again = export_files(open_checkpoint(out), "jax", "float32").files["config.json"]
    assert b'"preprocessing": "lerobot"' in again
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"preprocessing": "mine"}))
    found = made(out, robot="generic").findings
    assert any("expected openpi or lerobot, found 'mine'" in f.sentence for f in found)


def test_names_of_lerobot_without_its_files(folder: Path) -> None:
    """A checkpoint that LeRobot wrote must not get openpi's preprocessing in silence."""

    theirs = folder.parent / "theirs"
    synthesise(theirs, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    for file in theirs.iterdir():
        if file.name.startswith("policy_") or file.name == "config.json":
            file.unlink()
    shutil.copy(folder / "config.json", theirs / "config.json")
    path = write_stats(folder.parent / "elsewhere.json", 14, 14)
    setup = made(theirs, robot="generic", norm_stats=path)
    assert codes(setup) == {"preprocessing-unknown": "error"}
    assert "--preprocessing" in setup.findings[0].sentence
    assert codes(made(theirs, robot="generic", norm_stats=path, preprocessing="lerobot")) == {}


@pytest.mark.parametrize(
    ("flag", "value"), [("adapt_to_pi_aloha", True), ("use_delta_joint_actions_aloha", True)]
)
def test_alohas_flags(folder: Path, flag: str, value: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {flag: value}))
    setup = made(folder)
    assert codes(setup) == {"robot-unknown": "error"}
    assert flag in setup.findings[0].sentence
    assert "--robot aloha" in setup.findings[0].sentence
    assert codes(made(folder, robot="aloha")) == {}
    (folder / "config.json").write_text(json.dumps(config | {flag: False}))
    assert codes(made(folder)) == {"robot-assumed": "warning"}


@pytest.mark.parametrize("yes", [1, "true"])
def test_alohas_flags_in_other_words(folder: Path, yes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"adapt_to_pi_aloha": yes}))
    assert codes(made(folder)) == {"robot-unknown": "error"}


def test_a_robot_without_what_alohas_flags_ask_for(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    flags = {"adapt_to_pi_aloha": True, "use_delta_joint_actions_aloha": True}
    (folder / "config.json").write_text(json.dumps(config | flags))
    for robot, differences in (("aloha", 0), ("aloha_sim", 1), ("generic", 2)):
        found = [finding.code for finding in made(folder, robot=robot).findings]
        assert found == ["aloha-differs"] * differences


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda f: shutil.rmtree(f / "assets"), "statistics-unusable"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer-unusable"),
    ],
)
def test_several_findings_at_once(folder: Path, edit: Edit, code: str) -> None:
    edit(folder)
    setup = made(folder, robot="nowhere", preprocessing="openpi")
    assert set(codes(setup)) == {"robot-unknown", code}
    assert setup.pipeline is None
    with pytest.raises(Pi0Error, match=r"(?s)robot: expected one of .*\n"):
        setup.require()


def test_a_tokenizer_for_a_larger_vocabulary(folder: Path) -> None:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"p{i}" for i in range(1000))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    Tokenizer(BPE(vocabulary, [], unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    setup = made(folder, robot="generic")
    assert codes(setup) == {"tokenizer-unusable": "error"}
    assert "at most the 512 pieces" in setup.findings[0].sentence


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"norm_stats": {"state": {"mean": 0.0, "std": 1.0}, "actions": {}}},
            "state.mean: .* each dimension, found 0.0",
        ),
        ({"state": {"mean": []}, "actions": {"mean": []}}, "one for each dimension, found \\[\\]"),
        (
            {"state": {"mean": ["a"]}, "actions": {"mean": [0]}},
            "state.mean: expected a list .* found 'a'",
        ),
        ({"norm_stats": []}, "found no state and no actions"),
        ({"norm_stats": {"state": {"mean": [0], "std": [1]}}}, "found no actions"),
        (
            {"state": {"mean": [0], "std": [1]}, "action": {"mean": [0, 1], "std": [1]}},
            "found mean \\[2\\] and std \\[1\\]",
        ),
    ],
)
def test_statistics_that_are_none(folder: Path, content: dict, message: str) -> None:
    path = folder / "stats.json"
    path.write_text(json.dumps(content))
    with pytest.raises(Pi0Error, match=message):
        made(folder, robot="generic", norm_stats=path).require()


@pytest.mark.parametrize("other", [100, "of 3 runs", [[1, 2]], [], {"bins": []}])
def test_what_is_no_statistic_may_stand_among_them(folder: Path, other: object) -> None:
    table = {"mean": [0.0] * 3, "std": [1.0] * 3, "count": other}
    path = folder / "stats.json"
    path.write_text(json.dumps({"state": table, "actions": table}))
    assert codes(made(folder, robot="generic", norm_stats=path)) == {}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("key", ["action", "actions"])
def test_other_forms_of_statistics(folder: Path, wrapped: bool, key: str) -> None:
    table = {"mean": [0.0] * 3, "std": [1.0] * 3, "q01": None}
    stats = {"state": table, key: table}
    path = folder / "stats.json"
    path.write_text(json.dumps({"norm_stats": stats} if wrapped else stats))
    assert made(folder, robot="generic", norm_stats=path).require().action_dim == 3


@pytest.mark.parametrize("names", [("state", "observation.state"), ("actions", "action")])
@pytest.mark.parametrize("wrapped", [True, False])
def test_statistics_under_two_names(folder: Path, names: tuple[str, str], wrapped: bool) -> None:
    path, table = folder / "stats.json", {"mean": [0.0] * 3, "std": [1.0] * 3}
    for other, fits in ((table, True), (table | {"std": [2.0] * 3}, False)):
        stats = {"state": table, "actions": table, names[1]: other}
        path.write_text(json.dumps({"norm_stats": stats} if wrapped else stats))
        setup = made(folder, robot="generic", norm_stats=path)
        assert ("statistics-unusable" not in codes(setup)) == fits
    prefix = "norm_stats." if wrapped else ""
    assert f"found {prefix}{names[0]} and {prefix}{names[1]}, which" in setup.findings[0].sentence


def test_statistics_inside_and_outside(folder: Path) -> None:
    outside = {"state": {"mean": [1.0] * 3, "std": [1.0] * 3}}
    path = write_stats(folder / "stats.json", 3, 3, **outside)
    setup = made(folder, robot="generic", norm_stats=path)
    assert "found norm_stats.state and state, which differ" in setup.findings[0].sentence


@pytest.mark.parametrize("prompt", [3, "", "  \n", ["go"], b"go", "caf\ud83d"])
def test_a_default_prompt_that_is_none(folder: Path, prompt: Any) -> None:
    setup = made(folder, robot="generic", default_prompt=prompt)
    assert codes(setup) == {"prompt-unknown": "error"}
    assert setup.findings[0].sentence.startswith("default_prompt: expected ")
    pipeline = made(folder, robot="generic", default_prompt="wait").require()
    assert pipeline.default_prompt == "wait"
    with pytest.raises(Pi0Error, match="default_prompt: expected"):
        replace(pipeline, default_prompt=prompt)


@pytest.mark.parametrize(
    ("asset", "code"),
    [
        ("assets/physical-intelligence/libero", "robot-unknown"),
        ("trossen", "robot-unknown"),
        ("assets/mine", "robot-assumed"),
    ],
)
def test_a_known_robot_anywhere_in_the_path(
    folder: Path, asset: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(folder / "assets")
    path = write_stats(folder / asset / "norm_stats.json", 14, 14)
    assert code in codes(made(folder, preprocessing="openpi"))
    assert code in codes(made(folder, preprocessing="openpi", norm_stats=path))
    monkeypatch.chdir(path.parent)
    for relative in (".", "norm_stats.json"):
        assert code in codes(made(folder, preprocessing="openpi", norm_stats=Path(relative)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(folder: Path, value: float) -> None:
    table = {"mean": [0.0] * 14, "std": [1.0, 1.0, value, *[1.0] * 11]}
    write_stats(
        folder / "assets/mine/norm_stats.json",
        14,
        14,
        norm_stats={"state": table, "actions": table},
    )
    setup = made(folder, robot="generic")
    assert f"finite values of std, found {value} in dimension 2." in setup.findings[0].sentence


@pytest.mark.parametrize(
    ("mode", "table"),
    [
        ("mean_std", {"mean": [0.0] * 3, "std": [1.0, -1.0, 1.0]}),
        ("mean_std", {"mean": [0.0] * 3, "std": [1.0, 1e300, 1.0]}),
        ("quantiles", {"q01": [1.0] * 3, "q99": [0.0] * 3}),
    ],
)
def test_statistics_turned_round(folder: Path, mode: str, table: dict) -> None:
    path = folder / "stats.json"
    path.write_text(json.dumps({"state": table, "actions": table}))
    setup = made(folder, robot="generic", norm_stats=path, norm_mode=mode)
    assert codes(setup) == {"statistics-unusable": "error"}
    assert "with a spread of 0 or more" in setup.findings[0].sentence


@pytest.fixture
def lerobot(tmp_path: Path) -> LerobotFolder:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    folder = LerobotFolder(tmp_path)
    folder.config = json.loads((tmp_path / "config.json").read_text()) | folder.config
    return folder


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("num_inference_steps", 3, True),
        ("num_inference_steps", "x", False),
        ("n_obs_steps", 2, False),
        ("min_period", 0.1, False),
        ("image_resolution", [28, 28], True),
        ("image_resolution", [56, 56], False),
    ],
)
def test_settings_are_carried_out_or_refused(
    lerobot: LerobotFolder, key: str, value: Any, fits: bool
) -> None:
    lerobot.config[key] = value
    setup = made(lerobot.write())
    assert ("setting-not-carried-out" not in codes(setup)) == fits
    if key == "num_inference_steps" and fits:
        assert setup.steps == 3
    elif not fits:
        assert f"config.json {key}: expected" in setup.findings[-1].sentence


def test_what_transformers_says_counts(tmp_path: Path) -> None:
    """Its config.json has LeRobot's words for denoising steps and the periods of time."""
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["transformers"], 0, torch.float32)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_inference_steps": 3, "min_period": 4e-3}))
    setup = made(tmp_path, robot="generic")
    assert (setup.steps, "setting-not-carried-out" in codes(setup)) == (3, False)
    export = export_files(setup.checkpoint, "lerobot", "float32", norm_stats="none")
    assert json.loads(export.files["config.json"])["num_inference_steps"] == 3
    path.write_text(json.dumps(config | {"min_period": 0.1}))
    setup = made(tmp_path, robot="generic")
    assert codes(setup)["setting-not-carried-out"] == "error"
    with pytest.raises(Pi0Error, match=r"min_period: expected 0.004, .* found 0.1"):
        export_files(setup.checkpoint, "lerobot", "float32", norm_stats="none")


def test_max_tokens_that_contradict_the_tokenizer_step(lerobot: LerobotFolder) -> None:
    """Where config.json is silent, the step says it, and nothing is assumed."""
    del lerobot.config["tokenizer_max_length"]
    folder = lerobot.write()
    for stated in (None, 48):
        setup = prepare(open_checkpoint(folder, max_tokens=stated), PolicyOptions())
        assert codes(setup) == {}
        assert setup.describe()["max_tokens"] == 48
        export = export_files(setup.checkpoint, "openpi", "float32")
        assert "max-tokens-assumed" not in [finding.code for finding in export.findings]
        assert json.loads(export.files["config.json"])["max_token_len"] == 48
    opened = open_checkpoint(folder, max_tokens=47)
    setup = prepare(opened, PolicyOptions())
    assert codes(setup) == {"max-tokens-differs": "error"}
    assert "--max-tokens): expected 48 as LeRobot's tokenizer step" in setup.findings[0].sentence
    found = export_files(opened, "openpi", "float32").findings
    assert "max-tokens-differs" in [finding.code for finding in found]


def test_steps_under_two_names(lerobot: LerobotFolder) -> None:
    for steps, fits in ((3, True), (4, False)):
        lerobot.config |= {"num_inference_steps": 3, "num_steps": steps}
        setup = made(lerobot.write())
        assert ("setting-not-carried-out" not in codes(setup)) == fits
    assert "num_inference_steps and num_steps: expected one" in setup.findings[-1].sentence


def test_missing_processors_hide_nothing_else(lerobot: LerobotFolder) -> None:
    folder = lerobot.write()
    for path in (*folder.glob("policy_*.json"), *folder.glob("tokenizer*")):
        path.unlink()
    found = codes(made(folder, robot="arm_of_nobody"))
    assert found.keys() >= {"processors-missing", "robot-unknown", "tokenizer-unusable"}


def test_lerobots_config_without_its_processors(lerobot: LerobotFolder, tmp_path: Path) -> None:
    """Statistics of openpi's form do not make it openpi's."""
    folder = lerobot.write()
    for path in folder.glob("policy_*"):
        path.unlink()
    assert codes(made(folder)) == {"processors-missing": "error"}
    setup = made(folder, norm_stats=write_stats(tmp_path / "stats.json", 6, 5))
    assert codes(setup) == {"processors-assumed": "warning"}
    pipeline = setup.pipeline
    assert pipeline is not None
    assert (pipeline.resize, pipeline.prompt.convention) == ("lerobot", "lerobot")
    assert pipeline.robot.name == "lerobot"


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_one_processor_is_missing_beside_statistics(lerobot: LerobotFolder, name: str) -> None:
    folder = lerobot.write()
    (folder / name).unlink()
    write_stats(folder / "assets/mine/norm_stats.json", 6, 5)
    setup = made(folder)
    assert codes(setup) == {"processor-missing": "error"}
    assert f"expected {name} beside" in setup.findings[0].sentence


def test_a_robot_without_the_checkpoints_relative_actions(lerobot: LerobotFolder) -> None:
    lerobot.set_relative(exclude_joints=["gripper"], action_names=["a", "b", "c", "d", "Gripper"])
    folder = lerobot.write()
    assert codes(made(folder)) == {}
    setup = made(folder, robot="generic")
    assert codes(setup)["relative-differs"] == "error"
    assert (
        "in dimensions 0 to 3 of 5, as LeRobot's processors have them, found no dimension:"
        in setup.findings[-1].sentence
    )
    table = replace(ROBOTS["generic"], action_dim=5, delta=(4, -1))
    assert "relative-differs" not in codes(made(folder, robot=table))
    openpi = {"preprocessing": "openpi", "norm_stats": write_stats(folder / "stats.json", 6, 5)}
    assert codes(made(folder, robot="generic", **openpi))["relative-differs"] == "warning"
    assert "relative-differs" in codes(made(folder, **openpi))
    assert codes(made(folder, robot=table, **openpi)) == {"cameras-unknown": "warning"}


@pytest.mark.parametrize("enabled", [True, False])
def test_config_json_that_contradicts_the_steps_of_relative_actions(
    lerobot: LerobotFolder, enabled: bool
) -> None:
    """The steps count, as in LeRobot."""
    lerobot.set_relative(enabled=enabled)
    for declared in (enabled, not enabled):
        lerobot.config["use_relative_actions"] = declared
        setup = made(lerobot.write())
        found = {} if declared == enabled else {"relative-declared": "warning"}
        assert codes(setup) == found
        assert any(n > 0 for n in setup.robot.delta) == enabled


def test_a_converted_checkpoint_keeps_its_relative_actions(lerobot: LerobotFolder) -> None:
    lerobot.set_relative(exclude_joints=["gripper"], action_names=["a", "b", "c", "d", "Gripper"])
    source = lerobot.write()
    for name, target in (("once", "openpi"), ("twice", "openpi")):
        opened = open_checkpoint(source)
        out = source.parent / name
        convert(opened, out, target, export_files(opened, target, "float32").files)
        source = out
        assert codes(made(out, robot="generic"))["relative-differs"] == "error"
        table = replace(ROBOTS["generic"], action_dim=5, delta=(4, -1))
        assert "relative-differs" not in codes(made(out, robot=table))
    with pytest.raises(Pi0Error, match="expected absolute actions, found relative_actions in"):
        export_files(open_checkpoint(source), "lerobot", "float32")
    settings = json.loads((source / "config.json").read_text())
    for wrong in ("yes", [1, 0], {"a": True}):
        (source / "config.json").write_text(json.dumps(settings | {"relative_actions": wrong}))
        assert codes(made(source, robot="generic"))["relative-unknown"] == "error"


def test_processors_that_normalise_actions_otherwise(lerobot: LerobotFolder) -> None:
    """Training reads the preprocessor's, and actions are decoded by the postprocessor's."""
    lerobot.set("unnormalizer_processor", {"norm_map": {"STATE": "MEAN_STD"}})
    assert codes(made(lerobot.write())) == {"processors-differ": "warning"}


def test_a_robot_with_the_checkpoints_cameras_in_another_order(lerobot: LerobotFolder) -> None:
    """The table may have the keys from before the renames."""
    front = "observation.images.front"
    lerobot.set("rename_observations_processor", {"rename_map": {front: CAMERAS[0]}})
    folder = lerobot.write()

    def table(*keys: str) -> Robot:
        return Robot("arm", tuple(map(Camera, keys)), (("observation.state", 6),), 5)

    for keys in (CAMERAS, (front, CAMERAS[1]), CAMERAS[1:], ("x", *CAMERAS)):
        assert "cameras-differ" not in codes(made(folder, robot=table(*keys)))
    for keys in (CAMERAS[::-1], (CAMERAS[1], front)):
        setup = made(folder, robot=table(*keys))
        assert codes(setup)["cameras-differ"] == "error"
        assert f"({', '.join(CAMERAS)}), found {CAMERAS[1]}, {CAMERAS[0]}" in (
            setup.findings[-1].sentence
        )


def test_a_robot_with_cameras_that_the_checkpoint_was_not_trained_with(
    lerobot: LerobotFolder,
) -> None:
    """By keys, their last parts or short names; of keys that resemble none the order counts."""
    folder = lerobot.write()
    state = (("observation.state", 6),)

    def table(*keys: str, names: tuple[str, ...] = ()) -> Robot:
        cameras = (Camera(keys[0], names), *map(Camera, keys[1:]))
        return Robot("arm", cameras, state, 5)

    for keys in ((*CAMERAS, "side"), ("images/top", "images/side"), ("a", "b", "c")):
        setup = made(folder, robot=table(*keys))
        assert codes(setup)["cameras-unknown"] == "warning"
        assert f"found also {'a, b, c' if keys[0] == 'a' else keys[-1]}: the" in (
            setup.findings[0].sentence
        )
    for robot in (table("a", "b"), table("left/a", "right/a")):
        assert codes(made(folder, robot=robot)) == {"cameras-by-order": "warning"}
    assert codes(made(folder, robot=table("images/top", "images/wrist"))) == {}
    assert codes(made(folder, robot=table("a", names=("wrist",)))) == {}
    for robot in (table("images/wrist", "images/top"), table("a", "images/top", names=("wrist",))):
        assert codes(made(folder, robot=robot)) == {"cameras-differ": "error"}


def test_features_that_are_not_read_may_be_observed(lerobot: LerobotFolder) -> None:
    lerobot.config["input_features"] |= {
        "observation.environment_state": {"type": "ENV", "shape": [3]},
        "task": {"type": "LANGUAGE", "shape": [1]},
    }
    setup = made(lerobot.write())
    assert codes(setup) == {"features-unread": "warning"}
    image = np.zeros((8, 8, 3), np.uint8)
    seen = {CAMERAS[0]: image, "observation.state": np.zeros(6), "task": "go"}
    assert setup.pipeline is not None
    inputs, _ = setup.pipeline.encode(seen)
    others, _ = setup.pipeline.encode(seen | {"observation.environment_state": np.ones(3)})
    assert all(map(torch.equal, vars(inputs).values(), vars(others).values()))


def test_a_state_of_which_no_file_tells_the_length(lerobot: LerobotFolder) -> None:
    """As in LeRobot, which pads it."""
    lerobot.config["input_features"]["observation.state"]["shape"] = [32]
    lerobot.set_modes({"ACTION": "MEAN_STD"})
    assert lerobot.statistics is not None
    for name in [name for name in lerobot.statistics if name.startswith("observation.state")]:
        del lerobot.statistics[name]
    setup = made(lerobot.write())
    assert codes(setup) == {}
    pipeline, image = setup.require(), np.zeros((8, 8, 3), np.uint8)
    for length in (6, 32):
        seen = {CAMERAS[0]: image, "observation.state": np.ones(length), "task": "go"}
        inputs, state = pipeline.encode(seen)
        assert inputs.state.tolist() == [[1.0] * length + [0.0] * (32 - length)]
        assert pipeline.decode(np.zeros((50, 32)), state).shape == (50, 5)
    seen = {CAMERAS[0]: image, "observation.state": np.ones(33), "task": "go"}
    with pytest.raises(Pi0Error, match="expected 1 to 32 values"):
        pipeline.encode(seen)


def test_a_state_without_what_relative_actions_are_added_to(folder: Path) -> None:
    robot = replace(ROBOTS["generic"], delta=(-1, 5, -1))
    path = write_stats(folder / "stats.json", 5, 7)
    setup = made(folder, robot=robot, norm_stats=path)
    assert codes(setup) == {"state-statistics-narrow": "error"}
    assert "at least 6 values, which the relative actions" in setup.findings[0].sentence
    assert codes(made(folder, robot=robot, norm_stats=write_stats(path, 5, 5))) == {}
    pipeline = made(folder, robot=robot, norm_stats=write_stats(path, 32, 7)).require()
    image = np.zeros((8, 8, 3), np.uint8)
    pipeline.encode({"images/base": image, "state": np.zeros(6), "prompt": "go"})
    with pytest.raises(Pi0Error, match="state: expected 6 to 32 values"):
        pipeline.encode({"images/base": image, "state": np.zeros(5), "prompt": "go"})
    for coding in (pipeline.decode, pipeline.encode_actions):
        width = 32 if coding == pipeline.decode else 7
        with pytest.raises(Pi0Error, match=r"state: expected \[32\] beside actions"):
            coding(np.zeros((50, width)), np.zeros(5))
