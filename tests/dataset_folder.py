"""Small datasets for tests, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi0.data import Recording, Schema, finish, write_shard

HEIGHT, WIDTH = 64, 96
BASE, WRIST = "observation.images.base", "observation.images.wrist"
SCHEMA = Schema(
    fps=10,
    robot="tabletop",
    cameras={BASE: (HEIGHT, WIDTH), WRIST: (HEIGHT, HEIGHT)},
    columns={
        "observation.state": ("x", "y", "z"),
        "action": ("dx", "dy"),
        "next.reward": ("reward",),
        "next.done": ("done",),
    },
)
TASKS = ("lift the red cube", "push the ball – gently", "lift the red cube", "öffne die Tür")


def pictures(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    """A colour gradient with a square that moves: pictures as smooth as a camera's."""
    y, x = np.mgrid[:height, :width]
    corners = rng.integers(20, 200, (2, 3))
    ramp = (y / height)[..., None] * corners[0] + (x / width)[..., None] * corners[1]
    out = np.repeat((ramp / 2).astype(np.uint8)[None], frames, axis=0)
    for t in range(frames):
        left = (5 + 3 * t) % (width - 16)
        out[t, 20:36, left : left + 16] = corners[0]
    return out


def recording(seed: int, length: int) -> Recording:
    rng = np.random.default_rng(seed)
    return Recording(
        task=TASKS[seed % len(TASKS)],
        images={key: pictures(rng, length, *size) for key, size in SCHEMA.cameras.items()},
        columns={
            "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
            "action": rng.normal(size=(length, 2)).astype(np.float32),
            "next.reward": rng.random(length, np.float32),
            "next.done": np.arange(length) == length - 1,
        },
    )


def write_folder(root: Path, lengths: Sequence[Sequence[int]] = ((5, 4), (6,))) -> list[Recording]:
    """Writes shards of episodes of these lengths; gives the recordings."""
    recordings: list[Recording] = []
    for index, shard in enumerate(lengths):
        new = [recording(len(recordings) + i, length) for i, length in enumerate(shard)]
        write_shard(root, index, len(recordings), new, SCHEMA)
        recordings += new
    finish(root, SCHEMA)
    return recordings


def edit_column(path: Path, key: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Puts other values into a column of a parquet file."""
    table = pq.read_table(path)
    place = table.column_names.index(key)
    values = change(table[key].to_pylist())
    kind = table.schema.field(key).type
    if pa.types.is_fixed_size_list(kind):
        kind = pa.list_(kind.value_type)
    pq.write_table(table.set_column(place, key, pa.array(values, kind)), path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))
