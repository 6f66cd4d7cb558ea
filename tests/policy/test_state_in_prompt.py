"""The prompt of π0.5, which holds the state, and what decides whether it does."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import byte_tokenizer, synthesise
from pi0.cli.main import app
from pi0.config import PRESETS
from pi0.policy import ROBOTS, Policy, PolicyOptions, PolicySetup, prepare
from pi0.policy.tokenizer import PromptFormat, Tokenizer, with_state

STATS = {"mean": [0.0] * 8, "std": [1.0] * 8, "q01": [-2.0] * 8, "q99": [2.0] * 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A π0.5 in openpi's form, with statistics of 8 values, whose config.json says nothing of the
    prompt."""
    folder = tmp_path / "pi05"
    synthesise(folder, PRESETS["pi05_tiny"], LAYOUTS["openpi"], 0, torch.float32)
    text = json.dumps({"norm_stats": {"state": STATS, "actions": STATS}})
    (folder / "assets/synthetic/norm_stats.json").write_text(text)
    edit_config(folder, discrete_state_input=None)
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def made(folder: Path, **options: Any) -> PolicySetup:
    return prepare(open_checkpoint(folder), PolicyOptions(**{"robot": "generic"} | options))


def text_of(pipeline: Any, observation: dict[str, Any]) -> str:
    """The prompt as the byte tokenizer gave it, without <bos>."""
    inputs, _ = pipeline.encode(observation)
    return bytes(int(i) - 4 for i in inputs.tokens[inputs.token_mask][1:]).decode()


def observation(robot: str = "generic") -> dict[str, Any]:
    image = np.zeros((28, 28, 3), np.uint8)
    state = np.array([-2.0, 0.0, 2.0, 1.0, -1.0, 9.0, -9.0, 0.5])
    if robot == "generic":
        return {"images/base": image, "state": state, "prompt": "pick_up\nit "}
    return {
        "observation/image": image,
        "observation/wrist_image": image,
        "observation/state": state,
        "prompt": "pick_up\nit ",
    }


def test_the_bins() -> None:
    """As numpy.digitize has them: 0 is in bin 128, what is below the range in bin -1."""
    values = [-1.001, -1, -1 + 1 / 128, 0, 0.9999, 1, 7]
    prompt = with_state(" turn_left\nnow ", np.array(values))
    assert prompt == "Task: turn left now, State: -1 0 1 128 255 255 255;\nAction: "


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=32))
def test_bins_are_of_equal_width(state: list[float]) -> None:
    bins = with_state("x", np.array(state)).split("State: ")[1].split(";")[0].split()
    for value, found in zip(state, map(int, bins), strict=True):
        low, high = found / 128 - 1, (found + 1) / 128 - 1
        assert found in range(-1, 256)
        assert found == -1 or value >= low
        assert found == 255 or value < high


def test_one_way_of_writing_it_for_both_projects() -> None:
    backend = byte_tokenizer()
    tokenizer = Tokenizer(lambda text: list(backend.encode(text).ids), 2, 260, Path("bytes"))
    state = np.array([0.25])
    a, b = (
        tokenizer.tokenize("go", PromptFormat(name, 60, newline=False, state=True), state)
        for name in ("openpi", "lerobot")
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_normalised_state_is_in_the_prompt(folder: Path) -> None:
    """openpi's 1e-6 on the range puts 0, in its middle, just below bin 128."""
    pipeline = made(folder, state_in_prompt=True).require()
    assert text_of(pipeline, observation()) == (
        "Task: pick up it, State: 0 127 255 191 63 255 -1 159;\nAction: "
    )
    assert pipeline.prompt.max_tokens == 200


def test_without_a_state_the_prompt_is_that_of_pi0(folder: Path) -> None:
    pipeline = made(folder, state_in_prompt=False).require()
    assert text_of(pipeline, observation()) == "pick up it\n"


def test_what_nobody_says_is_assumed_aloud(folder: Path) -> None:
    setup = made(folder)
    assert [finding.code for finding in setup.findings] == ["state-in-prompt-assumed"]
    with pytest.warns(UserWarning, match="--no-state-in-prompt"):
        assert setup.require().prompt.state


@pytest.mark.parametrize("stated", [True, False])
def test_config_json_says_it(folder: Path, stated: bool) -> None:
    edit_config(folder, discrete_state_input=stated)
    setup = made(folder)
    assert not setup.findings
    assert setup.require().prompt.state is stated
    assert setup.describe()["state_in_prompt"] is stated


def test_another_value_is_refused(folder: Path) -> None:
    edit_config(folder, discrete_state_input="yes")
    (finding,) = made(folder).findings
    assert finding.severity == "error"
    assert "discrete_state_input: expected true or false, found yes" in finding.sentence


@pytest.mark.parametrize("name", ["libero", "pi05_libero"])
def test_libero_is_openpis_pi05_libero(folder: Path, name: str) -> None:
    """Absolute actions, and a state that is not read (openpi's `config.py`)."""
    setup = made(folder, robot=name)
    assert [finding.code for finding in setup.findings] == ["actions-statistics-wide"]
    assert setup.pipeline is not None
    pipeline = setup.pipeline
    assert pipeline.robot.name == "pi05_libero"
    assert not pipeline.robot.relative(7).any()
    assert text_of(pipeline, observation("libero")) == "pick up it\n"


def test_the_table_of_pi0s_libero_is_none_of_a_pi05(folder: Path) -> None:
    """Its name means another; the table itself would add the state to actions."""
    finding = made(folder, robot=ROBOTS["libero"]).findings[0]
    assert (finding.code, finding.severity) == ("robot-unknown", "error")
    assert 'robot="libero", which is pi05_libero here' in finding.sentence
    relative = replace(ROBOTS["libero"], name="relative_libero")
    assert made(folder, robot=relative).robot == relative


def test_a_robot_that_was_trained_otherwise(folder: Path) -> None:
    """The checkpoint's files count, and it is said."""
    edit_config(folder, discrete_state_input=True)
    setup = made(folder, robot="libero")
    assert "state-in-prompt-differs" in [finding.code for finding in setup.findings]
    assert setup.pipeline is not None
    assert setup.pipeline.prompt.state
    said = made(folder, robot="libero", state_in_prompt=True)
    assert "state-in-prompt-differs" not in [finding.code for finding in said.findings]


def test_libero_of_pi0_is_relative() -> None:
    from pi0.policy import find_robot

    assert find_robot("libero").relative(7).tolist() == [True] * 6 + [False]
    assert find_robot("libero").state_in_prompt is None


def test_droid_is_the_same_in_both(folder: Path) -> None:
    setup = made(folder, robot="droid", state_in_prompt=True)
    assert setup.require().robot.name == "droid"
    assert not setup.require().robot.relative(8).any()


def test_a_pi0_has_no_state_in_its_prompt(tiny_path: Path) -> None:
    (finding,) = (f for f in made(tiny_path, state_in_prompt=True).findings if "prompt" in f.code)
    assert finding.severity == "error"
    assert "expected a π0.5" in finding.sentence


def test_quantiles_are_the_default(folder: Path) -> None:
    setup = made(folder, state_in_prompt=True)
    assert setup.sources["statistics"].endswith("(quantiles)")


def test_a_long_prompt_is_refused(folder: Path) -> None:
    pipeline = made(folder, state_in_prompt=True).require()
    with pytest.raises(Exception, match="expected at most 200 tokens"):
        pipeline.encode(observation() | {"prompt": "x" * 190})


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_what_is_synthesised_runs_without_a_warning(tmp_path: Path, layout: str) -> None:
    synthesise(tmp_path, PRESETS["pi05_tiny"], LAYOUTS[layout], 0, torch.float32)
    config = PRESETS["pi05_tiny"]
    observed: dict[str, Any] = {"state": np.zeros(config.state_dim), "prompt": "go"}
    observed |= {"images/base": np.zeros((28, 28, 3), np.uint8)}
    robot = "generic"
    if layout == "lerobot":
        robot = None
        observed = {
            "observation.state": observed["state"],
            "observation.images.base_0_rgb": observed["images/base"],
            "task": "go",
        }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Policy.from_checkpoint(tmp_path, robot=robot, engine="reference") as policy:
            first = policy.infer(observed, noise=np.zeros((50, 32)))
            key = "state" if layout == "openpi" else "observation.state"
            other = policy.infer(observed | {key: observed[key] + 0.1}, noise=np.zeros((50, 32)))
    assert np.abs(first["actions"] - other["actions"]).max() > 1e-3, "the state is read"


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    given = ["inspect", str(folder), "--robot", "generic", "--json"]
    found = {
        flag: json.loads(CliRunner().invoke(app, [*given, *flag]).stdout)["policy"]
        for flag in ((), ("--state-in-prompt",), ("--no-state-in-prompt",))
    }
    assert [row["state_in_prompt"] for row in found.values()] == [True, True, False]
    assert [len(row["findings"]) for row in found.values()] == [1, 0, 0]


def test_config_json_and_processors_contradict_each_other(tmp_path: Path) -> None:
    synthesise(tmp_path, PRESETS["pi05_tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    for declared, fits in ((True, True), (False, False)):
        edit_config(tmp_path, discrete_state_input=declared)
        setup = made(tmp_path)
        assert ("prompt-unknown" not in {f.code for f in setup.findings}) == fits
    assert "discrete_state_input as LeRobot's processors" in setup.findings[-1].sentence
    made(tmp_path, state_in_prompt=True).require()


def test_processors_without_the_step_of_the_state(tmp_path: Path) -> None:
    """LeRobot's own π0.5 has it always: the files may be those of a π0."""
    synthesise(tmp_path, PRESETS["pi05_tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    assert not prepare(open_checkpoint(tmp_path), PolicyOptions()).findings
    path = tmp_path / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    content["steps"] = [s for s in content["steps"] if "pi05" not in s["registry_name"]]
    path.write_text(json.dumps(content))
    (found,) = prepare(open_checkpoint(tmp_path), PolicyOptions()).findings
    assert (found.severity, found.code) == ("warning", "state-in-prompt-missing")
    for stated in (True, False):
        setup = prepare(open_checkpoint(tmp_path), PolicyOptions(state_in_prompt=stated))
        assert not setup.findings
        assert setup.require().prompt.state is stated


@pytest.mark.parametrize("stated", [None, False])
def test_a_config_json_that_asks_for_the_state_in_a_pi0s_prompt(
    tiny_path: Path, tmp_path: Path, stated: bool | None
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_path, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"discrete_state_input": True}))
    codes = {f.code: f.severity for f in made(folder, state_in_prompt=stated).findings}
    assert codes.get("prompt-unknown") == ("error" if stated is None else None)


def test_lerobots_states_are_those_of_float32() -> None:
    """At the edge of a bin, that LeRobot's float32 meets exactly."""
    encode = byte_tokenizer().encode
    tokenizer = Tokenizer(lambda text: list(encode(text).ids), 2, 260, Path("bytes"))
    state = np.array([0.4140624985, -0.992187507])
    for convention, bins in (("openpi", "180 0"), ("lerobot", "181 1")):
        form = PromptFormat(convention, 64, state=True, newline=False)
        tokens, mask = tokenizer.tokenize("go", form, state)
        text = bytes(int(i) - 4 for i in tokens[mask][1:]).decode()
        assert text == f"Task: go, State: {bins};\nAction: "
