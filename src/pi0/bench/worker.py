"""The process in which one engine is measured: `python -m pi0.bench.worker JOB FOLDER`.

Writes its results into the folder. An engine is measured in a process of its own so that load,
first action and peak memory are its own, and no two models are in memory at a time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0.bench.task import ACTIONS, RESULT_FILE, Trial, WorkerTask, workload_inputs
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.engines.base import Engine, make_engine, require_finite
from pi0.engines.memory import require_memory
from pi0.errors import Pi0Error
from pi0.inputs import ModelInputs
from pi0.model.flow import integrate

SPLITS = 2  # passes in parts, of which the faster counts: the first one may compile or allocate


def main() -> None:
    """Does one job."""
    job, folder = WorkerTask.from_json(sys.argv[1]), Path(sys.argv[2])
    with warnings.catch_warnings(record=True) as caught:
        try:
            result = sweep(job) if job.sweep else visit(job, folder)
        except Pi0Error as error:
            result = {"error": str(error)}
    result["warnings"] = list(dict.fromkeys(str(warning.message) for warning in caught))
    (folder / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")


def visit(job: WorkerTask, folder: Path) -> dict[str, Any]:
    """Load, first action, a warm-up call, the timed calls, passes in parts, and actions for
    accuracy."""
    start = time.perf_counter()
    with load(job) as engine:
        load_s = time.perf_counter() - start
        inputs, noise = workload_inputs(engine.config, job.point, job.seed)
        actions = engine.sample(inputs, noise, job.point.steps)
        first_action_at = time.monotonic()
        sample_ms = sample_times(engine, inputs, noise, job.point.steps, job.repeat)
        parts = part_times(engine, inputs, noise, job.point.steps)
        if job.seeds:
            noises = noises_of_seeds(noise, job)
            actions = actions_of_seeds(engine, inputs, actions, noises, job.point.steps)
            np.savez(folder / ACTIONS, actions=actions.numpy(), noises=noises.numpy())
        return asdict(Trial(load_s, first_action_at, sample_ms, *parts, **describe(engine)))


def sweep(job: WorkerTask) -> dict[str, Any]:
    """The median time of each workload; where the engine refuses one, its error."""
    results: list[dict[str, Any]] = []
    with load(job) as engine:
        for point in job.sweep:
            sizes = point.cameras, point.tokens, None, point.batch
            try:
                require_memory(_open(job), job.spec, *sizes, loaded=True)
                inputs, noise = workload_inputs(engine.config, point, job.seed)
                times = sample_times(engine, inputs, noise, point.steps, job.repeat)
                results.append({"ms": statistics.median(times)})
            except Pi0Error as error:
                results.append({"ms": None, "error": str(error)})
    return {"points": results}


def load(job: WorkerTask) -> Engine:
    opened = _open(job)
    require_memory(opened, job.spec, job.point.cameras, job.point.tokens, batch=job.point.batch)
    return make_engine(job.spec, opened)


def _open(job: WorkerTask) -> Checkpoint:
    return open_checkpoint(job.checkpoint, job.horizon, job.max_tokens, job.base)


def sample_times(
    engine: Engine, inputs: ModelInputs, noise: Tensor, steps: int, repeat: int
) -> list[float]:
    """Milliseconds of each call after a warm-up call."""
    # Other images in every call: an engine may keep the prefix of the last call.
    calls = [replace(inputs, images=inputs.images.roll(i, dims=-1)) for i in range(1, repeat + 2)]
    return [timed(engine, engine.sample, these, noise, steps)[0] for these in calls][1:]


def part_times(
    engine: Engine, inputs: ModelInputs, noise: Tensor, steps: int
) -> tuple[float, float | None, float]:
    """Milliseconds of prefill, of vision in it if the engine shows it, and of a step (median)."""
    own = engine.time_parts(inputs, noise, steps)
    if own is not None:
        return own
    prefill_ms, vision_ms, step_ms = [], [], []
    for _ in range(SPLITS):
        if engine.capabilities.shows_stages:
            vision_ms += time_to_projector(engine, inputs)
        ms, cache = timed(engine, engine.prefill, inputs)
        prefill_ms.append(ms)
        steps_ms: list[float] = []

        def velocity(x: Tensor, t: Tensor, cache: Any = cache, into: list[float] = steps_ms) -> Any:
            ms, v = timed(engine, engine.velocity, x, t, cache)
            into.append(ms)
            return v

        integrate(velocity, noise, steps)
        step_ms.append(statistics.median(steps_ms))
    return min(prefill_ms), min(vision_ms, default=None), min(step_ms)


def time_to_projector(engine: Engine, inputs: ModelInputs) -> list[float]:
    """Milliseconds until the tap sees the projector's result; empty if it does not."""
    seen = []

    def tap(name: str, value: Tensor) -> Tensor:
        if name == "projector":
            synchronize()
            seen.append((time.perf_counter() - start) * 1e3)
        return value

    start = time.perf_counter()
    engine.prefill(inputs, tap)
    synchronize()
    return seen


def noises_of_seeds(first: Tensor, job: WorkerTask) -> Tensor:
    """[seeds, batch, horizon, action_dim]: `first`, and the noise of the next seeds."""
    seeds = range(job.seed + 1, job.seed + job.seeds)
    return torch.stack(
        [first]
        + [torch.randn(first.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


def actions_of_seeds(
    engine: Engine, inputs: ModelInputs, first: Tensor, noises: Tensor, steps: int
) -> Tensor:
    """[seeds, batch, horizon, action_dim]: `first`, and those from the other noises."""
    cache = engine.prefill(inputs)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return engine.velocity(x, t, cache)

    others = [require_finite(integrate(velocity, noise, steps)) for noise in noises[1:]]
    return torch.stack([first, *others])


def describe(engine: Engine) -> dict[str, Any]:
    """The fields of a `Trial` that are not times."""
    info, (peak, cuda_peak) = engine.info, engine.peak_memory()
    return {
        "peak_bytes": peak,
        "cuda_bytes": cuda_peak or None,
        "threads": torch.get_num_threads(),
        "device": info["device"].partition(":")[0],
        "implementation": info["implementation"],
        "torch": info["torch"],
    }


def timed(engine: Engine, call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Milliseconds and the result of a call, by the engine's own clock if it has one."""
    synchronize()
    start = time.perf_counter()
    result = call(*args)
    synchronize()
    seconds = time.perf_counter() - start
    own = engine.own_seconds
    return 1e3 * (seconds if own is None else own), result


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
