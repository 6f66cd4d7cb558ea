"""Demonstrations: what they hold, and that they do not depend on who records them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0.cli.main import main
from pi0.data.lock import locked
from pi0.data.read import Dataset
from pi0.data.write import begin
from pi0.errors import ConfigError, DataError, Pi0Error
from pi0.sim.demos import OBJECTS, Disturbance, record_episode
from pi0.sim.env import TabletopEnv
from pi0.sim.experts import SHUT
from pi0.sim.record import Plan, record
from pi0.sim.tasks import COLORS


def test_points_lie_where_the_camera_sees_them():
    """The pixel at a cube's point has the cube's colour."""
    env = TabletopEnv(image_size=112)
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        for color, centre in env.scene.cubes().items():
            u, v = env.scene.in_picture("table", centre)
            pixel = observation["observation/image"][int(v * 112), int(u * 112)].astype(int)
            strongest = {"red": [0], "green": [1], "blue": [2], "yellow": [0, 1]}[color]
            others = [i for i in range(3) if i not in strongest]
            assert pixel[strongest].min() > 1.5 * pixel[others].max(), (seed, color, pixel)
    env.close()


def test_recording_is_what_the_expert_wanted():
    env = TabletopEnv(image_size=16)
    recording = record_episode(env, 1, "lift", Disturbance(episodes=1), 80)
    assert recording is not None
    length = recording.length
    assert recording.images["observation.images.table"].shape == (length, 16, 16, 3)
    points = recording.columns["aux.object_points"].reshape(length, len(OBJECTS), 2)
    absent = [i for i, name in enumerate(COLORS) if name not in env.scene.cubes()]
    assert (points[:, absent] == -1).all()
    state, action = recording.columns["observation.state"], recording.columns["action"]
    moved = np.diff(state[:, :3], axis=0) / 0.03
    assert np.abs(moved - action[:-1, :3]).max() > 0.05  # executed with noise, recorded without
    env.close()


def test_slips_show_how_to_recover():
    """Some frames have fingers shut on nothing, where the expert opens them; all end well."""
    env = TabletopEnv(image_size=16)
    shut, frames = 0, 0
    for seed in range(4):
        slipping = Disturbance(episodes=1, slips=1)
        recording = record_episode(env, seed, "lift", slipping, 80)
        assert recording is not None
        opening, width = recording.columns["observation.state"][:, 3:].T
        wanted = recording.columns["action"][:, 3]
        shut += int(((opening == 0) & (width < SHUT) & (wanted > 0)).sum())
        frames += recording.length
    assert shut > 0.03 * frames, (shut, frames)
    env.close()


@pytest.mark.parametrize(("episodes", "seed"), [(1, -1), (30, 8_999_999), (0, 0)])
def test_reserved_seeds_are_refused(episodes, seed):
    with pytest.raises(
        ConfigError, match=r"seed: expected 0 to 8999999 for all tries|at least one episode"
    ):
        Plan(episodes, seed)


def test_no_task_is_not_every_task(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pi0", "demos", "--tasks", "", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "task: expected one of lift, put, push" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_two_recordings_into_one_folder(tmp_path):
    with locked(tmp_path), pytest.raises(Pi0Error, match="no other process is writing into"):
        record(Plan(1, image_size=16), tmp_path, 1, lambda _: None)
    assert not list(tmp_path.iterdir())


def test_interrupted_recording_goes_on(tmp_path):
    plan = Plan(22, seed=7, tasks=("lift",), image_size=16)
    done = []
    record(plan, tmp_path / "whole", 2, done.append)
    assert sum(done) == 22
    # A run that was stopped has some shards, and no meta files.
    again = tmp_path / "again"
    record(plan, again, 1, lambda _: None)
    (again / "data/chunk-000/file-001.parquet").unlink()
    for path in (again / "meta").rglob("*.json"):
        path.unlink()
    left = again / "videos/observation.images.wrist/chunk-000/.file-001.mp4.12345.part"
    left.write_bytes(b"of a process that was killed")
    done.clear()
    record(plan, again, 1, done.append)
    assert done == [20, 2]
    assert not left.exists()
    one, other = Dataset.open(tmp_path / "whole"), Dataset.open(again)
    assert one.num_episodes == other.num_episodes == 22
    for key in ("observation.state", "action", "aux.target_point"):
        np.testing.assert_array_equal(one.column(key), other.column(key))


def test_damaged_and_missing_files_are_noticed(tmp_path):
    """Deleting any file of a shard and running again records the same shard anew."""
    plan = Plan(1, seed=7, tasks=("lift",), image_size=16)
    record(plan, tmp_path, 1, lambda _: None)
    before = Dataset.open(tmp_path).column("action")
    for path in sorted(tmp_path.rglob("*/file-000.*")):
        if "meta" in path.parts:
            continue
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        remedy = rf"{path}: expected .* Delete it and run again, which records its episodes anew"
        with pytest.raises(DataError, match=remedy):
            record(plan, tmp_path, 1, lambda _: None)
        path.unlink()
        record(plan, tmp_path, 1, lambda _: None)
        dataset = Dataset.open(tmp_path)
        assert dataset.check() == []
        np.testing.assert_array_equal(dataset.column("action"), before)


def test_a_dataset_goes_on_with_the_options_it_began_with(tmp_path):
    """Said before anything is recorded; so are sizes that videos or the simulator do not have."""
    first = Plan(1, seed=7, tasks=("lift",), image_size=16)
    record(first, tmp_path, 1, lambda _: None)
    for name, value in {"seed": 8, "tasks": ("put",), "image_size": 32}.items():
        with pytest.raises(ConfigError, match=rf"{name}: expected .* found .*another folder"):
            record(replace(first, **{name: value}), tmp_path, 1, lambda _: None)
    for size, fault in {33: "an even height and width", 1000: "1 to 960 pixels"}.items():
        with pytest.raises(Pi0Error, match=f"expected {fault}"):
            record(replace(first, image_size=size), tmp_path / "odd", 1, lambda _: None)
    assert not (tmp_path / "odd").exists()


def test_a_place_where_nothing_was_recorded_takes_any_options(tmp_path):
    """The note of a run that failed before its first shard had refused all others."""
    begin(tmp_path, {"seed": 8})
    record(Plan(1, seed=7, tasks=("lift",), image_size=16), tmp_path, 1, lambda _: None)
    assert Dataset.open(tmp_path).num_episodes == 1


def test_other_peoples_datasets_are_left_alone(tmp_path):
    path = tmp_path / "data/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"episode_index": [0]}), path)
    with pytest.raises(DataError, match="expected a shard written by pi0"):
        record(Plan(1, image_size=16), tmp_path, 1, lambda _: None)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_more_episodes_are_added_to_a_dataset(tmp_path):
    """Also where its last shard was not full; fewer than it has are refused."""
    options = {"seed": 7, "tasks": ("lift",), "image_size": 16}
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    for episodes in (1, 22):
        record(Plan(episodes, **options), grown, 1, lambda _: None)
    record(Plan(22, **options), whole, 1, lambda _: None)
    one, other = Dataset.open(grown), Dataset.open(whole)
    np.testing.assert_array_equal(one.column("action"), other.column("action"))
    assert one.check() == []
    for episodes in (21, 3):
        with pytest.raises(ConfigError, match=rf"no more episodes than {episodes}, found more"):
            record(Plan(episodes, **options), grown, 1, lambda _: None)
    assert Dataset.open(grown).num_episodes == 22
