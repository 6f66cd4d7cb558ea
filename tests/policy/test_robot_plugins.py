"""Robots of other distributions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from plugin import run_with, write_distribution

ROBOT = """
from pi0 import Camera, Robot

ARM = Robot(
    name="arm",
    cameras=(Camera("images/top", ("top",)),),
    state=(("joints", 3),),
    action_dim=3,
    delta=(2, -1),
    action_names=("shoulder", "elbow", "gripper"),
)
NONE = 3
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    robots = {"my_arm": "my_robots:ARM", "broken": "nowhere:ARM", "none": "my_robots:NONE"}
    write_distribution(folder, {"my_robots": ROBOT}, {"pi0.robots": robots})
    return folder


def act(folder: Path, checkpoint: Path, tmp_path: Path, robot: str):
    picture = tmp_path / "top.png"
    Image.new("RGB", (20, 10)).save(picture)
    words = ("act", checkpoint, "--image", f"top={picture}", "--prompt", "go", "--state", "0,0,0")
    return run_with(folder, *words, "--steps", 1, "--robot", robot, "--json")


def test_help_lists_it(installed: Path) -> None:
    done = run_with(installed, "act", "--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "Installed: my_arm, broken, none." in text


def test_act_and_inspect(installed: Path, tiny_path: Path, tmp_path: Path) -> None:
    done = act(installed, tiny_path, tmp_path, "my_arm")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert len(data["actions"][0]) == 3
    assert data["policy"]["robot"]["relative"] == [True, True, False]
    done = run_with(installed, "inspect", tiny_path, "--robot", "my_arm")
    assert "robot arm (named): cameras images/top; state joints [3]" in done.stdout


@pytest.mark.parametrize(
    ("robot", "message"),
    [
        ("broken", "plug-in pi0-mine 1.2 (pi0.robots: broken): expected nowhere:ARM to be import"),
        ("none", "expected my_robots:NONE to be a Robot, found an int"),
        ("r2d2", "pi05_libero, my_arm, broken, none or a file.toml, found 'r2d2'"),
    ],
)
def test_what_is_refused(
    installed: Path, tiny_path: Path, tmp_path: Path, robot: str, message: str
) -> None:
    done = act(installed, tiny_path, tmp_path, robot)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_built_in_name_is_not_taken_over(tmp_path: Path, tiny_path: Path) -> None:
    write_distribution(tmp_path, {"m": ROBOT}, {"pi0.robots": {"libero": "m:ARM"}})
    code = "from pi0.policy import find_robot, ROBOTS; print(find_robot('libero').name)"
    assert run_with(tmp_path, code=code).stdout.strip() == "libero"
    done = run_with(tmp_path, "inspect", tiny_path, "--robot", "r2d2")
    assert "expected a name of its own, found 'libero', which pi0 has itself" in done.stderr
