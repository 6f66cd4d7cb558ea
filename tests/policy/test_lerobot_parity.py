"""Programs against LeRobot's own processors, and against a whole folder that LeRobot ran.

Tolerance: 1e-6 of the largest value. LeRobot computes in float32 from float32 statistics, ours in
float64 from the same statistics.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_folder import ACTION_DIM, CAMERAS, STATE_DIM, LerobotFolder
from numpy.typing import NDArray

from pi0.checkpoint.files import read_json
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import byte_tokenizer, synthesise
from pi0.config import PRESETS
from pi0.errors import EngineError
from pi0.peers.engine import LerobotEngine
from pi0.policy.lerobot import LerobotProgram, read_program
from pi0.policy.normalize import Normalizer

TOLERANCE = 1e-6
WORKER = Path(__file__).with_name("lerobot_worker.py")
STATE = "observation.state"
SYNTHESISED_CAMERAS = tuple(
    f"observation.images.{name}_0_rgb" for name in ("base", "left_wrist", "right_wrist")
)
Floats = NDArray[np.float64]


def read(folder: Path) -> LerobotProgram:
    program = read_program(folder, read_json(folder / "config.json"))
    assert not [finding for finding in program.findings if finding.severity == "error"]
    return program


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(theirs).max())


def normalized(normalizer: Normalizer, x: Floats) -> Floats:
    return normalizer.normalize(x)


Edit = Callable[[LerobotFolder], object]
MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")


def modes(mode: str, **fields: object) -> Edit:
    return lambda folder: folder.set_modes(
        {"STATE": mode, "ACTION": mode, "VISUAL": mode}, **fields
    )


def flat(folder: LerobotFolder) -> None:
    """The first dimension of the state and the second of actions never moved."""
    folder.set_modes({"STATE": "MIN_MAX", "ACTION": "QUANTILES"}, eps=1e-3)
    assert folder.statistics is not None
    folder.statistics[f"{STATE}.min"][0] = folder.statistics[f"{STATE}.max"][0]
    folder.statistics["action.q01"][1] = folder.statistics["action.q99"][1]


def rename(folder: LerobotFolder) -> None:
    """Two renames, of which the second goes on from the first and swaps."""
    first = folder.step("rename_observations_processor")
    first["config"]["rename_map"] = {CAMERAS[0]: "observation.images.x", "nothing": "too"}
    second = {CAMERAS[1]: CAMERAS[0], "observation.images.x": CAMERAS[1]}
    folder.before.insert(1, first | {"config": {"rename_map": second}})


def state_as_action(folder: LerobotFolder) -> None:
    """Observations of this type are not normalised."""
    folder.set_modes({"STATE": "MEAN_STD", "ACTION": "MEAN_STD"})
    folder.step("normalizer_processor")["config"]["features"][STATE]["type"] = "ACTION"


def padding(folder: LerobotFolder) -> None:
    folder.set("tokenizer_processor", {"max_length": 72, "padding_side": "left"})


def newline_too_late(folder: LerobotFolder) -> None:
    step = folder.step("pi0_new_line_processor")
    folder.before.remove(step)
    folder.before.append(step)


def state_too_late(folder: LerobotFolder) -> None:
    """The step of π0.5 has no effect after the tokenizer, on the line break either."""
    name = "pi05_prepare_state_tokenizer_processor_step"
    folder.before.append({"registry_name": name, "config": {}})


def relative_after(folder: LerobotFolder) -> None:
    """Disabled relative actions may stand anywhere."""
    step = folder.step("relative_actions_processor")
    folder.before.remove(step)
    folder.before.append(step)


NAMES = ["Shoulder", "elbow", "wrist_5", "Gripper.pos", "x"]
EDITS: dict[str, Edit] = {
    **{f"{mode}, eps {eps}": modes(mode, eps=eps) for mode in MODES for eps in (1e-8, 0.01)},
    "state only": modes("MEAN_STD", normalize_observation_keys=[STATE]),
    "not the state": modes("MEAN_STD", normalize_observation_keys=[CAMERAS[0]]),
    "no STATE": lambda folder: folder.set_modes({"ACTION": "MIN_MAX"}),
    "flat": flat,
    "state as an action": state_as_action,
    "rename": rename,
    "padding": padding,
    "newline too late": newline_too_late,
    "state too late": state_too_late,
    "relative after": relative_after,
    "all relative": lambda folder: folder.set_relative(exclude_joints=[], action_names=None),
    "no names": lambda folder: folder.set_relative(exclude_joints=["gripper"], action_names=None),
    "gripper": lambda folder: folder.set_relative(exclude_joints=["gripper"], action_names=NAMES),
    "words": lambda folder: folder.set_relative(
        exclude_joints=["", "ELBOW", 5, None], action_names=NAMES
    ),
    "too few names": lambda folder: folder.set_relative(
        exclude_joints=["elbow"], action_names=NAMES[:2]
    ),
    "too many names": lambda folder: folder.set_relative(
        exclude_joints=["gripper", "x"], action_names=[*NAMES, "gripper"]
    ),
}


SYNTHESISED = "pi0 synth"


def random_inputs(state_dim: int, action_dim: int, cameras: tuple[str, ...]) -> dict[str, Floats]:
    rng = np.random.default_rng(1)
    arrays = {
        STATE: rng.normal(0, 2, state_dim),
        "action": rng.normal(0, 2, (1, 7, action_dim)),
        "model_actions": rng.normal(0, 1, (1, 7, action_dim)),
        **{camera: rng.uniform(0, 1, (3, 8, 9)) for camera in cameras},
    }
    return {name: value.astype(np.float32) for name, value in arrays.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every edited folder and a synthesised one, with the answers of LeRobot, started once."""
    try:
        python = LerobotEngine.python()
    except EngineError:
        pytest.skip("needs LeRobot in .venv-lerobot (make .venv-lerobot/installed)")
    root = tmp_path_factory.mktemp("folders")
    paths = {}
    for index, (name, edit) in enumerate(EDITS.items()):
        paths[name] = root / str(index)
        paths[name].mkdir()
        folder = LerobotFolder(paths[name])
        edit(folder)
        folder.write()
        arrays = random_inputs(STATE_DIM, ACTION_DIM, CAMERAS)
        np.savez(paths[name] / "inputs.npz", **arrays)
    paths[SYNTHESISED] = root / "synthesised"
    synthesise(paths[SYNTHESISED], PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    arrays = random_inputs(32, 32, SYNTHESISED_CAMERAS)
    np.savez(paths[SYNTHESISED] / "inputs.npz", **arrays)
    words = paths[SYNTHESISED] / "tokenizer.json"
    subprocess.run([python, WORKER, words, *paths.values()], check=True)
    return paths


@pytest.mark.parametrize("name", [*EDITS, SYNTHESISED])
def test_as_lerobot(name: str, folders: dict[str, Path]) -> None:
    program = read(folders[name])
    inputs = {
        key: value.astype(np.float64)
        for key, value in np.load(folders[name] / "inputs.npz").items()
    }
    theirs = dict(np.load(folders[name] / "lerobot.npz"))
    close(normalized(program.state, inputs[STATE]), theirs[STATE][0])
    renamed = {program.rename.get(key, key): value for key, value in inputs.items()}
    for camera in program.cameras:
        pixels = renamed[camera]
        if camera in program.images:
            pixels = normalized(program.images[camera], pixels.T).T
        close(pixels, theirs[camera][0])
    mask = program.relative or (False,) * program.action_dim
    offset = np.where(mask, inputs[STATE][: program.action_dim], 0)
    assert program.actions_in is not None
    close(normalized(program.actions_in, inputs["action"] - offset), theirs["action"])
    close(program.actions.unnormalize(inputs["model_actions"]) + offset, theirs["decoded"])
    text = "pick up the cube" + "\n" * program.newline
    ids = byte_tokenizer().encode(text, add_special_tokens=False).ids
    assert program.max_tokens is not None
    pad = [0] * (program.max_tokens - len(ids))
    expected = [*ids, *pad] if program.padding_side == "right" else [*pad, *ids]
    assert theirs["observation.language.tokens"][0].tolist() == expected


def test_synthesised_processors(tmp_path: Path) -> None:
    """They leave values as they are."""
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    program = read(tmp_path)
    assert program.cameras == SYNTHESISED_CAMERAS
    assert (program.state.width, program.action_dim, program.max_tokens) == (32, 32, 48)
    assert (program.findings, program.images, program.relative) == ((), {}, None)
    x = np.linspace(-3, 3, 32)
    close(normalized(program.state, x), x)
    close(program.actions.unnormalize(x), x)
    config = read_json(tmp_path / "config.json")
    assert config["type"] == "pi0"
    assert open_checkpoint(tmp_path).config == PRESETS["tiny"]
    names = {path.name for path in tmp_path.glob("policy_*.safetensors")}
    assert names == {
        "policy_preprocessor_step_6_normalizer_processor.safetensors",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    }
