"""Episodes in memory, where a dataset's folder would be, and runs on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pi0.config import PRESETS, Pi0Config
from pi0.data.read import Dataset
from pi0.findings import Finding
from pi0.policy import Camera, Robot
from pi0.train.optimizer import OptimizerOptions
from pi0.train.prepare import Run, TrainOptions, prepare_run
from pi0.train.processes import Processes
from pi0.train.start import Start

SIZES = replace(PRESETS["tiny"], horizon=6, action_dim=4, state_dim=5, max_tokens=24)
PI05_SIZES = replace(PRESETS["pi05_tiny"], horizon=6, action_dim=5, state_dim=5, max_tokens=100)
ROBOT = Robot(
    name="table",
    cameras=(
        Camera("observation/image", ("image", "base")),
        Camera("observation/wrist_image", ("wrist_image", "wrist")),
    ),
    state=(("observation/state", 5),),
    action_dim=3,
)
TASKS = ("push the red block", "lift it")
ALONE = Processes(0, 1, torch.device("cpu"))
FAST = OptimizerOptions(steps=6, learning_rate=3e-3, warmup=2, ema=0.9)


class Episodes:
    """Three episodes of a robot whose actions follow from its state and the task."""

    root = Path("episodes")
    fps = 10
    robot = "table"
    names: Mapping[str, tuple[str, ...]] = {
        "observation.state": (),
        "action": (),
        "aux.place": (),
    }
    cameras = ("observation.images.base", "observation.images.wrist")

    def __init__(self, seed: int = 0, lengths: tuple[int, ...] = (9, 5, 12)) -> None:
        random = np.random.default_rng(seed)
        self.episode_starts = np.cumsum([0, *lengths])
        n = self.num_frames = int(self.episode_starts[-1])
        self.num_episodes = len(lengths)
        state = random.normal(size=(n, 5)).astype(np.float32)
        which = np.repeat(np.arange(len(lengths)) % 2, lengths)
        self.tasks = np.array([TASKS[i] for i in which], dtype=object)
        action = np.stack([state[:, 0], -2 * state[:, 1], which - 0.5], axis=1)
        self.columns = {
            "observation.state": state,
            "action": action.astype(np.float32),
            "aux.place": np.stack([which, state[:, 2]], axis=1).astype(np.float32),
        }
        self.pictures = {
            key: random.integers(0, 256, (n, 28, 28, 3), dtype=np.uint8) for key in self.cameras
        }

    def column(self, key: str) -> NDArray[Any]:
        return self.columns[key]

    def frames(self, key: str, size: int, resize: str, **_: Any) -> NDArray[np.uint8]:
        assert size == 28
        return self.pictures[key]

    def check(self, decode: bool = True, used: Any = None) -> list[Finding]:
        return []


def make_run(
    out: Path,
    episodes: Episodes | None = None,
    config: Pi0Config = SIZES,
    processes: Processes = ALONE,
    **changes: Any,
) -> Run:
    """A run on the episodes, not begun."""
    out.mkdir(parents=True, exist_ok=True)
    base = TrainOptions(robot=ROBOT, batch_size=8, augmentation=None, optimizer=FAST)
    dataset = cast(Dataset, episodes or Episodes())
    return prepare_run(Start("sizes", config), dataset, out, replace(base, **changes), processes)
