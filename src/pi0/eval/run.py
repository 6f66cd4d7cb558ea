"""Runs a plan's episodes, here or in worker processes; the results are the same.

Each episode follows from its seed alone, so that neither the number of workers nor the order in
which they finish changes a bit of it. (Another number of threads may: sums are split otherwise.)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

import pi0
from pi0.checkpoint.outputs import require_writable
from pi0.errors import Pi0Error
from pi0.eval import film
from pi0.eval.environment import Environment
from pi0.eval.plan import EvalPlan
from pi0.eval.results import Episode, Results
from pi0.eval.rollout import Job, Runner
from pi0.policy import Policy
from pi0.policy.policy import WITHOUT_LIMITS
from pi0.workers import run_here, run_in_processes

if TYPE_CHECKING:
    from pi0.eval.remote import RemotePolicy

MakePolicy = Callable[[], "Policy | RemotePolicy"]


@dataclass(frozen=True)
class Outcome:
    """What a worker returns of an episode.

    Attributes:
        notes: warnings since the last one, each place's first.
        run: what the worker's policy and environment are, as plain data.
        thumbnail: the last picture of a filmed episode, with its caption.
    """

    job: Job
    episode: Episode
    latency_ms: list[float]
    jumps: list[float]
    notes: list[str]
    run: dict[str, Any]
    thumbnail: NDArray[np.uint8] | None


def evaluate(
    make_policy: MakePolicy,
    plan: EvalPlan,
    on_episode: Callable[[Episode], None] = lambda _: None,
) -> Results:
    """Runs all episodes of a plan.

    Args:
        make_policy: called once in each worker, and picklable where there are several; a
            `CheckpointPolicy`, for instance.
        on_episode: called after each episode, in the order in which they finish.

    Returns:
        The results, in the order of the plan. The same policy, plan, machine and engine give the
        same episodes, bit for bit, whatever `workers` is.

    Raises:
        Pi0Error: the policy or the environment cannot be made, they do not fit, or an episode
            fails, with its task and seed; a place for films cannot be written.
    """
    if plan.film:
        film.require_encoder(plan.film.format)
        require_writable(plan.film.folder / film.SHEET)
    jobs = _jobs(plan)
    outcomes: dict[int, Outcome] = {}
    told: set[str] = set()

    def on_outcome(outcome: Outcome) -> None:
        outcomes[outcome.job.index] = outcome
        for note in outcome.notes:
            if note not in told:
                told.add(note)
                warnings.warn(note, stacklevel=2)
        on_episode(outcome.episode)

    make = functools.partial(_worker, make_policy, plan)
    if plan.workers == 1:
        run_here(make, jobs, on_outcome)
    else:
        run_in_processes(make, jobs, plan.workers, on_outcome)
    ordered = [outcomes[job.index] for job in jobs]
    if plan.film:
        _write_sheet(plan.film.folder, ordered)
    return Results(
        tuple(outcome.episode for outcome in ordered),
        tuple(ms for outcome in ordered for ms in outcome.latency_ms),
        tuple(jump for outcome in ordered for jump in outcome.jumps),
        {**describe(plan), **ordered[0].run},
    )


def describe(plan: EvalPlan) -> dict[str, Any]:
    """A plan and the versions of what runs it, as plain data."""
    options = asdict(plan)
    env, _ = options.pop("env"), options.pop("film")
    packages = ("gymnasium", "mujoco", "numpy", "torch")
    return {
        "env": env.pop("id"),
        "env_arguments": env.pop("arguments"),
        **env,
        **{name: value for name, value in options.items() if name not in ("tasks", "episodes")},
        "episodes_per_task": plan.episodes,
        "mujoco_gl": os.environ.get("MUJOCO_GL"),  # how MuJoCo draws: other pixels, other episodes
        "versions": {
            "pi0": pi0.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
    }


def _jobs(plan: EvalPlan) -> list[Job]:
    """All episodes, task by task; makes an environment for a moment to ask for its tasks."""
    with contextlib.closing(Environment(plan.env)) as env:
        env.require_tasks(plan.tasks or (), plan.seed_start)
        tasks = plan.tasks or env.tasks or (None,)
        if plan.env.prompt_swap:
            env.require_swap(plan.seed_start, tasks[0])
    filmed = 0 if plan.film is None else plan.film.episodes or plan.episodes
    places = [(task, i) for task in tasks for i in range(plan.episodes)]
    return [
        Job(index, task, plan.seed_start + i, film=i < filmed)
        for index, (task, i) in enumerate(places)
    ]


@contextlib.contextmanager
def _worker(make_policy: MakePolicy, plan: EvalPlan) -> Iterator[Callable[[Job], Outcome]]:
    """Makes environment and policy, and yields what runs an episode with them."""
    notes = Notes()
    with contextlib.ExitStack() as stack, notes.told_on_error():
        before = torch.get_num_threads()
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(plan.threads)
        with notes.collecting():
            env = Environment(plan.env, film=plan.film is not None)
            stack.callback(env.close)
            notes.bounded = None not in env.limits.low + env.limits.high
            policy = make_policy()
            stack.callback(policy.close)
            runner = Runner(policy, env, plan)
        about = {
            "checkpoint": policy.metadata.get("checkpoint"),
            "robot": policy.pipeline.robot.name,
            "engine": policy.metadata["engine"],
            "steps": policy.metadata["steps"],
            "sampler": policy.metadata["sampler"],
            "execute": runner.execute,
            "delay": runner.delay,
            "real_time": policy.metadata["real_time"] if policy.real_time else None,
            "on_limit": policy.on_limit,
        }

        def work(job: Job) -> Outcome:
            with notes.collecting():
                trial = runner.run(job)
                thumbnail = None
                if job.film and plan.film:
                    thumbnail = film.write_film(plan.film, trial, env.fps)
            times = (trial.latency_ms, trial.jumps)
            return Outcome(job, trial.episode, *times, notes.take(), about, thumbnail)

        yield work


class Notes:
    """Warnings and log messages, the first of each line of code, kept instead of printed.

    An episode may cause the same warning at every step, and the parent process prints it.

    Attributes:
        bounded: whether the environment's action space bounds all actions, so that a robot without
            limits is nothing to warn of.
    """

    def __init__(self) -> None:
        self.bounded = False
        self._seen: set[tuple[str, int]] = set()
        self._new: list[str] = []

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Keeps those of the block."""
        logger = logging.getLogger("pi0")
        with warnings.catch_warnings():
            warnings.showwarning = self._on_warning
            logger.addFilter(self._on_record)
            try:
                yield
            finally:
                logger.removeFilter(self._on_record)

    @contextlib.contextmanager
    def told_on_error(self) -> Iterator[None]:
        """Warns of what nobody has taken if the block fails."""
        try:
            yield
        except Pi0Error:
            for note in self.take():
                warnings.warn(note, stacklevel=2)
            raise

    def take(self) -> list[str]:
        """Those since the last call."""
        new, self._new = self._new, []
        return new

    def _on_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        self._note(str(message), filename, lineno)

    def _on_record(self, record: logging.LogRecord) -> bool:
        expected = self.bounded and record.msg == WITHOUT_LIMITS
        if record.levelno >= logging.WARNING and not expected:
            self._note(record.getMessage(), record.pathname, record.lineno)
        return False

    def _note(self, sentence: str, filename: str, lineno: int) -> None:
        if (filename, lineno) not in self._seen:
            self._seen.add((filename, lineno))
            self._new.append(sentence)


def _write_sheet(folder: Path, outcomes: list[Outcome]) -> None:
    pictures = [(o.episode, o.thumbnail) for o in outcomes if o.thumbnail is not None]
    film.write_sheet(folder / film.SHEET, pictures)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
