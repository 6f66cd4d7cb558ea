"""What is written is read again: columns exactly, pictures as AV1 leaves them."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_folder import BASE, SCHEMA, WRIST, psnr, recording, write_folder
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pi0.data import Dataset, Recording, Schema, finish, shard_episodes, write_shard
from pi0.data.video import write_video
from pi0.errors import DataError, Pi0Error
from pi0.policy.images import RESIZE

# AV1 at crf 30 keeps smooth pictures with sharp coloured edges well above this; colour has a
# quarter of the resolution (4:2:0), which is most of the loss.
LEAST_PSNR = 30.0

Written = tuple[Path, list[Recording]]


def test_columns(written: Written) -> None:
    root, recordings = written
    dataset = Dataset.open(root)
    assert (dataset.fps, dataset.robot) == (10, "tabletop")
    assert dataset.cameras == (BASE, WRIST)
    assert dataset.names["observation.state"] == ("x", "y", "z")
    assert (dataset.num_episodes, dataset.num_frames) == (3, 15)
    assert dataset.episode_starts.tolist() == [0, 5, 9, 15]
    for key in SCHEMA.columns:
        expected = np.concatenate([r.column(key) for r in recordings])
        found = dataset.column(key)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert dataset.tasks.tolist() == [r.task for r in recordings for _ in range(r.length)]
    assert dataset.column("index")[:, 0].tolist() == list(range(15))
    assert dataset.column("frame_index")[:, 0].tolist() == [*range(5), *range(4), *range(6)]
    assert dataset.column("timestamp").dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("action")[0] = 0


def test_pictures(written: Written, tmp_path: Path) -> None:
    root, recordings = written
    dataset = Dataset.open(root)
    ticks: list[int] = []
    for key in dataset.cameras:
        store = dataset.frames(key, cache=tmp_path, progress=ticks.append)
        expected = np.concatenate([r.images[key] for r in recordings])
        assert store.shape == expected.shape
        assert len(store) == 15
        for i in range(15):  # each of them: a mean would hide a frame in another's place
            assert psnr(store[i], expected[i]) > LEAST_PSNR
    assert sum(ticks) == 30
    np.testing.assert_array_equal(store[np.array([14, 0])], np.stack([store[14], store[0]]))
    assert store[3:5].dtype == np.uint8
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))[7], store[7])


@pytest.mark.parametrize("resize", ["openpi", "lerobot"])
def test_resized_as_the_policy_does(written: Written, tmp_path: Path, resize: str) -> None:
    dataset = Dataset.open(written[0])
    native = dataset.frames(BASE, cache=tmp_path)
    store = dataset.frames(BASE, 48, resize, cache=tmp_path)
    assert store.shape == (15, 48, 48, 3)
    expected = RESIZE[resize](native[11], 48).numpy() * 255
    assert np.abs(store[11] - expected).max() <= 0.501  # rounded to 8 bits
    assert dataset.frames(WRIST, 64, resize, cache=tmp_path).shape == (15, 64, 64, 3)


def test_cache_is_used_until_a_video_changes(folder: Path) -> None:
    store = Dataset.open(folder).frames(BASE)
    assert store.path.parent == folder / ".cache" / "pi0"
    ticks: list[int] = []
    again = Dataset.open(folder).frames(BASE, progress=ticks.append)
    assert (again.path, ticks) == (store.path, [])
    (video,) = folder.glob(f"videos/{BASE}/*/file-001.mp4")
    video.touch()
    newer = Dataset.open(folder).frames(BASE, progress=ticks.append)
    assert newer.path != store.path
    assert sum(ticks) == 15


def test_same_recordings_give_the_same_bytes(written: Written, tmp_path: Path) -> None:
    write_folder(tmp_path)
    folders = [written[0] / name for name in ("data", "meta", "videos")]
    files = [p.relative_to(written[0]) for f in folders for p in f.rglob("*") if p.is_file()]
    assert len(files) == 2 + 4 + 4
    for file in files:
        assert (tmp_path / file).read_bytes() == (written[0] / file).read_bytes(), file


def write_one(root: Path, index: int) -> None:
    write_shard(root, index, index, [recording(index, 3)], SCHEMA)


def test_processes_write_shards_in_any_order(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.starmap(write_one, [(tmp_path, 2), (tmp_path, 0), (tmp_path, 1)])
    finish(tmp_path, SCHEMA)
    dataset = Dataset.open(tmp_path)
    assert dataset.tasks[::3].tolist() == [recording(i, 1).task for i in range(3)]
    assert dataset.check() == []


def test_more_shards_after_finish(folder: Path) -> None:
    before = Dataset.open(folder).column("action")
    assert shard_episodes(folder, 1)
    assert shard_episodes(folder, 2) == 0
    write_shard(folder, 2, 3, [recording(3, 2)], SCHEMA)
    finish(folder, SCHEMA)
    dataset = Dataset.open(folder)
    assert dataset.num_episodes == 4
    np.testing.assert_array_equal(dataset.column("action")[:15], before)
    assert dataset.check() == []


def test_a_stopped_shard_leaves_no_trace(folder: Path) -> None:
    class Stopped(Exception):
        pass

    class Interrupted(dict):  # type: ignore[type-arg]
        reads = 0

        def __getitem__(self, key: str) -> np.ndarray:
            self.reads += key == WRIST
            if self.reads == 2:  # the first is the check; one video is written by now
                raise Stopped
            return super().__getitem__(key)

    good = recording(3, 2)
    stopped = Recording(good.task, Interrupted(good.images), good.columns)
    with pytest.raises(Stopped):
        write_shard(folder, 2, 3, [stopped], SCHEMA)
    assert shard_episodes(folder, 2) == 0
    assert not list(folder.rglob("*.part"))
    finish(folder, SCHEMA)
    assert Dataset.open(folder).num_episodes == 3
    write_shard(folder, 2, 3, [good], SCHEMA)
    assert shard_episodes(folder, 2)


def test_statistics_files(written: Written) -> None:
    root, recordings = written
    stats = json.loads((root / "meta/stats.json").read_text())
    states = np.concatenate([r.columns["observation.state"] for r in recordings]).astype(float)
    found = stats["observation.state"]
    assert found["count"] == [15]
    np.testing.assert_allclose(found["mean"], states.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], states.std(0), rtol=1e-12)
    np.testing.assert_allclose(found["q10"], np.quantile(states, 0.1, axis=0), rtol=1e-12)
    pixels = np.concatenate([r.images[BASE] for r in recordings]) / 255
    assert np.shape(stats[BASE]["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(np.ravel(stats[BASE]["mean"]), pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(np.ravel(stats[BASE]["std"]), pixels.std((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(np.ravel(stats[BASE]["max"]), pixels.max((0, 1, 2)))
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [e["length"] for e in episodes] == [5, 4, 6]
    assert [e[f"videos/{BASE}/from_timestamp"] for e in episodes] == [0.0, 0.5, 0.0]
    assert [e["data/file_index"] for e in episodes] == [0, 0, 1]
    np.testing.assert_allclose(
        episodes[2]["stats/action/min"], recordings[2].columns["action"].min(0)
    )
    np.testing.assert_allclose(
        np.ravel(episodes[1][f"stats/{WRIST}/mean"]),
        (recordings[1].images[WRIST] / 255).mean((0, 1, 2)),
        rtol=1e-9,
    )


TINY = Schema(30, "r", {}, {"action": ("a", "b"), "aux.count": ("n",)})


@settings(max_examples=25)
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    words=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3),
)
@example(lengths=[[1]], seed=0, words=["\0"])
def test_any_lengths_and_texts(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], seed: int, words: list[str]
) -> None:
    """Without cameras, whose encoder is slow."""
    rng = np.random.default_rng(seed)
    root, recordings = tmp_path_factory.mktemp("any"), []
    for index, shard in enumerate(lengths):
        new = [
            Recording(
                words[rng.integers(len(words))],
                {},
                {"action": rng.normal(size=(n, 2)), "aux.count": rng.integers(-9, 9, n)},
            )
            for n in shard
        ]
        write_shard(root, index, len(recordings), new, TINY)
        recordings += new
    finish(root, TINY)
    dataset = Dataset.open(root)
    assert np.diff(dataset.episode_starts).tolist() == [r.length for r in recordings]
    assert dataset.tasks.tolist() == [r.task for r in recordings for _ in range(r.length)]
    actions = np.concatenate([r.columns["action"] for r in recordings]).astype(np.float32)
    np.testing.assert_array_equal(dataset.column("action"), actions)
    assert dataset.check() == []


def test_recordings_that_do_not_fit(tmp_path: Path) -> None:
    good = recording(0, 3)
    state = good.columns["observation.state"]
    bad = np.array(state)
    bad[2, 1] = np.nan
    cases = {
        "episode 7, frame 2: observation.state: expected finite": {"observation.state": bad},
        "expected numbers [3, 3], found float32 [3, 2]": {"observation.state": state[:, :2]},
        "expected numbers [3, 2], found float32 [2, 2]": {"action": good.columns["action"][:2]},
        "expected numbers [3, 3], found <U1": {"observation.state": np.full((3, 3), "x")},
        "columns: expected action, next.done": {"more": state},
    }
    for message, columns in cases.items():
        with pytest.raises(DataError) as caught:
            write_shard(
                tmp_path, 0, 7, [Recording(good.task, good.images, {**good.columns, **columns})],
                SCHEMA,
            )  # fmt: skip
        assert message in str(caught.value)
    images = {**good.images, BASE: good.images[BASE] / 255}
    with pytest.raises(DataError, match="expected uint8 .3, 64, 96, 3., found float64"):
        write_shard(tmp_path, 0, 0, [Recording(good.task, images, good.columns)], SCHEMA)
    with pytest.raises(DataError, match="expected a task in words"):
        write_shard(tmp_path, 0, 0, [Recording(" ", good.images, good.columns)], SCHEMA)
    assert not list(tmp_path.iterdir())


def test_schemas_that_the_format_does_not_have() -> None:
    for size in ((63, 64), (64, 63), (2, 64)):
        with pytest.raises(DataError, match="even height and width of at least 4"):
            Schema(10, "r", {"c": size}, {})
    with pytest.raises(DataError, match="without '/'"):
        Schema(10, "r", {}, {"a/b": ("x",)})
    with pytest.raises(DataError, match="without '/'"):
        Schema(10, "r", {}, {"index": ("x",)})
    with pytest.raises(DataError, match="whole number above 0, found 0"):
        Schema(0, "r", {}, {})


def test_finish_refuses_what_does_not_belong_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected no such shard yet, found one"):
        write_shard(folder, 1, 3, [recording(3, 2)], SCHEMA)
    with pytest.raises(DataError, match="expected shards to finish, found none"):
        finish(tmp_path / "empty", SCHEMA)
    with pytest.raises(DataError, match="of the same cameras, columns and frames per second"):
        finish(folder, Schema(20, "tabletop", SCHEMA.cameras, SCHEMA.columns))
    (folder / "data/chunk-000/file-000.parquet").unlink()
    with pytest.raises(DataError, match="expected episode 0 as its first, found 2"):
        finish(folder, SCHEMA)
    path = folder / "data/chunk-000/file-001.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    with pytest.raises(DataError, match="expected a shard written by pi0, found another's"):
        finish(folder, SCHEMA)
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="expected a parquet file"):
        finish(folder, SCHEMA)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Pi0Error, match="expected a place where a file can be written"):
        write_shard(tmp_path / "file", 0, 0, [recording(0, 2)], SCHEMA)


@pytest.mark.parametrize("size", [(4, 4), (4, 66), (34, 6)])
def test_smallest_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    schema = Schema(10, "r", {"c": size}, {"action": ("a",)})
    images = np.full((3, *size, 3), (200, 100, 50), np.uint8)
    write_shard(tmp_path, 0, 0, [Recording("go", {"c": images}, {"action": np.zeros(3)})], schema)
    finish(tmp_path, schema)
    dataset = Dataset.open(tmp_path)
    assert dataset.check() == []
    assert psnr(dataset.frames("c")[:], images) > 40  # one colour


def test_the_encoder_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path, 0, 0, [recording(0, 3)], SCHEMA)
    assert capfd.readouterr() == ("", "")


def test_a_full_disk() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), np.uint8)
    with pytest.raises(Pi0Error, match="expected room for the file, found: No space left"):
        write_video(Path("/dev/full"), iter(images), 10, (64, 64))
