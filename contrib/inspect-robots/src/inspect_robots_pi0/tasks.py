"""The tabletop as a task, and what else than success is counted."""

from __future__ import annotations

from dataclasses import dataclass

from inspect_robots import Scene, Score, Scorer, Target, Task, TrialRecord, success_at_end

import pi0.sim
from pi0.eval.plan import SEED_START


@dataclass(frozen=True)
class _WrongObject:
    name: str = "pi0-wrong-object"

    def __call__(self, record: TrialRecord, target: Target | None) -> Score:
        infos = [step.result.info for step in record.steps]
        success = any(info.get("success") for info in infos)
        wrong = not success and any(info.get("wrong") for info in infos)
        return Score(wrong, explanation="something else was done" if wrong else None)


def wrong_object() -> Scorer:
    """Whether something else was done than the sentence says, in an episode without success."""
    return _WrongObject()


def tabletop(
    episodes: int = 20, tasks: str = "lift,put,push", seed_start: int = SEED_START
) -> Task:
    """The scenes of `pi0 eval --episodes N --tasks A,B`: seed `seed_start` + i, for each task.

    The environment says the sentence.
    """
    scenes = [
        Scene(
            id=f"{task}-{seed}",
            instruction="as the observation says",
            init_seed=seed,
            metadata={"task": task, "env_seed": seed},
        )
        for task in map(str.strip, tasks.split(","))
        for seed in range(seed_start, seed_start + episodes)
    ]
    scorers = [success_at_end(), wrong_object()]
    return Task("pi0-tabletop", scenes, scorers, max_steps=pi0.sim.MAX_STEPS)
