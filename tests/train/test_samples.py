"""Batches: what is in them is what the policy would see, whoever asks for them."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from episodes import ALONE, PI05_SIZES, ROBOT, SIZES, TASKS, Episodes, make_run
from lerobot_folder import LerobotFolder

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS, Pi0Config
from pi0.data.read import Dataset
from pi0.errors import Pi0Error
from pi0.policy.robots import ROBOTS
from pi0.policy.statistics import find_norm_stats, read_norm_stats
from pi0.train.augment import Augmentation
from pi0.train.checks import examine, examine_conventions, examine_statistics
from pi0.train.prepare import TrainOptions, prepare_run
from pi0.train.samples import Chunks, Samples
from pi0.train.start import Start

CPU = torch.device("cpu")


def samples(tmp_path: Path, episodes: Episodes | None = None, **changes: object) -> Samples:
    return make_run(tmp_path, episodes, **changes).trainer.samples


@pytest.mark.parametrize("config", [SIZES, PI05_SIZES], ids=["pi0", "pi05"])
@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_inputs_are_those_of_the_policy(tmp_path: Path, config: Pi0Config, layout: str) -> None:
    """Exactly, but for padding of the text, which training leaves out where all rows have it."""
    episodes = Episodes()
    made = samples(tmp_path, episodes, config=config, layout=layout)
    batch = made.batch(0, slice(None), CPU)
    for row, frame in enumerate(made.frames_of(0)):
        observation = {
            "observation/image": episodes.pictures["observation.images.base"][frame],
            "observation/wrist_image": episodes.pictures["observation.images.wrist"][frame],
            "observation/state": episodes.column("observation.state")[frame],
            "prompt": episodes.tasks[frame],
        }
        inputs, _ = made.pipeline.encode(observation)
        ours = batch.inputs.row(row)
        length = ours.tokens.shape[1]
        assert torch.equal(ours.images, inputs.images)
        assert torch.equal(ours.tokens, inputs.tokens[:, :length])
        assert torch.equal(ours.token_mask, inputs.token_mask[:, :length])
        assert not inputs.token_mask[:, length:].any()
        assert torch.equal(ours.state, inputs.state)


def test_whether_the_prompt_holds_the_state(tmp_path: Path) -> None:
    """As asked, else as the robot's π0.5 was trained; LeRobot's always does."""
    without = replace(ROBOT, state_in_prompt=False)
    for number, (changes, expected) in enumerate([
        ({}, True),
        ({"robot": without}, False),
        ({"robot": without, "layout": "lerobot"}, True),
        ({"robot": without, "state_in_prompt": True}, True),
        ({"state_in_prompt": False}, False),
    ]):  # fmt: skip
        made = samples(tmp_path / str(number), config=PI05_SIZES, **changes)
        assert made.pipeline.prompt.state == expected
        assert made.pipeline.prompt.newline != expected
    with pytest.raises(Pi0Error, match="expected a π0.5, whose prompt holds the state"):
        samples(tmp_path / "pi0", state_in_prompt=True)
    with pytest.raises(Pi0Error, match="--layout lerobot: expected prompts that hold the state"):
        samples(tmp_path / "pi05", config=PI05_SIZES, state_in_prompt=False, layout="lerobot")


def test_the_layout_of_lerobot_takes_robots_whose_actions_are_absolute(tmp_path: Path) -> None:
    """Files of robots say it of each action."""
    absolute, relative = (replace(ROBOT, delta=(-1, -1, last)) for last in (-1, 1))
    assert samples(tmp_path, robot=absolute, layout="lerobot").pipeline.robot == absolute
    with pytest.raises(Pi0Error, match="--layout lerobot: expected a robot whose actions are abs"):
        samples(tmp_path, robot=relative, layout="lerobot")


def test_states_may_have_several_axes(tmp_path: Path) -> None:
    episodes, plain = Episodes(), Episodes()
    episodes.columns["action"] = plain.columns["action"][:, None]
    made = [samples(tmp_path / str(i), e).batch(0, slice(None), CPU)
            for i, e in enumerate((episodes, plain))]  # fmt: skip
    assert torch.equal(made[0].actions, made[1].actions)


def test_the_installed_robot_that_the_dataset_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pi0.train.checks.robot_names", lambda: [*ROBOTS, "my_arm"])
    episodes = cast(Dataset, Episodes())
    episodes.robot = "my_arm"
    found = examine(episodes, ROBOTS["generic"], SIZES, {}, stated=False)
    assert "Add --robot my_arm" in next(f.sentence for f in found if f.code == "robot")


def test_the_robot_that_the_dataset_names() -> None:
    """It is not taken without being asked for, and neither is another."""
    episodes = cast(Dataset, Episodes())
    episodes.robot = "tabletop"
    generic, table = ROBOTS["generic"], ROBOTS["tabletop"]
    found = {f.code: f for f in examine(episodes, generic, SIZES, {"aux.place": 7}, stated=False)}
    assert "Add --robot tabletop, or --robot generic" in found["robot"].sentence
    assert found["robot"].severity == "error"
    assert "aux.place@7: expected a block from 0 to 1, found 7." in found["block"].sentence
    for robot in (generic, table):
        assert "robot" not in {f.code for f in examine(episodes, robot, SIZES, {})}
    episodes.robot = "somebody's"
    assert "robot" not in {f.code for f in examine(episodes, generic, SIZES, {}, stated=False)}


@pytest.mark.parametrize(("gap", "warned"), [(0.1, False), (0.2, True), (0.01, True)])
def test_a_recording_of_a_server_that_was_asked_now_and_then(gap: float, warned: bool) -> None:
    episodes = Episodes()
    seconds = np.concatenate([np.arange(n) * gap for n in np.diff(episodes.episode_starts)])
    episodes.columns["served.seconds"] = seconds.astype(np.float32)[:, None]
    episodes.names = {**episodes.names, "served.seconds": ("seconds",)}
    found = {f.code: f for f in examine(cast(Dataset, episodes), ROBOT, SIZES, {})}
    assert ("served-rate" in found) == warned
    if warned:
        assert (
            f"0.1 s after the one before, found a median of {gap}" in found["served-rate"].sentence
        )


@pytest.mark.parametrize("key", ["observation.state", "action"])
def test_values_that_statistics_make_huge(tmp_path: Path, key: str) -> None:
    """A button that is pressed in one frame of two hundred has quantiles without spread."""
    episodes = Episodes(lengths=(150, 50))
    episodes.place = lambda row: f"row {row}"  # type: ignore[attr-defined]
    episodes.columns[key][:, 1] = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_run(tmp_path, episodes, PI05_SIZES)
    episodes.columns[key][7, 1] = 1
    with pytest.warns(UserWarning, match=f"row 7: {key}, value 1: expected at most 100 when norm"):
        make_run(tmp_path, episodes, PI05_SIZES)


def test_actions_are_decoded_to_the_recorded_ones(tmp_path: Path) -> None:
    """Relative actions, too: subtracted here, added by the policy. float32: 1e-5."""
    robot = replace(ROBOT, delta=(2, -1))
    episodes = Episodes()
    made = samples(tmp_path, episodes, robot=robot)
    batch = made.batch(0, slice(None), CPU)
    frames = made.frames_of(0)
    states, actions = made.chunks.at(frames)
    decoded = made.pipeline.decode(batch.actions.numpy(), states)
    np.testing.assert_allclose(decoded, actions, atol=1e-5)
    assert not batch.actions[..., 3:].any()


def test_chunks_repeat_the_last_action_of_an_episode() -> None:
    episodes = Episodes(lengths=(3, 4))
    episodes.columns["action"] = np.arange(7, dtype=np.float32)[:, None]
    chunks = Chunks(episodes, 4)  # type: ignore[arg-type]
    _, actions = chunks.at(np.array([0, 1, 2, 3, 6]))
    assert actions[..., 0].tolist() == [
        [0, 1, 2, 2],
        [1, 2, 2, 2],
        [2, 2, 2, 2],
        [3, 4, 5, 6],
        [6, 6, 6, 6],
    ]


def test_statistics_are_of_relative_chunks(tmp_path: Path) -> None:
    """What the model predicts has mean 0 and deviation 1 over all frames and chunks."""
    robot = replace(ROBOT, delta=(2, -1))
    made = samples(tmp_path, robot=robot, batch_size=26)
    actions = made.batch(0, slice(None), CPU).actions[..., :3].flatten(0, 1)
    torch.testing.assert_close(actions.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(actions.std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_every_frame_once_an_epoch(tmp_path: Path) -> None:
    made = samples(tmp_path)  # 26 frames in batches of 8
    frames = np.concatenate([made.frames_of(step) for step in range(13)])
    for epoch in range(4):
        assert sorted(frames[epoch * 26 : (epoch + 1) * 26]) == list(range(26))
    assert not np.array_equal(frames[:26], frames[26:52])


def test_shares_make_up_the_batch(tmp_path: Path) -> None:
    """Noise, time and augmentation do not depend on how many processes share a batch."""
    made = samples(tmp_path, draws=2, augmentation=Augmentation(), heads=(("aux.place", 1),))
    whole = made.batch(3, slice(None), CPU)
    parts = [made.batch(3, slice(i, i + 4), CPU) for i in (0, 4)]
    for name in ("actions", "noise", "time"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    for name, value in vars(whole.inputs).items():
        # Sines differ in their last bit by the place of an image in the batch.
        joined = torch.cat([getattr(p.inputs, name) for p in parts])
        torch.testing.assert_close(value, joined, atol=1e-5, rtol=0)
    assert torch.equal(
        whole.columns["aux.place"], torch.cat([part.columns["aux.place"] for part in parts])
    )
    assert not torch.equal(whole.noise, made.batch(4, slice(None), CPU).noise)


def test_long_tasks_are_named(tmp_path: Path) -> None:
    episodes = Episodes()
    episodes.tasks[3] = "Ω" * 40
    with pytest.raises(Pi0Error, match="task 'Ω.*expected at most 24 tokens"):
        samples(tmp_path, episodes, tokenizer=byte_file(tmp_path))
    assert TASKS[0] in episodes.tasks


def byte_file(folder: Path) -> Path:
    from pi0.checkpoint.synth import byte_tokenizer

    byte_tokenizer().save(str(folder / "bytes.json"))
    return folder / "bytes.json"


@pytest.mark.parametrize(
    ("shift", "factor", "place"), [(0.1, 1.9, None), (0.2, 1, 2), (0, 2.1, 2), (0, 0.4, 2)]
)
def test_statistics_far_from_those_of_the_checkpoint(
    shift: float, factor: float, place: int | None
) -> None:
    checkpoint = open_checkpoint("tabletop")
    file = find_norm_stats(checkpoint.path)
    measured = read_norm_stats(file)
    actions = measured["actions"]
    actions["mean"][2] += shift * actions["std"][2]
    actions["std"][2] *= factor
    found = examine_statistics(checkpoint, measured, ROBOTS["tabletop"])
    assert [f"actions, value {place}:" in finding.sentence for finding in found] == (
        [] if place is None else [True]
    )
    assert all(f"--norm-stats {file}" in finding.sentence for finding in found)
    assert not examine_statistics(checkpoint, measured, ROBOTS["libero"])


def test_statistics_that_training_does_not_need(tiny_path: Path, tmp_path: Path) -> None:
    """Damaged or ambiguous ones of the checkpoint are no matter: those of the data are used."""
    folder = Path(shutil.copytree(tiny_path, tmp_path / "tiny"))
    measured = read_norm_stats(find_norm_stats(folder))
    (folder / "norm_stats.json").write_text("{}")  # beside the one under assets/
    assert not examine_statistics(open_checkpoint(folder), measured, ROBOTS["generic"])


@pytest.mark.parametrize("source", ["processors", "config.json"])
def test_relative_actions_that_the_checkpoint_has_learnt(tmp_path: Path, source: str) -> None:
    """They are not trained as absolute ones without being asked for, and then with a warning."""
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    checkpoint = open_checkpoint(tmp_path)
    if source == "processors":
        folder = LerobotFolder(tmp_path)
        folder.set_relative(exclude_joints=["grip"], action_names=["a", "b", "c", "d", "Gripper"])
        folder.config = checkpoint.settings | folder.config
        checkpoint = open_checkpoint(folder.write())
    else:
        relative = [True, True, True, True, False]
        checkpoint = replace(checkpoint, settings={"relative_actions": relative})
    for named, severity in ((False, "error"), (True, "warning")):
        (found,) = examine_conventions(checkpoint, ROBOTS["generic"], named)
        assert (found.code, found.severity) == ("relative-differs", severity)
        assert "in dimensions 0 to 3 of 5" in found.sentence
    table = replace(ROBOTS["generic"], action_dim=5, delta=(4, -1))
    assert not examine_conventions(checkpoint, table, True)
    assert not examine_conventions(open_checkpoint("tabletop"), ROBOTS["libero"], True)


def test_training_asks_for_relative_actions(tmp_path: Path) -> None:
    synthesise(tmp_path / "from", PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.float32)
    checkpoint = open_checkpoint(tmp_path / "from")
    checkpoint = replace(checkpoint, settings={"relative_actions": [True, False, False]})
    start = Start("learnt", checkpoint.config, checkpoint)
    options = TrainOptions(augmentation=None)
    with pytest.raises(Pi0Error, match="what it has learnt means other actions then"):
        prepare_run(start, cast(Dataset, Episodes()), tmp_path, options, ALONE)
