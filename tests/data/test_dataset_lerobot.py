"""LeRobot 0.6.1 reads what we write, and we read what it writes: the same bits.

Pictures too: both decode the same video, with FFmpeg's own conversion to RGB. Ours are compared
with what LeRobot decodes, not with what was recorded; test_dataset_round_trip.py does that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_folder import SCHEMA, psnr
from lerobot_datasets import CAMERA, LENGTHS, frame_of

from pi0.data import Dataset, Recording
from pi0.errors import EngineError
from pi0.peers.engine import LerobotEngine

WORKER = Path(__file__).with_name("lerobot_datasets.py")
LEAST_PSNR = 30.0  # as in test_dataset_round_trip.py


@pytest.fixture(scope="module")
def python() -> str:
    try:
        found = LerobotEngine.python()
    except EngineError:
        pytest.skip("needs LeRobot in .venv-lerobot (make .venv-lerobot/installed)")
    probe = "from importlib.util import find_spec as f; exit(not (f('datasets') and f('av')))"
    if subprocess.run([found, "-c", probe], check=False).returncode:
        pytest.skip("needs lerobot[dataset] in .venv-lerobot: its reader needs datasets and av")
    return found


def run(python: str, scratch: Path, verb: str, folder: Path) -> None:
    """Offline, and with LeRobot's caches in the scratch folder."""
    homes = {name: str(scratch / "home") for name in ("HF_HOME", "HF_LEROBOT_HOME")}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **homes}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, WORKER, verb, folder], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_lerobot_reads_ours(
    python: str, written: tuple[Path, list[Recording]], tmp_path: Path
) -> None:
    recordings = written[1]
    root = Path(shutil.copytree(written[0], tmp_path / "set"))
    run(python, tmp_path, "read", root)
    found = dict(np.load(tmp_path / "set.npz"))
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


@pytest.fixture(scope="module")
def both(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("theirs")
    run(python, scratch, "write", scratch)
    return scratch


@pytest.fixture(params=["video", "image"])
def theirs(both: Path, request: pytest.FixtureRequest) -> Path:
    """A folder that LeRobot wrote; what it reads of it is beside it, as .npz."""
    folder: Path = both / request.param
    return folder


def test_we_read_lerobots(theirs: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(theirs)
    assert (dataset.fps, dataset.robot, dataset.cameras) == (15, "arm", (CAMERA,))
    assert dataset.names["action"] == ("x", "y", "z")
    assert dataset.episode_starts.tolist() == [0, 7, 11, 17, 22]
    assert dataset.check() == []
    found = dict(np.load(theirs.with_suffix(".npz")))
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


def test_files_have_lerobots_form(theirs: Path, written: tuple[Path, Any]) -> None:
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
    recorded = [frame_of(e, t)[CAMERA] for e, length in enumerate(LENGTHS) for t in range(length)]
    for found, expected in zip(store[:], recorded, strict=True):
        assert psnr(found, expected) > LEAST_PSNR
