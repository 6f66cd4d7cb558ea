"""LeRobot 0.6.1 reads what we write, and we read what it writes: the same bits.

Pictures too: both decode the same video, with FFmpeg's own conversion to RGB. Ours are compared
with what LeRobot decodes, not with what was recorded; test_dataset_round_trip.py does that.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_folder import SCHEMA, psnr

from pi0.data import Dataset, Recording
from pi0.errors import EngineError
from pi0.peers.engine import LerobotEngine

WORKER = Path(__file__).with_name("lerobot_datasets.py")
CAMERA = "observation.images.top"
LEAST_PSNR = 30.0  # as in test_dataset_round_trip.py


@pytest.fixture(scope="module")
def python() -> str:
    try:
        found = LerobotEngine.python()
    except EngineError:
        pytest.skip("needs LeRobot in .venv-lerobot (make .venv-lerobot/installed)")
    probe = [found, "-c", "import datasets, av, lerobot.datasets.lerobot_dataset"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs lerobot[dataset] in .venv-lerobot: its reader needs datasets and av")
    return found


def run(python: str, scratch: Path, *arguments: str | Path) -> None:
    """Offline, and with LeRobot's caches in the scratch folder."""
    homes = {name: str(scratch / "home") for name in ("HF_HOME", "HF_LEROBOT_HOME")}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **homes}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, WORKER, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_lerobot_reads_ours(
    python: str, written: tuple[Path, list[Recording]], tmp_path: Path
) -> None:
    root, recordings = written
    run(python, tmp_path, "read", root, tmp_path / "out.npz")
    found = dict(np.load(tmp_path / "out.npz"))
    dataset = Dataset.open(root)
    assert int(found["fps"]) == 10
    assert found["task"].tolist() == [r.task for r in recordings for _ in range(r.length)]
    assert found["ends"].tolist() == dataset.episode_starts[1:].tolist()
    for key in dataset.names:
        ours = dataset.column(key)
        np.testing.assert_array_equal(found[key].reshape(ours.shape), ours)
    for key in SCHEMA.cameras:
        ours = dataset.frames(key, cache=tmp_path)[:]
        np.testing.assert_array_equal(found[key].transpose(0, 2, 3, 1), ours)
    stats = json.loads((root / "meta/stats.json").read_text())
    assert stats.keys() == {*SCHEMA.cameras, *dataset.names}
    for key, table in stats.items():
        for name, values in table.items():
            np.testing.assert_array_equal(found[f"stats/{key}/{name}"], values)


@pytest.fixture(scope="module", params=["video", "image"])
def theirs(
    python: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    scratch = tmp_path_factory.mktemp(request.param)
    run(python, scratch, "write", scratch / "set", request.param)
    return scratch / "set"


def test_we_read_lerobots(python: str, theirs: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(theirs)
    assert (dataset.fps, dataset.robot, dataset.cameras) == (15, "arm", (CAMERA,))
    assert dataset.names["action"] == ("x", "y", "z")
    assert dataset.episode_starts.tolist() == [0, 7, 11, 17, 22]
    assert dataset.check() == []
    run(python, tmp_path, "read", theirs, tmp_path / "out.npz")
    found = dict(np.load(tmp_path / "out.npz"))
    assert dataset.tasks.tolist() == found["task"].tolist()
    for key in ("observation.state", "action", "next.reward", "index", "timestamp"):
        ours = dataset.column(key)
        np.testing.assert_array_equal(found[key].reshape(ours.shape), ours)
    store = dataset.frames(CAMERA, cache=tmp_path)
    expected = found[CAMERA].transpose(0, 2, 3, 1)
    if expected.dtype != np.uint8:  # LeRobot gives images of parquet files in [0, 1]
        expected = np.round(expected * 255).astype(np.uint8)
    np.testing.assert_array_equal(store[:], expected)
    assert len({path.name for path in theirs.glob("data/*/*")}) == 3


def schema_of(path: Path) -> dict[str, str]:
    return {field.name: str(field.type) for field in pq.read_schema(path)}


def test_files_have_lerobots_form(python: str, theirs: Path, written: tuple[Path, Any]) -> None:
    """The same keys and dtypes in every file of meta/, apart from the features' own names."""
    root = written[0]
    ours, other = (json.loads((p / "meta/info.json").read_text()) for p in (root, theirs))
    assert list(ours) == list(other)
    for key in ("codebase_version", "chunks_size", "data_path", "video_path", "splits"):
        if key == "video_path" and not other[key]:
            continue
        assert type(ours[key]) is type(other[key])
        assert key == "splits" or ours[key] == other[key]
    for key in ("observation.state", "index", "timestamp", "task_index"):
        assert ours["features"][key].keys() == other["features"][key].keys()
        assert ours["features"][key]["dtype"] == other["features"][key]["dtype"]
    if other["features"][CAMERA]["dtype"] == "video":
        mine = ours["features"]["observation.images.base"]["info"]
        others = other["features"][CAMERA]["info"]
        assert mine.keys() == others.keys()
        sizes = ("video.height", "video.width", "video.fps")
        assert {k: v for k, v in mine.items() if k not in sizes} == {
            k: v for k, v in others.items() if k not in sizes
        }
    tasks = [pq.read_schema(p / "meta/tasks.parquet") for p in (root, theirs)]
    assert [(f.name, str(f.type).removeprefix("large_")) for f in tasks[0]] == [
        (f.name, str(f.type).removeprefix("large_")) for f in tasks[1]
    ]
    episodes = "meta/episodes/chunk-000/file-000.parquet"
    mine_columns, other_columns = schema_of(root / episodes), schema_of(theirs / episodes)
    for key, kind in other_columns.items():
        key = key.replace(CAMERA, "observation.images.base")
        assert mine_columns.pop(key) == kind, key
    left = {key.split("/")[1] for key in mine_columns}
    assert left <= {"next.done", *SCHEMA.cameras}
    data = "data/chunk-000/file-000.parquet"
    mine_columns, other_columns = schema_of(root / data), schema_of(theirs / data)
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index", "next.reward"):
        assert mine_columns[key] == other_columns[key]
    assert mine_columns["action"].replace("[2]", "[3]") == other_columns["action"]


def test_lerobots_pictures_are_what_was_recorded(theirs: Path, tmp_path: Path) -> None:
    """Every frame is at its place."""
    store = Dataset.open(theirs).frames(CAMERA, cache=tmp_path)
    lengths, row = (7, 4, 6, 5), 0
    for episode, length in enumerate(lengths):
        for t in range(length):
            y, x = np.mgrid[:64, :96]
            image = ((y * (1 + episode) + x)[..., None] * np.array([1, 2, 0.5]) / 3 + 40).astype(
                np.uint8
            )
            image[10:26, 5 + 4 * t : 21 + 4 * t] = (200, 40 + 30 * episode, 30)
            assert psnr(store[row], image) > LEAST_PSNR
            row += 1
