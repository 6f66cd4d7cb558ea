"""Encoding of videos."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pi0.data.schema import Picture
from pi0.data.video import write_video

TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.is_dir(), reason="no list of a process's threads")
def test_encoding_does_not_take_the_machine(tmp_path: Path) -> None:
    """As root, SVT-AV1 would give all threads real-time priority."""
    found = set()

    def pictures() -> Iterator[Picture]:
        for _ in range(3):
            yield np.zeros((64, 64, 3), np.uint8)
        found.update(os.sched_getscheduler(int(thread)) for thread in os.listdir(TASKS))
        yield np.zeros((64, 64, 3), np.uint8)

    write_video(tmp_path / "video.mp4", pictures(), 10, (64, 64))
    assert found == {os.SCHED_OTHER}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
