"""Robots in TOML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi0.errors import ConfigError
from pi0.policy import Camera, find_robot

ARM = """
name = "arm"
control_hz = 30
ignored = ["battery"]

[[cameras]]
key = "images/top"
names = ["top"]

[[cameras]]
key = "images/wrist"
names = ["wrist"]
required = false

[[state]]
key = "joints"
length = 2

[[state]]
key = "gripper"
length = 1

[[actions]]
name = "shoulder"
unit = "rad"
relative = true
low = -1.5
high = 1.5
step = 0.1

[[actions]]
name = "elbow"
unit = "rad"
relative = true

[[actions]]
name = "gripper"
low = 0
high = 1
state = 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "arm.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_one(tmp_path: Path) -> None:
    robot = find_robot(write(tmp_path, ARM))
    assert robot.name == "arm"
    assert robot.cameras == (
        Camera("images/top", ("top",)),
        Camera("images/wrist", ("wrist",), required=False),
    )
    assert (robot.state, robot.action_dim) == ((("joints", 2), ("gripper", 1)), 3)
    assert robot.relative(3).tolist() == [True, True, False]
    assert robot.action_names == ("shoulder", "elbow", "gripper")
    assert robot.action_units == ("rad", "rad", "")
    assert robot.control_hz == 30
    assert robot.limits is not None
    assert robot.limits.low == (-1.5, None, 0)
    assert robot.limits.step == (0.1, None, None)
    assert robot.limits.state == (0, 1, 2)


def test_without_limits(tmp_path: Path) -> None:
    text = "\n".join(
        line for line in ARM.splitlines() if not line.startswith(("low", "high", "step"))
    )
    assert find_robot(write(tmp_path, text)).limits is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "arm"', "", "robot: expected the keys name, .* found no name"),
        ('name = "arm"', 'nmae = "arm"', "found no name and also nmae"),
        ('name = "arm"', "name = 3", "robot.name: expected text, found 3"),
        ("control_hz = 30", "control_hz = 0", "control_hz: expected 0.001 to 1e"),
        ("control_hz = 30", 'control_hz = "fast"', "control_hz: expected a number, found 'fast'"),
        ("required = false", "required = 0", r"cameras\[1\].required: expected true or false"),
        ('names = ["wrist"]', 'names = ["top"]', "expected distinct keys and names, found top"),
        ('names = ["wrist"]', "names = [1]", r"cameras\[1\].names: expected texts"),
        ("length = 2", "length = 2.5", r"state\[0\].length: expected a whole number, found 2.5"),
        ("length = 2", "length = 0", "state: expected lengths of 1 or more"),
        ("length = 2", "length = 1\n[[state]]\nkey = 'joints'\nlength = 1", "distinct keys"),
        ("state = 2", "state = 3", r"actions\[2\].state: expected an index .* found 3"),
        (
            'name = "elbow"',
            'name = "elbow"\nstate = 2',
            r"actions\[1\].state: expected 1, for a relative action .* of its own index, found 2",
        ),
        ("low = 0", "low = 2", "low at most high"),
        ("step = 0.1", "step = -1", "a step of more than 0"),
        ("relative = true\nlow", "relativ = true\nlow", r"actions\[0\]: .* found also relativ"),
        ("[[actions]]", "[actions", "expected a TOML file, found"),
        ('name = "arm"', f"name = {'[' * 100_000}", "expected a TOML file, found"),
        ("low = 0", f"low = {'9' * 5000}", "expected a TOML file, found|expected finite numbers"),
        (
            'name = "elbow"',
            'name = "shoulder"',
            "action_names: .* distinct .* found shoulder twice",
        ),
        ('key = "joints"', 'key = ""', "state: expected distinct keys, at least one"),
        ('key = "joints"', 'key = "prompt"', "keys of their own, found prompt in two"),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path, ARM.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        find_robot(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a TOML file, found none .No such file"):
        find_robot(tmp_path / "none.toml")
