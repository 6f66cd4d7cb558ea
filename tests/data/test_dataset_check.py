"""A good folder has no findings; damaged in each way it has the one that says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_folder import BASE, SCHEMA, WRIST, edit_column, edit_json, pictures, psnr, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from pi0.data import Dataset
from pi0.data.pictures import ParquetPart, nearest
from pi0.data.video import write_video
from pi0.errors import DataError

DATA = "data/chunk-000/file-00{}.parquet"
VIDEO = "videos/{}/chunk-000/file-00{}.mp4"


def test_a_good_folder(written: tuple[Path, Any]) -> None:
    assert Dataset.open(written[0]).check() == []


def edit(key: str, row: int, value: Any) -> Callable[[Path], None]:
    """A value in episode 2, which is the second file."""

    def damage(root: Path) -> None:
        def change(values: list[Any]) -> list[Any]:
            values[row] = value
            return values

        edit_column(root / DATA.format(1), key, change)

    return damage


def edit_info(**fields: Any) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "meta/info.json", lambda info: info.update(fields))


def edit_meta(name: str, key: str, value: Any) -> Callable[[Path], None]:
    return lambda root: edit_column(root / name, key, lambda values: [value, *values[1:]])


def drop_last_rows(root: Path) -> None:
    table = pq.read_table(root / DATA.format(1))
    pq.write_table(table.slice(0, 4), root / DATA.format(1))


def drop_episode(root: Path) -> None:
    (path,) = root.glob("meta/episodes/*/*.parquet")
    pq.write_table(pq.read_table(path).slice(0, 2), path)


def repeat_episode(root: Path) -> None:
    (path,) = root.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(1, 1)]), path)


def drop_column(root: Path) -> None:
    path = root / DATA.format(1)
    pq.write_table(pq.read_table(path).drop_columns("action"), path)


def other_video(frames: int, fps: int, height: int = 64) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        rng = np.random.default_rng(0)
        images = pictures(rng, frames, height, 96)
        write_video(root / VIDEO.format(BASE, 1), iter(images), fps, (height, 96))

    return damage


def garble(root: Path) -> None:
    """The middle of the pictures' bytes becomes noise; the index stays as it is."""
    path = root / VIDEO.format(BASE, 1)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    length = int.from_bytes(content[start - 8 : start - 4], "big") - 8
    noise = np.random.default_rng(0).bytes(length // 2)
    content[start + length // 2 : start + length // 2 + len(noise)] = noise
    path.write_bytes(content)


def truncate(root: Path) -> None:
    path = root / VIDEO.format(BASE, 1)
    path.write_bytes(path.read_bytes()[:-200])


NAN, INF = [0.0, float("nan"), 0.0], [0.0, 0.0, float("inf")]
CASES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "nan": (edit("observation.state", 3, NAN), "not-finite",
            "episode 2, frame 3: observation.state: expected finite numbers, found [0.0, nan, 0.0] "
            "(wrong frames: 1 of 15)."),
    "inf": (edit("observation.state", 0, INF), "not-finite", "episode 2, frame 0"),
    "missing value": (edit("next.reward", 1, None), "not-finite", "episode 2, frame 1"),
    "width": (edit("action", 4, [1.0, 2.0, 3.0]), "column",
              "episode 2, frame 4: action: expected 2 values, found 3."),
    "no values": (edit("action", 5, None), "column",
                  "episode 2, frame 5: action: expected 2 values, found none."),
    "no column": (drop_column, "column", "expected a column action"),
    "width of all": (lambda root: edit_json(root / "meta/info.json", lambda info: info["features"]
                     ["action"].update(shape=[7])), "column",
                     "episode 0, frame 0: action: expected 7 values, found 2."),
    "frame_index": (edit("frame_index", 2, 1), "frame-index",
                    "episode 2, frame 2: frame_index: expected 0, 1, … in each episode, found 1"),
    "timestamp back": (edit("timestamp", 4, 0.1), "timestamps", "episode 2, frame 4"),
    "timestamp NaN": (edit("timestamp", 4, float("nan")), "timestamps", "episode 2, frame 4"),
    "fps of the data": (edit_info(fps=30), "timestamps", "episode 0, frame 1"),
    "index": (edit("index", 0, 3), "index", "episode 2, frame 0"),
    "unknown task": (edit("task_index", 2, 9), "task",
                     "episode 2, frame 2: expected the text of task 9"),
    "negative task": (edit("task_index", 2, -1), "task", "found no such task"),
    "task without text": (edit_meta("meta/tasks.parquet", "task", "  "), "task",
                          "episode 0, frame 0: expected the text of task 0"),
    "task null": (edit_meta("meta/tasks.parquet", "task", None), "task", "found an empty text"),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "task", "found no file"),
    "total": (edit_info(total_frames=16), "totals", "expected total_frames 15"),
    "rows": (drop_last_rows, "episodes", "episode 2: expected 6 frames"),
    "episode": (drop_episode, "episodes", "expected episode 2, which is in the data"),
    "episode twice": (repeat_episode, "episodes", "expected one entry of episode 1, found several"),
    "no episodes": (lambda root: shutil.rmtree(root / "meta/episodes"), "episodes",
                    "expected episode 0"),
    "no video": (lambda root: (root / VIDEO.format(WRIST, 1)).unlink(), "pictures-missing",
                 "episode 2, frame 0 and on"),
    "too few": (other_video(4, 10), "pictures-missing", "for episode 2, frame 4, found none"),
    "video's fps": (other_video(18, 30), "video-fps", "expected 10 frames per second"),
    "size": (other_video(6, 10, height=80), "picture-size",
             "expected 64×96 pixels (height × width)"),
    "garbled": (garble, "pictures-undecodable", "episode 2, frame "),
    "truncated": (truncate, "pictures-missing", "episode 2, frame 0 and on"),
    "no from_timestamp": (edit_meta("meta/episodes/chunk-000/file-000.parquet",
                          f"videos/{BASE}/from_timestamp", None), "pictures-missing",
                          "episode 0: expected a number as videos"),
    "video_path": (edit_info(video_path="videos/{episode_chunk:03d}.mp4"), "pictures-missing",
                   "expected a video_path such as"),
    "no text as video": (lambda root: (root / VIDEO.format(BASE, 1)).write_text("version https"),
                         "pictures-missing", "expected a video that can be decoded"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_damage_is_found(folder: Path, name: str) -> None:
    damage, code, words = CASES[name]
    damage(folder)
    findings = Dataset.open(folder).check()
    sentences = [finding.sentence for finding in findings if finding.code == code]
    assert any(words in sentence for sentence in sentences), findings
    assert all("\n" not in finding.sentence for finding in findings)


@pytest.mark.parametrize("name", ["too few", "garbled", "no video", "size", "timestamp NaN"])
def test_frames_name_episode_and_frame(folder: Path, name: str) -> None:
    """Training meets the same damage without `check`."""
    damage, _, _ = CASES[name]
    damage(folder)
    key = WRIST if name == "no video" else BASE
    with pytest.raises(DataError, match="episode 2, frame "):
        Dataset.open(folder).frames(key)
    assert not list(folder.rglob(".cache/**/*.*"))


def test_without_decoding(folder: Path) -> None:
    garble(folder)
    assert Dataset.open(folder).check(decode=False) == []


def test_what_is_not_used_may_be_damaged(folder: Path) -> None:
    for name in ("missing value", "nan", "no video"):
        CASES[name][0](folder)
    findings = Dataset.open(folder).check(False, ["observation.state", "action", BASE])
    found = {(finding.severity, finding.sentence.endswith("not used.")) for finding in findings}
    assert found == {("error", False), ("warning", True)}
    (worst,) = (finding for finding in findings if finding.severity == "error")
    assert "observation.state" in worst.sentence


def test_several_faults_at_once(folder: Path) -> None:
    for name in ("nan", "frame_index", "too few", "no tasks"):
        CASES[name][0](folder)
    codes = {finding.code for finding in Dataset.open(folder).check()}
    assert codes == {"not-finite", "frame-index", "pictures-missing", "task"}


def test_a_dataset_without_episodes(folder: Path) -> None:
    for name in ("data", "meta/episodes"):
        shutil.rmtree(folder / name)
    edit_info(total_frames=0, total_episodes=0)(folder)
    dataset = Dataset.open(folder)
    assert (dataset.num_episodes, dataset.num_frames) == (0, 0)
    (finding,) = dataset.check()
    assert finding.code == "no-episodes"


def open_after(folder: Path, damage: Callable[[Path], Any]) -> str:
    damage(folder)
    with pytest.raises(DataError) as caught:
        Dataset.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    assert "found no folder" in open_after(tmp_path / "nothing", lambda _: None)
    assert "There is one in" in open_after(tmp_path, lambda _: None)
    said = open_after(folder, edit_info(codebase_version="v2.1"))
    assert "convert_dataset_v21_to_v30" in said
    assert "expected a LeRobotDataset v3.0, found codebase_version v2.1." in said
    assert "to v2.1" in open_after(folder, edit_info(codebase_version="v2.0"))
    assert "found fps" not in open_after(folder, edit_info(codebase_version="v3.0", fps="ten"))
    assert "whole number above 0, found 29.97" in open_after(folder, edit_info(fps=29.97))
    edit_info(fps=10.0)(folder)
    assert Dataset.open(folder).fps == 10
    assert "expected a dtype and a shape" in open_after(
        folder, lambda root: edit_json(root / "meta/info.json", lambda info: info["features"]
                                       ["action"].pop("shape")))  # fmt: skip
    features = {"action": {"dtype": "float32", "shape": [2]}, BASE: {"dtype": "video", "shape": []}}
    edit_json(folder / "meta/info.json", lambda info: info["features"].update(features))
    assert f"{BASE}: expected a dtype and a shape" in open_after(folder, lambda _: None)
    assert "not finished" in open_after(folder, lambda root: (root / "meta/info.json").unlink())


@pytest.mark.parametrize(
    ("encoded", "found"), [(None, "no bytes"), (b"\x89PNG", "bytes of no kind of picture")]
)
def test_pictures_in_parquet_files(encoded: bytes | None, found: str) -> None:
    place = SimpleNamespace(place=lambda row: f"episode 0, frame {row}")
    part = ParquetPart(cast(Dataset, place), Path("file.parquet"), np.arange(1), BASE)
    with pytest.raises(DataError, match=f"^episode 0, frame 7: file.parquet: .* found {found}. Co"):
        part._decode(7, encoded)


def test_damaged_files(folder: Path) -> None:
    info = folder / "meta/info.json"
    good = info.read_text()
    assert "expected JSON" in open_after(folder, lambda _: info.write_text("{"))
    info.write_text(good)
    data = folder / DATA.format(0)
    content = data.read_bytes()
    assert "expected a parquet file" in open_after(folder, lambda _: data.write_bytes(b"PAR1xxxx"))
    data.write_bytes(content[: len(content) // 2])
    assert "expected a parquet file" in open_after(folder, lambda _: None)
    shutil.rmtree(folder / "data")
    assert "expected data/chunk" in open_after(folder, lambda _: None)


def test_unknown_names(folder: Path) -> None:
    dataset = Dataset.open(folder)
    with pytest.raises(DataError, match="column state: expected one of"):
        dataset.column("state")
    with pytest.raises(DataError, match="camera front: expected one of observation.images.base"):
        dataset.frames("front")
    with pytest.raises(DataError, match="resize: expected openpi or lerobot"):
        dataset.frames(BASE, 8, "nearest")


def test_episodes_in_any_files_and_order(tmp_path: Path) -> None:
    """Rows of an episode in two files, and files in another order than their episodes."""
    write_folder(tmp_path, ((5,), (4,)))
    before = Dataset.open(tmp_path)
    actions, tasks = before.column("action").copy(), before.tasks.copy()
    pictures_before = before.frames(BASE)[:]
    first, second = (pq.read_table(tmp_path / DATA.format(i)) for i in (0, 1))
    pq.write_table(pa.concat_tables([second, first.slice(0, 2)]), tmp_path / DATA.format(0))
    pq.write_table(first.slice(2), tmp_path / DATA.format(1))
    dataset = Dataset.open(tmp_path)
    np.testing.assert_array_equal(dataset.column("action"), actions)
    assert dataset.tasks.tolist() == tasks.tolist()
    np.testing.assert_array_equal(dataset.frames(BASE)[:], pictures_before)
    assert dataset.check() == []


def test_old_columns_of_names(folder: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["features"]["observation.state"]["names"] = {"motors": ["a", "b", "c"]}
        info["features"]["action"]["names"] = None
        info["features"]["note"] = {"dtype": "string", "shape": [1], "names": None}
        info["features"][WRIST]["info"] = {"video.is_depth_map": True}

    edit_json(folder / "meta/info.json", change)
    dataset = Dataset.open(folder)
    assert dataset.names["observation.state"] == ("a", "b", "c")
    assert dataset.names["action"] == ()
    assert "note" not in dataset.names
    assert dataset.cameras == (BASE,)
    assert SCHEMA.cameras.keys() == {BASE, WRIST}


@given(
    steps=st.lists(st.floats(0.001, 1), min_size=1, max_size=20),
    values=st.lists(st.floats(-1, 25), min_size=1, max_size=20),
)
def test_nearest(steps: list[float], values: list[float]) -> None:
    times, asked = np.cumsum(steps), np.array(values)
    distance = np.abs(times - asked[:, None])
    found = nearest(times, asked)
    np.testing.assert_array_equal(distance[np.arange(len(asked)), found], distance.min(axis=1))


def test_other_codecs(folder: Path) -> None:
    """H.264 with frames that are decoded in another order than they are shown."""
    before = Dataset.open(folder).frames(BASE)[9:]
    path = folder / VIDEO.format(BASE, 1)
    options = {"crf": "10", "bf": "2", "g": "250"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", 10, options)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for picture in before:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        stored = [p.pts for p in container.demux(video=0) if p.pts is not None]
    assert stored != sorted(stored)
    dataset = Dataset.open(folder)
    assert dataset.check() == []
    for found, expected in zip(dataset.frames(BASE)[9:], before, strict=True):
        assert psnr(found, expected) > 35  # a frame in another's place has less than 30


def test_older_files_of_tasks(folder: Path) -> None:
    """The index of the pandas table has no name."""
    path = folder / "meta/tasks.parquet"
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["task_index", "__index_level_0__"]), path)
    assert Dataset.open(folder).tasks[0] == table["task"][0].as_py()


@pytest.mark.parametrize("name", ["task", "sentence"])
def test_tasks_with_more_columns(folder: Path, name: str) -> None:
    """The sentences are the index, whatever stands beside them."""
    path = folder / "meta/tasks.parquet"
    table = pq.read_table(path)
    first = table["task"][0].as_py()
    more = {name: table["task"], "task_index": table["task_index"], "kind": ["other"] * len(table)}
    index = json.dumps({"index_columns": [name], "columns": [], "column_indexes": []})
    metadata = {} if name == "task" else {"pandas": index}
    pq.write_table(pa.table(more).replace_schema_metadata(metadata), path)
    assert Dataset.open(folder).tasks[0] == first


def test_numbers_that_float32_does_not_hold(folder: Path) -> None:
    path = folder / DATA.format(1)
    table = pq.read_table(path)
    values = np.array(table["action"].to_pylist(), np.float64)
    values[3, 1] = 1e300
    place = table.column_names.index("action")
    pq.write_table(table.set_column(place, "action", pa.array(list(values))), path)
    (finding,) = Dataset.open(folder).check()
    assert (finding.code, finding.severity) == ("not-finite", "error")
    assert finding.sentence.startswith("episode 2, frame 3: action: expected finite numbers")


@settings(max_examples=40)
@given(data=st.data())
def test_any_damage_is_an_error_or_a_finding(
    written: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of any file: no other exception, and one line each."""
    folder = tmp_path_factory.mktemp("damaged") / "set"
    shutil.copytree(written[0], folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.binary(max_size=40))
    content[start : start + data.draw(st.integers(1, 40))] = new
    path.write_bytes(content[: data.draw(st.sampled_from([start, len(content)]))])
    try:
        sentences = [finding.sentence for finding in Dataset.open(folder).check()]
    except DataError as error:
        sentences = [str(error)]
    assert not any("\n" in sentence for sentence in sentences)
