"""The process in which one engine is measured: `python -m pi0.bench.worker JOB FOLDER`.

Writes what it found into the folder. An engine is measured in a process of its own so that load,
first action and peak memory are its own, and no two models are in memory at a time.
"""

from __future__ import annotations

import json
import resource
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
from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import Engine, make_engine, require_finite
from pi0.errors import Pi0Error
from pi0.inputs import ModelInputs
from pi0.model.flow import integrate
from pi0.peers.engine import PeerEngine

SPLITS = 2  # of the passes in parts the better counts: the first may build what its path needs


def main() -> None:
    """Does one job."""
    job, folder = WorkerTask.from_json(sys.argv[1]), Path(sys.argv[2])
    with warnings.catch_warnings(record=True) as caught:
        try:
            told = sweep(job) if job.sweep else visit(job, folder)
        except Pi0Error as error:
            told = {"error": str(error)}
    told["warnings"] = list(dict.fromkeys(str(warning.message) for warning in caught))
    (folder / RESULT_FILE).write_text(json.dumps(told), encoding="utf-8")


def visit(job: WorkerTask, folder: Path) -> dict[str, Any]:
    """Load, first action, a call that does not count, the calls that do, passes in parts, and
    actions for accuracy."""
    start = time.perf_counter()
    engine = load(job)
    load_s = time.perf_counter() - start
    inputs, noise = workload_inputs(engine.config, job.point, job.seed)
    actions = engine.sample(inputs, noise, job.point.steps)
    first_action_at = time.monotonic()
    sample_ms = sample_times(engine, inputs, noise, job.point.steps, job.repeat)
    parts = part_times(engine, inputs, noise, job.point.steps)
    if job.seeds:
        np.savez(folder / ACTIONS, actions=actions_of_seeds(engine, inputs, actions, job).numpy())
    return asdict(Trial(load_s, first_action_at, sample_ms, *parts, **about(engine)))


def sweep(job: WorkerTask) -> dict[str, Any]:
    """The median time of each point; where the engine refuses one, what it says."""
    engine = load(job)
    told: list[dict[str, Any]] = []
    for point in job.sweep:
        inputs, noise = workload_inputs(engine.config, point, job.seed)
        try:
            times = sample_times(engine, inputs, noise, point.steps, job.repeat)
            told.append({"ms": statistics.median(times)})
        except Pi0Error as error:
            told.append({"ms": None, "error": str(error)})
    return {"points": told}


def load(job: WorkerTask) -> Engine:
    checkpoint = open_checkpoint(Path(job.checkpoint))
    return make_engine(job.spec.name, checkpoint, job.spec.device, job.spec.dtype)


def sample_times(
    engine: Engine, inputs: ModelInputs, noise: Tensor, steps: int, repeat: int
) -> list[float]:
    """Milliseconds of each call after one that does not count."""
    # Other pictures in every call: an engine may keep the prefix of the last.
    pictures = [
        replace(inputs, images=inputs.images.roll(i, dims=-1)) for i in range(1, repeat + 2)
    ]
    return [timed(engine, engine.sample, these, noise, steps)[0] for these in pictures][1:]


def part_times(
    engine: Engine, inputs: ModelInputs, noise: Tensor, steps: int
) -> tuple[float, float | None, float]:
    """Milliseconds of prefill, of vision in it if the engine shows it, and of a step (median)."""
    prefill_ms, vision_ms, step_ms = [], [], []
    for _ in range(SPLITS):
        if not isinstance(engine, PeerEngine):  # which shows no stage of it
            vision_ms += time_to_projector(engine, inputs)
        ms, cache = timed(engine, engine.prefill, inputs)
        prefill_ms.append(ms)
        steps_ms: list[float] = []

        def velocity(x: Tensor, t: Tensor, cache: Any = cache, into: list[float] = steps_ms) -> Any:
            ms, v = timed(engine, engine.velocity, x, t, inputs.state, cache)
            into.append(ms)
            return v

        integrate(velocity, noise, steps)
        step_ms.append(statistics.median(steps_ms))
    return min(prefill_ms), min(vision_ms, default=None), min(step_ms)


def time_to_projector(engine: Engine, inputs: ModelInputs) -> list[float]:
    """Milliseconds until the tap sees the projector's result, or nothing if it never does."""
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


def actions_of_seeds(engine: Engine, inputs: ModelInputs, first: Tensor, job: WorkerTask) -> Tensor:
    """[seeds, batch, horizon, action_dim]: the first as sampled, the others from noise of seeds
    that follow."""
    cache = engine.prefill(inputs)
    actions = [first]
    for seed in range(job.seed + 1, job.seed + job.seeds):
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed))
        actions.append(
            require_finite(
                integrate(
                    lambda x, t: engine.velocity(x, t, inputs.state, cache), noise, job.point.steps
                )
            )
        )
    return torch.stack(actions)


def about(engine: Engine) -> dict[str, Any]:
    """What a visit tells beside times."""
    if isinstance(engine, PeerEngine):
        peak, cuda_peak = engine.peak, engine.cuda_peak
        implementation, version = engine.implementation, engine.torch
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        cuda_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        implementation, version = None, torch.__version__
    return {
        "peak_bytes": peak,
        "cuda_bytes": cuda_peak or None,
        "threads": torch.get_num_threads(),
        "device": "cuda" if cuda_peak else "cpu",
        "implementation": implementation,
        "torch": version,
    }


def timed(engine: Engine, call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Milliseconds and the result of a call; from outside its own time, without the way there."""
    synchronize()
    start = time.perf_counter()
    result = call(*args)
    synchronize()
    seconds = time.perf_counter() - start
    return 1e3 * (engine.seconds if isinstance(engine, PeerEngine) else seconds), result


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
