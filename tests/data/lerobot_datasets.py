"""LeRobot's own reading and writing of datasets; started in its environment.

    python lerobot_datasets.py read FOLDER     # what LeRobot reads goes into FOLDER.npz
    python lerobot_datasets.py write FOLDER    # FOLDER/video and FOLDER/image, read at once

`write` records `frame_of`; several small files are forced, so that episodes lie in different ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (7, 4, 6, 5)
TASKS = ("lift the red cube", "push the ball")
CAMERA = "observation.images.top"
HEIGHT, WIDTH = 64, 96


def frame_of(episode: int, t: int) -> dict[str, Any]:
    """One frame, the same in every process."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ramp = (y * (1 + episode) + x)[..., None] * np.array([1, 2, 0.5]) / 6 + 40
    image = ramp.astype(np.uint8)
    image[10:26, 5 + 4 * t : 21 + 4 * t] = (200, 40 + 30 * episode, 30)
    rng = np.random.default_rng(100 * episode + t)
    return {
        CAMERA: image,
        "observation.state": rng.normal(size=4).astype(np.float32),
        "action": rng.normal(size=3).astype(np.float32),
        "next.reward": rng.random(1).astype(np.float32),
        "task": TASKS[episode % 2],
    }


def write(root: Path, kind: str) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = ["height", "width", "channels"]
    features = {
        CAMERA: {"dtype": kind, "shape": (HEIGHT, WIDTH, 3), "names": names},
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["a", "b", "c", "d"]},
        "action": {"dtype": "float32", "shape": (3,), "names": {"motors": ["x", "y", "z"]}},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create(
        "local/set", 15, features, root=root, robot_type="arm", use_videos=kind == "video",
        video_backend="pyav",
    )  # fmt: skip
    for episode, length in enumerate(LENGTHS):
        for t in range(length):
            dataset.add_frame(frame_of(episode, t))
        dataset.save_episode(parallel_encoding=False)
        # Episodes 0 and 1 share files; then every episode has its own.
        dataset.meta.info.data_files_size_in_mb = 100 if episode == 0 else 1e-6
        dataset.meta.info.video_files_size_in_mb = 100 if episode == 0 else 1e-6
    dataset.finalize()


def read(root: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/set", root=root, video_backend="pyav", return_uint8=True)
    items = [dataset[i] for i in range(len(dataset))]
    arrays = {
        key: np.stack([np.asarray(item[key]) for item in items])
        for key in items[0]
        if key != "task"
    }
    for key, table in (dataset.meta.stats or {}).items():
        arrays |= {f"stats/{key}/{name}": value for name, value in table.items()}
    ends = [episode["dataset_to_index"] for episode in dataset.meta.episodes]
    tasks = np.array([item["task"] for item in items])
    np.savez(root.with_suffix(".npz"), task=tasks, fps=dataset.fps, ends=ends, **arrays)


if __name__ == "__main__":
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "read":
        read(folder)
    else:
        for name in ("video", "image"):
            write(folder / name, name)
            read(folder / name)
