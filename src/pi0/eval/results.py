"""What an evaluation found: episodes, counts with intervals, and latency."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Episode:
    """One episode.

    Attributes:
        task: the environment's name of the task, or the environment's id.
        seed: which alone decides scene, noise and perturbation.
        prompt: the sentence that the episode began with.
        success: the environment reported success in any step.
        wrong: no success, and the environment reported in any step that something else than the
            sentence says was done; None: it does not report this.
        steps: actions executed.
        outside: values of actions beyond the environment's action space: clamped, or handed on
            with a warning, as the policy's `on_limit` says.
    """

    task: str
    seed: int
    prompt: str
    success: bool
    wrong: bool | None
    steps: int
    outside: int = 0

    @property
    def outcome(self) -> str:
        """ "success", "wrong" or "failed"."""
        return "success" if self.success else "wrong" if self.wrong else "failed"


@dataclass(frozen=True)
class Summary:
    """Counts over episodes.

    Attributes:
        wrong: None if the environment does not report it.
        interval: of the rate of success, 95 %, by Wilson's score.
        mean_steps: of all episodes.
        mean_success_steps: of the successful ones; None: there are none.
    """

    episodes: int
    success: int
    wrong: int | None
    rate: float
    interval: tuple[float, float]
    wrong_rate: float | None
    mean_steps: float
    mean_success_steps: float | None
    outside: int


@dataclass(frozen=True)
class Results:
    """All episodes, by task and seed, and how they were run.

    Attributes:
        latency_ms: of every inference, from the observation to actions; no part of comparisons.
        jumps: at each border between two chunks, how far the new chunk's action is from what the
            old one had for the same tick: root mean square over the actions, in the robot's units.
        run: checkpoint, environment, engine and options, as plain data.
    """

    episodes: tuple[Episode, ...]
    latency_ms: tuple[float, ...] = field(default=(), compare=False)
    jumps: tuple[float, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def tasks(self) -> dict[str, Summary]:
        """The summary of each task, in the order of the plan."""
        names = dict.fromkeys(episode.task for episode in self.episodes)
        return {name: summarise([e for e in self.episodes if e.task == name]) for name in names}

    @cached_property
    def total(self) -> Summary:
        """The summary of all episodes."""
        return summarise(self.episodes)

    @property
    def latency(self) -> dict[str, float]:
        """Median and 99th percentile of an inference in milliseconds, and how many there were."""
        median, p99 = np.percentile(self.latency_ms, [50, 99]) if self.latency_ms else (0.0, 0.0)
        return {
            "median_ms": float(median),
            "p99_ms": float(p99),
            "inferences": len(self.latency_ms),
        }

    @property
    def border_jump(self) -> dict[str, float | None]:
        """Root mean square and largest of `jumps`, None if there are none, and how many."""
        jumps = np.array(self.jumps)
        return {
            "rms": float(np.sqrt(np.mean(jumps**2))) if len(jumps) else None,
            "max": float(jumps.max()) if len(jumps) else None,
            "borders": len(jumps),
        }

    def to_data(self) -> dict[str, Any]:
        """Everything as plain data, as `--out` writes it."""
        return {
            "tasks": {name: _plain(summary) for name, summary in self.tasks.items()},
            **_plain(self.total),
            "latency": self.latency,
            "border_jump": self.border_jump,
            **self.run,
            "rollouts": [asdict(episode) for episode in self.episodes],
        }


def summarise(episodes: Sequence[Episode]) -> Summary:
    """The counts over at least one episode."""
    n = len(episodes)
    done = [episode.steps for episode in episodes if episode.success]
    known = all(episode.wrong is not None for episode in episodes)
    wrong = sum(bool(episode.wrong) for episode in episodes) if known else None
    return Summary(
        episodes=n,
        success=len(done),
        wrong=wrong,
        rate=len(done) / n,
        interval=wilson_interval(len(done), n),
        wrong_rate=None if wrong is None else wrong / n,
        mean_steps=statistics.fmean(episode.steps for episode in episodes),
        mean_success_steps=statistics.fmean(done) if done else None,
        outside=sum(episode.outside for episode in episodes),
    )


def wilson_interval(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a rate, within [0, 1]; sound at 0 and at all successes, too.

    Formula: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927).

    Args:
        z: quantile of the normal distribution; 1.96 for 95 %.
    """
    rate, share = successes / trials, z**2 / trials
    middle = (rate + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(rate * (1 - rate) / trials + share / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def _plain(summary: Summary) -> dict[str, Any]:
    return {**asdict(summary), "interval": list(summary.interval)}
