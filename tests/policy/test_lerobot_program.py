"""Processor files as people have them: what is carried out, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lerobot_folder import ACTION_DIM, CAMERAS, STATE_DIM, LerobotFolder
from safetensors.torch import save_file

from pi0.checkpoint.files import read_json
from pi0.errors import CheckpointError, Pi0Error
from pi0.policy.lerobot import LerobotProgram, lerobot_normalizer, read_program
from pi0.policy.lerobot.relative import relative_mask
from pi0.policy.lerobot.robot import robot_of

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE = "observation.state"
Edit = Callable[[LerobotFolder], object]
UNIT = {"mean": np.zeros(3), "std": np.ones(3)}


@pytest.fixture
def folder(tmp_path: Path) -> LerobotFolder:
    return LerobotFolder(tmp_path)


def read(folder: LerobotFolder, **options: Any) -> LerobotProgram:
    path = folder.write()
    return read_program(path, read_json(path / "config.json"), **options)


def sentences(program: LerobotProgram, severity: str = "error") -> str:
    return "\n".join(f.sentence for f in program.findings if f.severity == severity)


def codes(program: LerobotProgram) -> list[str]:
    return [finding.code for finding in program.findings]


def test_a_folder_as_lerobot_writes_it(folder: LerobotFolder) -> None:
    program = read(folder)
    assert program.findings == ()
    assert program.cameras == CAMERAS
    assert (program.state_key, program.state.width, program.action_dim) == (STATE, 6, 5)
    assert (program.rename, program.images, program.relative) == ({}, {}, None)
    assert (program.newline, program.max_tokens, program.truncation) == (True, 48, True)


def insert(step: Any, before: bool = True) -> Edit:
    return lambda folder: (folder.before if before else folder.after).append(step)


def set_step(name: str, **fields: Any) -> Edit:
    return lambda folder: folder.set(name, fields)


def move_last(name: str) -> Edit:
    def edit(folder: LerobotFolder) -> None:
        step = folder.step(name)
        steps = folder.before if step in folder.before else folder.after
        steps.remove(step)
        steps.append(step)

    return edit


def remove(name: str) -> Edit:
    def edit(folder: LerobotFolder) -> None:
        step = folder.step(name)
        (folder.before if step in folder.before else folder.after).remove(step)

    return edit


def each(*edits: Edit) -> Edit:
    def edit(folder: LerobotFolder) -> None:
        for one in edits:
            one(folder)

    return edit


def lose(*keys: str) -> Edit:
    def edit(folder: LerobotFolder) -> None:
        assert folder.statistics is not None
        folder.statistics = {
            name: value for name, value in folder.statistics.items() if not name.startswith(keys)
        }

    return edit


def set_statistic(name: str, value: Any) -> Edit:
    def edit(folder: LerobotFolder) -> None:
        assert folder.statistics is not None
        folder.statistics[name] = torch.tensor(value)

    return edit


def relative(folder: LerobotFolder) -> None:
    folder.set_relative()


NORMALIZE, UNNORMALIZE = "normalizer_processor", "unnormalizer_processor"
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
ADD_STATE = "pi05_prepare_state_tokenizer_processor_step"
RENAME, TOKENIZE = "rename_observations_processor", "tokenizer_processor"
VISUAL = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
BOTH = (NORMALIZE, UNNORMALIZE)

REFUSED: dict[str, tuple[Edit, str, str]] = {
    # name: edit, code, part of the sentence
    "unknown step": (
        insert({"registry_name": "center_crop_processor"}), "step-unknown", "center_crop_processor"
    ),
    "unknown step after": (
        insert({"registry_name": "center_crop_processor"}, before=False),
        "step-unknown",
        f"{POST}: expected steps that are carried out here, found center_crop_processor",
    ),
    "class": (insert({"class": "x.Y"}), "step-unknown", f"{PRE}: .* found x.Y"),
    "class after": (insert({"class": "x.Y"}, before=False), "step-unknown", f"{POST}: .* x.Y"),
    "state in the prompt before it is normalised": (
        lambda folder: folder.before.insert(0, {"registry_name": ADD_STATE}),
        "step-order",
        f"expected {NORMALIZE} before {ADD_STATE}",
    ),
    "out of place": (
        insert({"registry_name": TOKENIZE}, before=False), "step-unknown", f"{POST}: .* {TOKENIZE}"
    ),
    "no name": (insert({"config": {}}), "step-form", "step 7: expected an object with a registry"),
    "no object": (insert("normalizer_processor"), "step-form", "found 'normalizer_processor'"),
    "config": (
        insert({"registry_name": "to_batch_processor", "config": [1]}),
        "field-value",
        r"to_batch_processor: expected an object config, found \[1\]",
    ),
    "unknown field": (
        set_step(NORMALIZE, clip=5), "field-unknown", f"{NORMALIZE}: expected the fields .* clip"
    ),
    "unknown field, none known": (
        set_step("to_batch_processor", copy=True), "field-unknown", "to_batch_processor: .* copy"
    ),
    "eps": (set_step(NORMALIZE, eps="1e-8"), "field-value", "eps: expected a number"),
    "eps null": (set_step(UNNORMALIZE, eps=None), "field-value", "eps: .* found none"),
    "mode": (
        set_step(NORMALIZE, norm_map={"STATE": "MAGIC"}),
        "field-value",
        "expected norm_map STATE to be one of IDENTITY, .* found MAGIC",
    ),
    "type": (set_step(NORMALIZE, norm_map={"TOUCH": "IDENTITY"}), "field-value", "found TOUCH"),
    "no norm_map": (set_step(NORMALIZE, norm_map=None), "field-value", "norm_map: expected"),
    "feature": (
        set_step(NORMALIZE, features={STATE: {"type": "STATE"}}), "field-value", "a shape, found"
    ),
    "inline stats": (set_step(NORMALIZE, stats={STATE: {}}), "field-value", "stats: expected none"),
    "dtype": (set_step(NORMALIZE, dtype="float16"), "field-value", "dtype: expected none"),
    "observation keys": (
        set_step(NORMALIZE, normalize_observation_keys=STATE),
        "field-value",
        "normalize_observation_keys: expected a list",
    ),
    "float_dtype": (
        set_step("device_processor", float_dtype="bfloat16"),
        "field-value",
        "device_processor float_dtype: expected one of .* found 'bfloat16'",
    ),
    "task_key": (set_step(TOKENIZE, task_key="goal"), "field-value", "task_key: expected 'task'"),
    "max_length": (set_step(TOKENIZE, max_length=True), "field-value", "max_length: expected"),
    "max_length without end": (
        set_step(TOKENIZE, max_length=2**70), "field-value", "max_length: expected 1 to 100000 tok"
    ),
    "padding": (set_step(TOKENIZE, padding="both"), "field-value", "padding: expected one of"),
    "padding_side": (set_step(TOKENIZE, padding_side="top"), "field-value", "found 'top'"),
    "truncation": (set_step(TOKENIZE, truncation="only_second"), "field-value", "truncation: "),
    "tokenizer": (
        set_step(TOKENIZE, tokenizer_name="bert-base-uncased"),
        "tokenizer-other",
        "expected PaliGemma's, found bert-base-uncased. .* --tokenizer",
    ),
    "rename_map": (set_step(RENAME, rename_map={"a": 1}), "field-value", "rename_map: expected"),
    "enabled": (set_step(RELATIVE, enabled="yes"), "field-value", "enabled: expected one of"),
    "exclude_joints": (
        set_step(RELATIVE, exclude_joints="grip"), "field-value", "exclude_joints: expected a list"
    ),
    "two normalizers": (
        lambda f: f.before.append(f.step(NORMALIZE)), "step-repeated", f"one step {NORMALIZE}"
    ),
    "two absolutes": (
        lambda f: f.after.append(f.step(ABSOLUTE)), "step-repeated", f"one step {ABSOLUTE}"
    ),
    "relative after normalizer": (
        each(relative, move_last(RELATIVE)), "step-order", f"expected {RELATIVE} before {NORMALIZE}"
    ),
    "unnormalizer after absolute": (
        each(relative, move_last(UNNORMALIZE)), "step-order", f"{UNNORMALIZE} before {ABSOLUTE}"
    ),
    "rename after normalizer": (
        each(set_step(RENAME, rename_map={"a": "b"}), move_last(RENAME)),
        "step-order",
        f"expected {RENAME} before {NORMALIZE}",
    ),
    "relative only": (
        set_step(RELATIVE, enabled=True), "relative-one-sided", "relative actions as absolute ones"
    ),
    "absolute only": (
        set_step(ABSOLUTE, enabled=True), "relative-one-sided", "sent the state twice"
    ),
    "absolute without relative": (
        each(remove(RELATIVE), set_step(ABSOLUTE, enabled=True)),
        "relative-one-sided",
        f"{ABSOLUTE} enabled and {RELATIVE} not",
    ),
    "short state": (
        each(
            relative,
            *(set_statistic(f"{STATE}.{name}", [1.0] * 4) for name in ("mean", "std")),
        ),
        "relative-width",
        r"at least as long as an action \(5\), found 4",
    ),
    "no normalizer": (remove(NORMALIZE), "step-missing", f"{PRE}: expected a step {NORMALIZE}"),
    "no unnormalizer": (remove(UNNORMALIZE), "step-missing", f"{POST}: .* step {UNNORMALIZE}"),
    "no statistics of the state": (
        lose(STATE), "statistics-missing", f"statistics of {STATE} .* --norm-stats"
    ),
    "no statistics of actions": (
        lose("action"), "statistics-missing", f"{UNNORMALIZE}: expected statistics of action"
    ),
    "no mean": (lose(f"{STATE}.mean"), "statistics-form", "expected mean and std .* no mean"),
    "no q10": (
        each(
            lose(f"{STATE}.q10"),
            lambda f: f.set_modes({"STATE": "QUANTILE10", "ACTION": "IDENTITY"}),
        ),
        "statistics-form",
        "expected q10 and q90 for mode QUANTILE10, found no q10",
    ),
    "no statistics of a camera": (
        each(lose(CAMERAS[1]), lambda f: f.set_modes(VISUAL)),
        "statistics-missing",
        f"statistics of {CAMERAS[1]} for mode MEAN_STD",
    ),
    "per-pixel statistics": (
        each(
            set_statistic(f"{CAMERAS[0]}.mean", np.ones((3, 2, 2))),
            lambda f: f.set_modes(VISUAL),
        ),
        "statistics-form",
        r"to be a vector, found shape \[3, 2, 2\]",
    ),
    "two statistics per image": (
        each(
            *(set_statistic(f"{CAMERAS[0]}.{name}", [1.0, 1.0]) for name in ("mean", "std")),
            lambda f: f.set_modes(VISUAL),
        ),
        "statistics-form",
        r"expected one value per channel \(3\), found 2",
    ),
    "state is no feature": (
        set_step(NORMALIZE, features={}),
        "statistics-missing",
        f"{NORMALIZE} features: expected {STATE}, which its norm_map normalises, found none",
    ),
    "actions are an image": (
        set_step(UNNORMALIZE, features={"action": {"type": "VISUAL", "shape": [5]}}),
        "field-value",
        f"{UNNORMALIZE} features: expected action to be of type ACTION, found VISUAL",
    ),
    "the state twice in the prompt": (
        lambda f: f.before.extend([{"registry_name": ADD_STATE}] * 2),
        "step-repeated",
        f"one step {ADD_STATE}, found several",
    ),
    "no spread and no eps": (
        each(
            set_statistic(f"{STATE}.std", [0.0] * 6), *(set_step(name, eps=0) for name in BOTH)
        ),
        "statistics-form",
        "expected a spread or an eps above 0, found neither at index 0",
    ),
    "scalar": (set_statistic(f"{STATE}.mean", 1.0), "statistics-form", r"vector, found shape \[\]"),
    "empty": (set_statistic(f"{STATE}.mean", []), "statistics-form", r"vector, found shape \[0\]"),
    "NaN": (
        set_statistic("action.std", [1, 1, float("nan"), 1, 1]), "statistics-form", "finite values"
    ),
    "other lengths": (
        set_statistic("action.std", [1.0, 2.0]), "statistics-form", r"mean \[5\] and std \[2\]"
    ),
    "aloha": (
        lambda f: f.config.update(adapt_to_pi_aloha=True), "robot-needed", "--robot aloha_sim"
    ),
    "aloha, relative": (
        lambda f: f.config.update(adapt_to_pi_aloha=True, use_delta_joint_actions_aloha=True),
        "robot-needed",
        "--robot aloha.$",
    ),
    "relative as of old": (
        lambda f: f.config.update(use_delta_joint_actions_aloha=True), "robot-needed", "--robot"
    ),
    "no cameras": (
        lambda f: f.config.update(input_features={}), "cameras-missing", "type VISUAL.* --robot"
    ),
    "features are a list": (
        lambda f: f.config.update(input_features=[]), "feature-form", "expected an object of feat"
    ),
    "feature without a type": (
        lambda f: f.config["input_features"].update({STATE: {"shape": [6]}}),
        "feature-form",
        f"expected {STATE} to have a type",
    ),
    "state is a matrix": (
        lambda f: f.config["input_features"].update({STATE: {"type": "STATE", "shape": [6, 1]}}),
        "feature-form",
        r"shape \[D\], found \[6, 1\]",
    ),
    "chunk_size": (
        lambda f: f.config.update(chunk_size="50"), "feature-form", "chunk_size: expected a count"
    ),
    "n_action_steps": (
        lambda f: f.config.update(n_action_steps=51), "action-steps", "at most the chunk_size of 50"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, folder: LerobotFolder) -> None:
    edit, code, sentence = REFUSED[name]
    edit(folder)
    program = read(folder)
    assert code in codes(program), program.findings
    with pytest.raises(Pi0Error, match=sentence):
        raise Pi0Error(sentences(program))


CARRIED_OUT: dict[str, Edit] = {
    "device": set_step("device_processor", device="cuda:3", float_dtype="float32"),
    "no device": set_step("device_processor", device=None),
    "normalizer on a device": set_step(NORMALIZE, device="cuda"),
    "twice to a batch": insert({"registry_name": "to_batch_processor"}),
    "parts of a batch": each(
        insert({"registry_name": "to_batch_processor_action"}),
        insert({"registry_name": "to_batch_processor_observation"}),
        insert({"registry_name": "to_batch_processor_complementary_data"}),
    ),
    "after to a batch": insert({"registry_name": "to_batch_processor", "config": {}}, before=False),
    "no batch": remove("to_batch_processor"),
    "no rename": remove(RENAME),
    "neither relative nor absolute": each(remove(RELATIVE), remove(ABSOLUTE)),
    "relative disabled and last": move_last(RELATIVE),
    "empty rename last": move_last(RENAME),
    "padding longest": set_step(TOKENIZE, padding="longest"),
    "tokenizer in a folder": set_step(TOKENIZE, tokenizer_name="/models/paligemma"),
    "empty stats": set_step(NORMALIZE, stats={}),
    "state as a second class": lambda f: f.config["input_features"].update(
        {STATE: {"type": "STATE", "shape": [32]}}
    ),
    "no state": lambda f: f.config["input_features"].pop(STATE),
    "no actions": lambda f: f.config.update(output_features={}),
    "null actions": lambda f: f.config.update(output_features=None),
    "no tokenizer": each(remove(TOKENIZE), remove("pi0_new_line_processor")),
    "both keys for a step": insert({"registry_name": "to_batch_processor", "class": "x.Y"}),
}


@pytest.mark.parametrize("name", CARRIED_OUT)
def test_no_difference(name: str, folder: LerobotFolder) -> None:
    CARRIED_OUT[name](folder)
    program = read(folder)
    assert program.findings == ()
    assert (program.cameras, program.state.width, program.action_dim) == (CAMERAS, 6, 5)
    assert program.newline
    assert program.relative is None


def test_a_line_break_after_the_state_ends_the_prompt_whatever_was_before(
    folder: LerobotFolder,
) -> None:
    add_state = {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}
    newline = folder.step("pi0_new_line_processor")
    folder.before.sort(key=lambda step: step["registry_name"] == TOKENIZE)
    folder.before[-1:-1] = [newline, add_state]
    assert not read(folder).newline
    folder.before.insert(-1, newline)
    assert read(folder).newline


def test_cameras_go_by_type(folder: LerobotFolder) -> None:
    keys = ("observation.image", "observation.image.top", "observation.images.a", "front")
    state = folder.config["input_features"].pop(STATE)
    folder.config["input_features"] = {
        key: {"type": "VISUAL", "shape": [3, 8, 8]} for key in keys
    } | {STATE: state}
    program = read(folder)
    assert program.cameras == keys
    assert program.findings == ()


def test_unread_features_are_warned_of(folder: LerobotFolder) -> None:
    folder.config["input_features"]["observation.joints"] = {"type": "STATE", "shape": [3]}
    program = read(folder)
    assert codes(program) == ["features-unread"]
    assert "observation.joints" in sentences(program, "warning")


def test_renames_chain(folder: LerobotFolder) -> None:
    """The values: test_lerobot_parity.py, "rename"."""
    first, second = {"front": "x", "same": "same"}, {"x": CAMERAS[0], "y": CAMERAS[1]}
    folder.set(RENAME, {"rename_map": first})
    folder.before.insert(1, {"registry_name": RENAME, "config": {"rename_map": second}})
    program = read(folder)
    assert program.rename == {"front": CAMERAS[0], "x": CAMERAS[0], "y": CAMERAS[1]}


def test_statistics_decide_lengths(folder: LerobotFolder) -> None:
    folder.config["input_features"][STATE]["shape"] = [7]
    program = read(folder)
    assert program.state.width == STATE_DIM
    assert codes(program) == ["feature-width"]
    assert f"{STATE} to be as long as its statistics (6), found 7" in sentences(program, "warning")


@pytest.mark.parametrize("names", [("mean", "std"), ("std",)])
def test_statistics_of_one_value_hold_for_all(
    folder: LerobotFolder, names: tuple[str, ...]
) -> None:
    """As in LeRobot, which broadcasts them."""
    folder.set_modes({"STATE": "MEAN_STD", "ACTION": "MEAN_STD", "VISUAL": "MEAN_STD"})
    assert folder.statistics is not None
    for key in (STATE, "action", *CAMERAS):
        for name in names:
            values = folder.statistics[f"{key}.{name}"]
            folder.statistics[f"{key}.{name}"] = values.flatten()[:1].clone()
    program = read(folder)
    assert program.findings == ()
    assert (program.state.width, program.action_dim) == (STATE_DIM, ACTION_DIM)
    std = float(folder.statistics["action.std"][0])
    moved = program.actions.unnormalize(np.ones(5)) - program.actions.unnormalize(np.zeros(5))
    np.testing.assert_allclose(moved, [std] * 5, rtol=1e-6)
    assert {len(images.scale) for images in program.images.values()} == {3}


@pytest.mark.parametrize("names", [("mean", "std"), ("std",)])
def test_statistics_of_one_value_without_declared_widths(
    folder: LerobotFolder, names: tuple[str, ...]
) -> None:
    """They are as wide as others, and else as the model."""
    folder.config["input_features"].pop(STATE)
    folder.config["output_features"] = {}
    assert folder.statistics is not None
    for key in (STATE, "action"):
        for name in names:
            values = folder.statistics[f"{key}.{name}"]
            folder.statistics[f"{key}.{name}"] = values[:1].clone()
    program = read(folder)
    assert program.findings == ()
    expected = (32, 32) if len(names) == 2 else (STATE_DIM, ACTION_DIM)
    assert (program.state.width, program.action_dim) == expected


@pytest.mark.parametrize("mode", ["MEAN_STD", "IDENTITY"])
def test_statistics_of_one_value_alone_decide_no_length(folder: LerobotFolder, mode: str) -> None:
    """Any state fits them, as in LeRobot, whether they are used or not."""
    folder.config["input_features"].pop(STATE)
    folder.config["output_features"] = {}
    folder.set_modes({"STATE": mode, "ACTION": mode})
    folder.statistics = {
        f"{key}.{name}": torch.ones(1) for key in (STATE, "action") for name in ("mean", "std")
    }
    program = read(folder)
    assert program.findings == ()
    assert (program.state_dim, program.state.width, program.action_dim) == (None, 32, 32)


def test_unused_statistics_decide_nothing(folder: LerobotFolder) -> None:
    folder.set_modes({"STATE": "IDENTITY", "ACTION": "IDENTITY"})
    assert folder.statistics is not None
    for key in (STATE, "action"):
        folder.statistics[f"{key}.mean"] = torch.zeros(3)
        folder.statistics[f"{key}.count"] = torch.zeros(9)
    program = read(folder)
    assert program.findings == ()
    assert (program.state.width, program.action_dim) == (STATE_DIM, ACTION_DIM)


def test_identity_needs_no_statistics(folder: LerobotFolder) -> None:
    folder.statistics = None
    folder.set_modes({"STATE": "IDENTITY", "ACTION": "IDENTITY"})
    program = read(folder)
    assert program.findings == ()
    assert (program.state.width, program.action_dim) == (STATE_DIM, ACTION_DIM)
    folder.config["input_features"].pop(STATE)
    folder.config["output_features"] = {}
    program = read(folder)
    assert (program.state.width, program.action_dim) == (32, 32)


@pytest.mark.parametrize("keys", [[], [CAMERAS[0]]])
def test_observation_keys_without_the_state(folder: LerobotFolder, keys: list[str]) -> None:
    folder.set(NORMALIZE, {"normalize_observation_keys": keys})
    program = read(folder)
    assert program.findings == ()
    assert program.state.normalize(np.arange(6.0)).tolist() == list(range(6))
    assert program.actions.scale.tolist() != [1.0] * ACTION_DIM


def test_no_norm_map_is_identity(folder: LerobotFolder) -> None:
    folder.set_modes({})
    program = read(folder)
    assert program.findings == ()
    assert program.state.normalize(np.arange(6.0)).tolist() == list(range(6))


def test_base_checkpoints_carry_no_statistics(folder: LerobotFolder) -> None:
    for name in BOTH:
        folder.set(name, {"features": {}})
        del folder.step(name)["state_file"]
    program = read(folder)
    assert set(codes(program)) == {"statistics-missing"}
    assert f"{PRE}: expected {NORMALIZE} to name a state_file" in sentences(program)
    assert "this checkpoint carries no statistics. " in sentences(program)
    given = read(folder, statistics={"state": UNIT, "actions": UNIT})
    assert codes(given) == ["feature-width", "feature-width"]
    assert (given.state.width, given.action_dim) == (3, 3)


def test_statistics_file_missing(folder: LerobotFolder) -> None:
    folder.statistics = None
    program = read(folder)
    expected = (
        f"{PRE}: expected the statistics file of {NORMALIZE}, found .*pre.safetensors missing"
    )
    with pytest.raises(Pi0Error, match=expected):
        raise Pi0Error(sentences(program))


@pytest.mark.parametrize("name", [PRE, "pre.safetensors", "config.json"])
def test_damaged_files(name: str, folder: LerobotFolder) -> None:
    path = folder.write()
    settings = read_json(path / "config.json")
    (path / name).write_text("version https://git-lfs.github.com/spec/v1")
    if name == "config.json":
        assert read_program(path, {}).cameras == ()
        return
    with pytest.raises(CheckpointError, match=name):
        read_program(path, settings)


def test_no_statistics_of_targets(folder: LerobotFolder) -> None:
    """Only training needs them."""
    path = folder.write()
    lose("action")(folder)
    assert folder.statistics is not None
    save_file(folder.statistics, path / "pre.safetensors")
    program = read_program(path, read_json(path / "config.json"))
    assert program.findings == ()
    assert program.actions_in is None


@pytest.mark.parametrize("name", [PRE, POST])
def test_one_processor_missing(name: str, folder: LerobotFolder) -> None:
    path = folder.write()
    settings = read_json(path / "config.json")
    (path / name).unlink()
    for options in ({}, {"statistics": {"state": UNIT, "actions": UNIT}}):
        program = read_program(path, settings, **options)
        assert codes(program)[:1] == ["processor-missing"]
        assert f"expected {name} beside the other" in sentences(program)
        assert len(sentences(program).splitlines()) == 1, "what follows from it is not said"


def test_no_processors(folder: LerobotFolder) -> None:
    """config.json alone: what LeRobot would build for it, but not without statistics."""
    folder.config |= {
        "use_relative_actions": True,
        "action_feature_names": ["a", "b", "c", "d", "Gripper"],
        "tokenizer_max_length": 64,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "MIN_MAX"},
    }
    path = folder.write()
    for name in (PRE, POST):
        (path / name).unlink()
    program = read_program(path, folder.config)
    assert codes(program) == ["processors-missing"]
    assert f"expected {PRE} and {POST}" in sentences(program)
    assert "--norm-stats" in sentences(program)
    bounds = {name: np.full(6, value) for name, value in (("q01", -2.0), ("q99", 2.0))}
    limits = {name: np.full(5, value) for name, value in (("min", 0.0), ("max", 4.0))}
    program = read_program(path, folder.config, statistics={"state": bounds, "actions": limits})
    assert codes(program) == ["processors-assumed"]
    assert program.state.normalize(np.ones(6)).tolist() == [0.5] * 6
    assert program.actions.unnormalize(np.zeros(5)).tolist() == [2.0] * 5
    assert program.relative == (True, True, True, True, False)
    assert (program.newline, program.max_tokens) == (True, 64)


def test_names_that_two_actions_have_are_none(folder: LerobotFolder) -> None:
    """LeRobot reads them; the robot's actions are numbered then."""
    program = read(folder)
    for names in (["a", "b", "c", "d", "e"], ["a", "b", "c", "d", "a"]):
        robot = robot_of(program, {**folder.config, "action_feature_names": names})
        assert robot.action_names == (tuple(names) if len({*names}) == 5 else ())


def test_callers_mode_and_statistics(folder: LerobotFolder) -> None:
    program = read(folder, norm_mode="min_max")
    assert folder.statistics is not None
    low = folder.statistics[f"{STATE}.min"].double().numpy()
    np.testing.assert_allclose(program.state.normalize(low), -1)
    program = read(folder, statistics="none")
    assert program.state.normalize(np.arange(6.0)).tolist() == list(range(6))
    folder.set_modes({"STATE": "IDENTITY", "ACTION": "MEAN_STD"})
    program = read(folder, statistics={"state": UNIT, "actions": UNIT})
    assert codes(program) == ["statistics-unused", "feature-width"]
    folder.set_modes({"STATE": "MEAN_STD"}, normalize_observation_keys=[CAMERAS[0]])
    for mode in (None, "mean_std"):
        program = read(folder, statistics={"state": UNIT, "actions": UNIT}, norm_mode=mode)
        assert codes(program)[0] == "statistics-unused"
        assert "found normalize_observation_keys without it" in sentences(program, "warning")
    with pytest.raises(Pi0Error, match="norm_mode: expected one of .* found 'magic'"):
        read(folder, norm_mode="magic")


def test_a_robot_or_tokenizer_given(folder: LerobotFolder) -> None:
    folder.config |= {"adapt_to_pi_aloha": True, "input_features": {}}
    folder.set(TOKENIZE, {"tokenizer_name": "other"})
    assert read(folder, robot_given=True, tokenizer_given=True).findings == ()


def test_no_spread_is_warned_of(folder: LerobotFolder) -> None:
    set_statistic(f"{STATE}.std", [1.0, 0.0, 1.0, 1.0, 0.0, 1.0])(folder)
    program = read(folder)
    assert codes(program) == ["no-spread"]
    assert "no spread in 1, 4" in sentences(program, "warning")


def test_no_type_and_no_tokenizer(folder: LerobotFolder) -> None:
    del folder.config["type"]
    remove(TOKENIZE)(folder)
    assert codes(read(folder)) == ["tokenizer-assumed"]


@given(
    names=st.none() | st.lists(st.one_of(st.text(max_size=4), st.integers()), max_size=9),
    words=st.none() | st.lists(st.one_of(st.text(max_size=3), st.integers(), st.none())),
    width=st.integers(1, 8),
)
def test_relative_masks(names: list[Any] | None, words: list[Any] | None, width: int) -> None:
    mask = relative_mask(names, words, width)
    assert len(mask) == width
    assert all(mask[len(names or ()) :])
    if not any(words or ()):
        assert all(mask)


@given(
    mode=st.sampled_from(["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"]),
    eps=st.sampled_from([1e-8, 1e-3]),
    low=st.floats(-100, 100),
    span=st.sampled_from([0.0, 0.5, 100.0]),
)
def test_modes(mode: str, eps: float, low: float, span: float) -> None:
    """LeRobot's formulas, written once more. 1e-9 of the scale is float64's rounding."""
    statistics = {name: np.array([low]) for name in ("mean", "min", "q01", "q10")}
    statistics |= {name: np.array([low + span]) for name in ("max", "q99", "q90")}
    statistics["std"] = np.array([span])
    normalizer = lerobot_normalizer("state", mode, eps, statistics)
    x = np.array([low + 0.25])
    width = statistics["max"] - low
    if mode == "MEAN_STD":
        expected, back = (x - low) / (span + eps), x * span + low
    else:
        width = width if width[0] else eps
        expected, back = 2 * (x - low) / width - 1, (x + 1) * width / 2 + low
    ours = normalizer.normalize(x)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(normalizer.unnormalize(x), back, rtol=1e-9, atol=1e-9)


ODD = (None, True, -1, 1e400, "\ud800", [None], {"a": None})


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_odd_values_give_findings_not_tracebacks(odd: Any, folder: LerobotFolder) -> None:
    folder.statistics = None  # thousands of reads
    path = folder.write()
    documents = {name: read_json(path / name) for name in (PRE, POST, "config.json")}
    for name, document in documents.items():
        for place in _places(document):
            edited = json.loads(json.dumps(document))
            target = edited
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = odd
            (path / name).write_text(json.dumps(edited))
            settings = edited if name == "config.json" else documents["config.json"]
            program = read_program(path, settings)
            assert all(finding.sentence for finding in program.findings)
        (path / name).write_text(json.dumps(document))


def _places(value: Any) -> list[tuple[Any, ...]]:
    """The keys that lead to each value inside a JSON document."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [(key, *rest) for key, inner in items for rest in ((), *_places(inner))]
