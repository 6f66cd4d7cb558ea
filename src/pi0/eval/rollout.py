"""One episode: observe, infer a chunk, execute its first actions, until it is over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ConfigError, Pi0Error
from pi0.eval.environment import Environment, Moment, read
from pi0.eval.plan import EvalPlan
from pi0.eval.results import Episode
from pi0.policy import Policy

Floats = NDArray[np.float64]
NOISE, PERTURBATION = 0, 1  # streams of random numbers that an episode's seed gives


def stream(seed: int, which: int) -> np.random.Generator:
    """One of an episode's streams of random numbers."""
    return np.random.default_rng((seed, which))


def draw_noise(policy: Policy, noise: np.random.Generator) -> NDArray[np.float32]:
    """What the next chunk is sampled from: [horizon, action_dim of the model]."""
    config = policy.engine.config
    return noise.standard_normal((config.horizon, config.action_dim), np.float32)


@dataclass(frozen=True)
class Job:
    """One episode to be run; `index` is its place in the results."""

    index: int
    task: str | None
    seed: int
    film: bool


@dataclass
class Trial:
    """An episode and what else is known of it.

    Attributes:
        frames: pictures [H, W, 3] uint8 of a filmed episode, from the start to the end.
    """

    episode: Episode
    latency_ms: list[float]
    frames: list[NDArray[np.uint8]] = field(default_factory=list)


class Runner:
    """Runs episodes of a plan with one policy and one environment.

    Raises:
        Pi0Error: they do not fit together.
    """

    def __init__(self, policy: Policy, env: Environment, plan: EvalPlan) -> None:
        horizon = policy.engine.config.horizon
        self.execute = plan.execute or policy.n_action_steps
        if self.execute > horizon:
            raise ConfigError(
                f"execute: expected at most the {horizon} actions of a chunk, found {self.execute}."
            )
        env.require_fit(policy.pipeline)
        self._policy, self._env, self._plan = policy, env, plan

    def run(self, job: Job) -> Trial:
        """One episode.

        Raises:
            Pi0Error: of the same class as the environment's or policy's; names task and seed.
        """
        try:
            return self._run(job)
        except Pi0Error as error:
            where = f"seed {job.seed}" if job.task is None else f"task {job.task}, seed {job.seed}"
            raise type(error)(f"{where}: {error}") from error

    def _run(self, job: Job) -> Trial:
        env = self._env
        noise, perturbation = (stream(job.seed, which) for which in (NOISE, PERTURBATION))
        moment = env.reset(job.seed, job.task)
        prompt = moment.prompt or ""
        frames = [env.render()] if job.film else []
        latency: list[float] = []
        success, wrong, steps, outside = False, moment.wrong, 0, 0
        while not moment.over:
            result = self._infer(moment, noise)
            latency.append(result["policy_timing"]["total_ms"])
            actions, beyond = self._actions(result, perturbation)
            outside += beyond
            for action in actions:
                moment = env.step(action)
                steps += 1
                success = success or bool(moment.success)
                wrong = None if moment.wrong is None else bool(wrong or moment.wrong)
                frames += [env.render()] if job.film else []
                if moment.over:
                    break
        wrong = None if wrong is None else wrong and not success
        name = env.id if job.task is None else job.task
        episode = Episode(name, job.seed, prompt, success, wrong, steps, outside)
        return Trial(episode, latency, frames)

    def _infer(self, moment: Moment, noise: np.random.Generator) -> dict[str, Any]:
        policy = self._policy
        observation = read(moment, policy.pipeline, self._plan.env.blank_cameras)
        return policy.infer(observation, noise=draw_noise(policy, noise))

    def _actions(
        self, result: dict[str, Any], perturbation: np.random.Generator
    ) -> tuple[Floats, int]:
        """The actions [K, D] to be executed, and how many values are beyond the action space."""
        actions: Floats = result["actions"].astype(np.float64)
        if self._plan.perturb:
            sampled, decode = result["model_actions"], self._policy.pipeline.decode
            moved = sampled + self._plan.perturb * perturbation.standard_normal(sampled.shape)
            actions += decode(moved, result["state"]) - decode(sampled, result["state"])
        policy = self._policy
        return self._env.within(actions[: self.execute], policy.on_limit, policy.robot.action_names)
