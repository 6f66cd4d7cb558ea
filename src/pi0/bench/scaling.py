"""Latency scaling: workloads around the one that is measured, with one size varied at a time."""

from __future__ import annotations

from dataclasses import replace

from pi0.bench.task import Workload

CAMERAS = (1, 2, 3)
TOKENS = (16, 48, 100, 200)
STEPS = (1, 5, 10, 20)
BATCH = (1, 2, 4)
SWEEP_REPEAT = 2  # timed calls of each workload: the differences are large


def workloads_around(point: Workload) -> dict[str, list[Workload]]:
    """The workloads of each sweep, by what is varied; varied cameras and tokens are all valid."""
    return {
        "cameras": [replace(point, cameras=n, masked=0) for n in CAMERAS],
        "tokens": [replace(point, tokens=n, valid=n) for n in TOKENS],
        "steps": [replace(point, steps=n) for n in STEPS],
        "batch": [replace(point, batch=n) for n in BATCH],
    }
