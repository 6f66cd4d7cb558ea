"""What training starts from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pi0.checkpoint.infer import to_config_json
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import CheckpointError, ConfigError, Pi0Error
from pi0.inputs import random_inputs
from pi0.policy.robots import ROBOTS
from pi0.train.start import Start, find_start, read_sizes

CPU = torch.device("cpu")


def test_presets_files_and_checkpoints(tmp_path: Path, tiny_path: Path) -> None:
    assert find_start("tiny").config == PRESETS["tiny"]
    file = tmp_path / "sizes.json"
    file.write_text(json.dumps(to_config_json(PRESETS["pi05_tiny"])))
    assert find_start(str(file)).config == PRESETS["pi05_tiny"]
    assert find_start(str(file), horizon=7, image_size=56).config.horizon == 7
    start = find_start(str(tiny_path), image_size=56)
    assert start.checkpoint is not None
    assert start.config.vision.image_size == 56
    assert start.model(0, CPU).config == start.config
    with pytest.raises(CheckpointError):
        find_start(str(tmp_path / "nothing"))


def test_random_weights_have_no_base(tiny_path: Path) -> None:
    with pytest.raises(ConfigError, match="--base: expected an adapter to start from, found tiny,"):
        find_start("tiny", tiny_path)


def test_the_robot_of_the_checkpoint(tiny_path: Path) -> None:
    """As named, else as config.json says, as for every other verb; one that is unknown is said."""

    def start(**settings: str) -> Start:
        checkpoint = replace(open_checkpoint(tiny_path), settings=settings)
        return Start("tuned", checkpoint.config, checkpoint)

    assert start().robot(None) == ROBOTS["generic"]
    assert start(robot="tabletop").robot(None) == ROBOTS["tabletop"]
    assert start(robot="tabletop").robot("libero") == ROBOTS["libero"]
    with pytest.raises(Pi0Error, match="tuned: config.json: robot: expected one of .* found 'arm'"):
        start(robot="arm").robot(None)
    assert start(robot="arm").robot("generic") == ROBOTS["generic"]


def test_a_robot_of_anothers_name() -> None:
    """The trained checkpoint would be read as the built-in one's, whose actions may be relative."""
    own = replace(ROBOTS["libero"], delta=())
    with pytest.raises(ConfigError, match="robot libero: expected a name of its own"):
        find_start("tiny").robot(own)
    for name, preset in (("libero", "tiny"), ("pi05_libero", "pi05_tiny"), ("mine", "tiny")):
        robot = replace(ROBOTS.get(name, own), name=name)
        assert find_start(preset).robot(robot) == robot
    with pytest.raises(ConfigError, match="robot libero: expected a name of its own"):
        find_start("pi05_tiny").robot(ROBOTS["libero"])


def test_sizes_in_toml(tmp_path: Path) -> None:
    lines = []
    for name, value in to_config_json(PRESETS["tiny"]).items():
        if not isinstance(value, dict):
            lines.insert(0, f"{name} = {json.dumps(value)}")
        else:
            lines += [f"[{name}]", *(f"{key} = {number}" for key, number in value.items())]
    (tmp_path / "sizes.toml").write_text("\n".join(lines))
    assert read_sizes(tmp_path / "sizes.toml") == PRESETS["tiny"]


def test_a_state_of_pi05_that_is_wider_than_an_action(tmp_path: Path) -> None:
    """What is trained from such sizes is read back: config.json says both widths."""
    sizes = replace(PRESETS["pi05_tiny"], state_dim=40, action_dim=7)
    (tmp_path / "sizes.json").write_text(json.dumps(to_config_json(sizes)))
    assert read_sizes(tmp_path / "sizes.json") == sizes
    for layout in ("openpi", "lerobot"):
        synthesise(tmp_path / layout, sizes, LAYOUTS[layout], 0, torch.float32)
        assert open_checkpoint(tmp_path / layout).config == sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": None}, "found horizon missing"),
        ({"width": 3}, "found width as well"),
        ({"horizon": 0}, "horizon: expected a count, found 0"),
        ({"vlm": 3}, "expected a table vlm, found 3"),
        ({"type": "act"}, "type: expected pi0 or pi05, found 'act'"),
    ],
)
def test_wrong_sizes_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    table = to_config_json(PRESETS["tiny"]) | change
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({k: v for k, v in table.items() if v is not None}))
    with pytest.raises(ConfigError, match=message):
        find_start(str(path))


def test_a_name_that_is_no_preset_lists_those_that_are() -> None:
    with pytest.raises(CheckpointError, match=r"found nothing there\. .*Presets, .* small, tiny"):
        find_start("tinny")
    with pytest.raises(CheckpointError, match=r"found nothing there\. .* a random one there\.$"):
        find_start("./folder")


@pytest.mark.parametrize("name", ["tiny", "small", "pi05_tiny"])
def test_random_weights_keep_their_scale(name: str) -> None:
    """Every stage has values of the order of 1; the seed decides them."""
    start = find_start(name)
    model = start.model(3, CPU)
    again = start.model(3, CPU).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    scales: dict[str, float] = {}

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.is_floating_point():
            scales[name] = float(value.detach().std())
        return value

    inputs, noise = random_inputs(start.config, cameras=2, tokens=8, seed=0)
    model(inputs, noise, torch.tensor([0.5]), tap)
    assert scales.pop("velocity") == scales.pop("action_projection") == 0
    for stage, scale in scales.items():
        assert 0.05 < scale < 5, (stage, scale)
