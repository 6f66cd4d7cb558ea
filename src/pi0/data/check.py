"""What is wrong with a dataset, as findings: everything at once, each with its episode and frame.

Codes: no-episodes, totals, episodes, column, column-names, not-finite, frame-index, index,
timestamps, task, pictures-missing, pictures-undecodable, picture-size, video-fps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pi0.data.pictures import TOLERANCE, ParquetPart, VideoPart, parts
from pi0.data.schema import BOOKKEEPING, INFO, Array
from pi0.data.video import VideoInfo
from pi0.errors import DataError
from pi0.findings import Finding, error, warning

if TYPE_CHECKING:
    from pi0.data.read import Dataset

UNUSED = "It is not used."


def check(dataset: Dataset, decode: bool, used: Collection[str] | None) -> list[Finding]:
    """See `Dataset.check`."""
    if not dataset.num_frames:
        return [error("no-episodes", f"{dataset.root}: expected episodes, found none.")]
    findings = [*_totals(dataset), *_episodes(dataset)]
    for key in dataset.names:
        findings += _weighed(_column(dataset, key), key in BOOKKEEPING or _is_used(key, used))
    findings += [*_counters(dataset), *_tasks(dataset)]
    for key in dataset.cameras:
        findings += _weighed(_camera(dataset, key, decode), _is_used(key, used))
    return findings


def _is_used(key: str, used: Collection[str] | None) -> bool:
    return used is None or key in used


def _weighed(findings: Iterator[Finding], used: bool) -> Iterator[Finding]:
    """Findings on a column or camera, none of them an error where it is not used."""
    for finding in findings:
        sentence = f"{finding.sentence} {UNUSED}"
        yield finding if used else replace(finding, severity="warning", sentence=sentence)


def _totals(dataset: Dataset) -> Iterator[Finding]:
    found = {"total_episodes": dataset.num_episodes, "total_frames": dataset.num_frames}
    for name, number in found.items():
        if dataset.info.get(name) != number:
            yield error(
                "totals",
                f"{dataset.root / INFO}: expected {name} {number}, which the data files have, "
                f"found {dataset.info.get(name)}. Files are missing, or the recording was "
                "killed: what recorded it completes the folder when it is started again.",
            )


def _episodes(dataset: Dataset) -> Iterator[Finding]:
    try:
        listed = dataset.episode_column("length")
    except DataError as fault:
        yield error("episodes", str(fault))
        return
    lengths = np.diff(dataset.episode_starts)
    for i in np.flatnonzero(listed != lengths)[:1]:
        yield error(
            "episodes",
            f"episode {dataset.episodes[i]}: expected {listed[i]:.0f} frames, which meta/episodes "
            f"says, found {lengths[i]}, the last of them frame {lengths[i] - 1}.",
        )


def _column(dataset: Dataset, key: str) -> Iterator[Finding]:
    try:
        values = dataset.column(key)
    except DataError as fault:
        yield error("column", str(fault))
        return
    width, names = values[0].size, dataset.names[key]
    if names and width > 1 and len(names) != width:
        yield warning(
            "column-names",
            f"column {key}: expected a name for each of its {width} values, found {len(names)}.",
        )
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # training computes in float32
            finite = np.isfinite(values.reshape(len(values), -1).astype(np.float32)).all(axis=1)
        yield from _first(dataset, ~finite, "not-finite", f"{key}: expected finite numbers", values)


def _counters(dataset: Dataset) -> Iterator[Finding]:
    """The columns that count frames, and the time."""
    lengths = np.diff(dataset.episode_starts)
    frame = np.arange(dataset.num_frames) - np.repeat(dataset.episode_starts[:-1], lengths)
    counters = (
        ("frame-index", "frame_index", frame, 0.0, "0, 1, … in each episode"),
        ("index", "index", np.arange(dataset.num_frames), 0.0, "0, 1, … in the dataset"),
        ("timestamps", "timestamp", frame / dataset.fps, TOLERANCE / dataset.fps,
         f"frame_index / {dataset.fps} Hz, in s"),
    )  # fmt: skip
    for code, key, expected, tolerance, words in counters:
        try:
            values = dataset.column(key)[:, 0]
        except DataError as fault:
            if key not in dataset.names:  # else `_column` has said it
                yield error(code, str(fault))
            continue
        wrong = ~(np.abs(values - expected) <= tolerance)
        yield from _first(dataset, wrong, code, f"{key}: expected {words}", values)


def _first(
    dataset: Dataset, wrong: Any, code: str, expected: str, values: Array
) -> Iterator[Finding]:
    """One finding for all frames that are wrong in one way."""
    rows = np.flatnonzero(wrong)
    if rows.size:
        yield error(
            code,
            f"{dataset.place(int(rows[0]))}: {expected}, found {values[rows[0]].tolist()} "
            f"(wrong frames: {len(rows)} of {dataset.num_frames}).",
        )


def _tasks(dataset: Dataset) -> Iterator[Finding]:
    try:
        _ = dataset.tasks
    except DataError as fault:
        yield error("task", str(fault))


def _camera(dataset: Dataset, key: str, decode: bool) -> Iterator[Finding]:
    try:
        sources = parts(dataset, key)
    except DataError as fault:
        yield error("pictures-missing", f"camera {key}: {fault}")
        return
    for part in sources:
        fine = True
        if isinstance(part, VideoPart):
            for finding in _video(dataset, key, part):
                fine = fine and finding.severity == "warning"
                yield finding
        if decode and fine:
            yield from _decoded(dataset, key, part)


def _video(dataset: Dataset, key: str, part: VideoPart) -> Iterator[Finding]:
    """What its index tells, without decoding."""
    try:
        video = part.inspect()
        part.frame_numbers(video)
    except DataError as fault:
        yield error("pictures-missing", str(fault))
        return
    yield from _size(dataset, key, part, (video.height, video.width), int(part.rows[0]))
    yield from _rate(dataset, part, video)


def _rate(dataset: Dataset, part: VideoPart, video: VideoInfo) -> Iterator[Finding]:
    step = float(np.median(np.diff(video.times))) if len(video.times) > 1 else 1 / dataset.fps
    if abs(step * dataset.fps - 1) > 0.01:
        yield warning(
            "video-fps",
            f"{dataset.place(int(part.rows[0]))} and on: {part.path}: expected {dataset.fps} "
            f"frames per second, which {INFO} says, found {1 / step:.4g}.",
        )


def _size(
    dataset: Dataset, key: str, part: VideoPart | ParquetPart, found: tuple[int, int], row: int
) -> Iterator[Finding]:
    expected = dataset.picture_size(key)
    if found != expected:
        yield error(
            "picture-size",
            f"{dataset.place(row)}: {part.path}: {key}: expected {expected[0]}×{expected[1]} "
            f"pixels (height × width), which {INFO} says, found {found[0]}×{found[1]}.",
        )


def _decoded(dataset: Dataset, key: str, part: VideoPart | ParquetPart) -> Iterator[Finding]:
    try:
        for rows, picture in part.pictures():
            wrong = list(_size(dataset, key, part, picture.shape[:2], int(rows[0])))
            if wrong and isinstance(part, ParquetPart):
                yield wrong[0]
                return
    except DataError as fault:
        yield error("pictures-undecodable", str(fault))
