"""What a server counts and times: for Prometheus, for the log, and for the live page."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from pi0.serve.answer import Answer

# Seconds: from a small model on a GPU to the full one on two CPU cores.
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
CHARTED = 240  # latencies on the live page
RECORDED = ("episodes", "frames", "dropped", "errors")
REMEMBERED = 20_000  # answers within the time that a line of the log tells of


@dataclass(frozen=True)
class Latency:
    """Answers of a while: how many, how many of them errors, and quantiles in seconds, which are
    None if there were no chunks."""

    chunks: int
    errors: int
    p50: float | None
    p99: float | None

    def __str__(self) -> str:
        quantiles = {"p50": self.p50, "p99": self.p99}
        times = [f"{k} {v * 1e3:.0f} ms" for k, v in quantiles.items() if v is not None]
        return ", ".join([f"{self.chunks} chunks", *times, f"{self.errors} errors"])


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
        outcomes: answers by outcome.
        latencies: seconds of the last chunks, for a chart.
        recording: what became of frames and episodes that are recorded.
    """

    def __init__(self, clients: Callable[[], int], waiting: Callable[[], int]) -> None:
        """
        Args:
            clients, waiting: how many are connected, and wait in the queue.
        """
        self.registry = CollectorRegistry()
        self.outcomes: Tally[str] = Tally()
        self.latencies: deque[float] = deque(maxlen=CHARTED)
        self.recording: Tally[str] = Tally()
        self._recent: deque[tuple[float, bool, float]] = deque(maxlen=REMEMBERED)
        ProcessCollector(registry=self.registry)  # memory, CPU, open files
        gauges = {
            "pi0_clients": ("Robots that are connected.", clients),
            "pi0_waiting": ("Observations that wait in the queue.", waiting),
        }
        for name, (what, value) in gauges.items():
            Gauge(name, what, registry=self.registry).set_function(value)
        self.ready = Gauge("pi0_ready", "1 once the policy is warm.", registry=self.registry)
        self._answers = Counter(
            "pi0_responses", "Responses by outcome.", ["outcome"], registry=self.registry
        )
        self._refused = Counter(
            "pi0_refused", "Connections that were refused.", ["reason"], registry=self.registry
        )
        self._warnings = Counter(
            "pi0_warnings", "Warnings sent with actions.", registry=self.registry
        )
        self._recorded = Counter(
            "pi0_recorded",
            "Recording: episodes, frames, dropped frames, and errors.",
            ["what"],
            registry=self.registry,
        )
        for what in RECORDED:  # each is 0 before it happens, not absent
            self._recorded.labels(what)
        self._batches = Histogram(
            "pi0_batch_size",
            "Observations, by how many were computed together.",
            buckets=BATCH_SIZES,
            registry=self.registry,
        )
        self._seconds = Histogram(
            "pi0_stage_seconds",
            "Seconds of each stage of a response; total: from arrival to the end of sending.",
            ["stage"],
            buckets=BUCKETS,
            registry=self.registry,
        )

    def answered(self, answer: Answer, total: float) -> None:
        """Counts an answer that was sent, `total` seconds after its observation came."""
        self.outcomes[answer.outcome] += 1
        self._answers.labels(answer.outcome).inc()
        self._warnings.inc(answer.warnings)
        for stage, seconds in answer.stages.items():
            self._seconds.labels(stage).observe(seconds)
        ok = answer.outcome == "ok"
        if ok:
            self._batches.observe(answer.batch)
            self._seconds.labels("total").observe(total)
            self.latencies.append(total)
        if answer.outcome != "superseded":
            self._recent.append((time.monotonic(), ok, total))

    def recorded(self, what: str, count: int) -> None:
        """Counts "episodes", "frames", "dropped" frames or "errors" of a recording; any thread."""
        self.recording[what] += count
        self._recorded.labels(what).inc(count)

    def refused(self, reason: str) -> None:
        """Counts a connection that was refused."""
        self._refused.labels(reason).inc()

    def latency(self, seconds: float) -> Latency | None:
        """The answers of the last seconds; None if there were none."""
        since = time.monotonic() - seconds
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()
        if not self._recent:
            return None
        totals = [total for _, ok, total in self._recent if ok]
        p50, p99 = np.quantile(totals, (0.5, 0.99)).tolist() if totals else (None, None)
        return Latency(len(totals), len(self._recent) - len(totals), p50, p99)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
