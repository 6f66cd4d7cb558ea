"""Visits every engine in turn: A B C A B C, so that what disturbs the machine affects all alike."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0.bench.roofline import SIZES, Rate, measure
from pi0.bench.scaling import SWEEP_REPEAT, workloads_around
from pi0.bench.task import ACTIONS, RESULT_FILE, Trial, WorkerTask, Workload
from pi0.engines.spec import EngineSpec
from pi0.errors import EngineError
from pi0.verify.compare import Comparison, compare, displacement_error


@dataclass(frozen=True)
class BenchPlan:
    """What to measure.

    Attributes:
        peers: how many of the specs, the last ones, the others are compared with.
        repeat: timed calls of each engine, in all rounds together.
        seeds: of noise, over which accuracy is the worst.
        scaling: also sweep cameras, text, steps and batch.
        base: an adapter's full model; None: the one that the adapter names.
        horizon, max_tokens: as for `open_checkpoint`.
    """

    checkpoint: Path
    specs: list[EngineSpec]
    peers: int
    point: Workload
    repeat: int
    rounds: int
    seeds: int
    seed: int
    scaling: bool
    base: Path | None = None
    horizon: int | None = None
    max_tokens: int | None = None

    def job(self, spec: EngineSpec, first: bool) -> WorkerTask:
        """The task of a visit; accuracy is measured in the first."""
        repeat = math.ceil(self.repeat / self.rounds)
        seeds = self.seeds if first else 0
        return self._task(spec, repeat, seeds)

    def sweep(self, spec: EngineSpec) -> WorkerTask:
        """The task of timing an engine on all workloads around `point`."""
        points = dict.fromkeys(
            p for around in workloads_around(self.point).values() for p in around
        )
        return self._task(spec, SWEEP_REPEAT, 0, tuple(points))

    def _task(
        self, spec: EngineSpec, repeat: int, seeds: int, points: tuple[Workload, ...] = ()
    ) -> WorkerTask:
        base = None if self.base is None else str(self.base)
        place = str(self.checkpoint)
        sizes = self.horizon, self.max_tokens
        return WorkerTask(place, spec, self.point, repeat, seeds, self.seed, points, base, *sizes)


@dataclass
class EngineResult:
    """The measurements of one engine.

    Attributes:
        first_action_s: of each visit, from the start of its process.
        failure: why it is not measured further: one sentence.
        comparisons: its actions compared with the baseline's, by seed.
        displacement_errors: see `verify.compare.displacement_error`, by seed.
        scaling: milliseconds of each workload of the sweep; None where it raised an error.
        notes: its warnings, and the errors of workloads.
    """

    spec: EngineSpec
    visits: list[Trial] = field(default_factory=list)
    first_action_s: list[float] = field(default_factory=list)
    failure: str | None = None
    actions: Tensor | None = None  # [seeds, batch, horizon, action_dim]
    noises: Tensor | None = None  # that the actions were sampled from, of the same shape
    comparisons: list[Comparison] = field(default_factory=list)
    displacement_errors: list[float] = field(default_factory=list)
    scaling: dict[Workload, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, sentences: list[str]) -> None:
        self.notes += [sentence for sentence in sentences if sentence not in self.notes]


@dataclass(frozen=True)
class BenchResult:
    """All engines in the order of the plan, and the machine's rates by device and precision."""

    engines: list[EngineResult]
    rates: dict[tuple[str, str], Rate]

    def rate_of(self, engine: EngineResult) -> Rate | None:
        return (
            self.rates.get((engine.visits[0].device, engine.spec.precision))
            if engine.visits
            else None
        )


def bench(plan: BenchPlan, on_visit: Callable[[], None] = lambda: None) -> BenchResult:
    """Measures a plan. The failure of an engine is recorded, and the others are still measured.

    Args:
        on_visit: called after each visit.
    """
    engines = [EngineResult(spec) for spec in plan.specs]
    for round_number in range(plan.rounds):
        for engine in engines:
            record_failure(_visit, plan, engine, first=round_number == 0)
            on_visit()
    for engine in engines if plan.scaling else []:
        record_failure(_sweep, plan, engine)
        on_visit()
    for engine in engines:
        _compare_actions(engines[0], engine)
    return BenchResult(engines, _rates(engines))


def _compare_actions(baseline: EngineResult, engine: EngineResult) -> None:
    """Fills in the accuracy of an engine, seed by seed, if both have sampled actions."""
    if baseline.actions is None or baseline.noises is None or engine.actions is None:
        return
    for reference, candidate, noise in zip(
        baseline.actions, engine.actions, baseline.noises, strict=True
    ):
        engine.comparisons.append(compare(reference, candidate))
        engine.displacement_errors.append(displacement_error(reference, candidate, noise))


def record_failure(
    work: Callable[..., None], plan: BenchPlan, engine: EngineResult, **options: bool
) -> None:
    if engine.failure is None:
        try:
            work(plan, engine, **options)
        except EngineError as error:
            engine.failure = str(error)


def _visit(plan: BenchPlan, engine: EngineResult, first: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.monotonic()
        result = run_worker(plan.job(engine.spec, first), folder)
        if (folder / ACTIONS).exists():
            with np.load(folder / ACTIONS, allow_pickle=False) as file:
                engine.actions = torch.from_numpy(file["actions"])
                engine.noises = torch.from_numpy(file["noises"])
    engine.note(result.pop("warnings"))
    visit = Trial(**result)
    engine.visits.append(visit)
    engine.first_action_s.append(visit.first_action_at - start)


def _sweep(plan: BenchPlan, engine: EngineResult) -> None:
    job = plan.sweep(engine.spec)
    with tempfile.TemporaryDirectory() as name:
        result = run_worker(job, Path(name))
    engine.note(result["warnings"])
    for point, outcome in zip(job.sweep, result["points"], strict=True):
        engine.scaling[point] = outcome["ms"]
        if outcome["ms"] is None:
            engine.note([outcome["error"]])


def run_worker(job: WorkerTask, folder: Path) -> dict[str, Any]:
    """The result of a worker; it leaves actions in the folder.

    Raises:
        EngineError: it failed or died; the sentence names the engine.
    """
    command = [sys.executable, "-m", "pi0.bench.worker", job.to_json(), str(folder)]
    # Killed by `run` itself if this process is interrupted.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise EngineError(
            f"{job.spec.label}: expected a measurement, found that its process "
            f"{_end(done.returncode, done.stdout.decode(errors='replace'))}."
        )
    result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    if "error" in result:
        raise EngineError(f"{job.spec.label}: {result['error']}")
    return result


def _end(code: int, output: str) -> str:
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory is short"
    lines = output.strip().splitlines()
    return f"ended with code {code} ({lines[-1] if lines else 'without output'})"


def _rates(engines: list[EngineResult]) -> dict[tuple[str, str], Rate]:
    wanted = {(e.visits[0].device, e.spec.precision) for e in engines if e.visits}
    rates = {key: measure(*key) for key in sorted(wanted) if key[0] in SIZES}
    return {key: rate for key, rate in rates.items() if rate}
