"""One episode: an action at each tick, a chunk now and then, until it is over."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ConfigError, Pi0Error
from pi0.eval.environment import Environment, read
from pi0.eval.latency import LateResults
from pi0.eval.plan import EvalPlan
from pi0.eval.results import Episode
from pi0.policy import ActionBuffer, Policy

if TYPE_CHECKING:
    from pi0.eval.remote import RemotePolicy

Floats = NDArray[np.float64]
NOISE, PERTURBATION = 0, 1  # streams of random numbers that an episode's seed gives


def stream(seed: int, which: int) -> np.random.Generator:
    """One of an episode's streams of random numbers."""
    return np.random.default_rng((seed, which))


def draw_noise(policy: Policy | RemotePolicy, noise: np.random.Generator) -> NDArray[np.float32]:
    """What the next chunk is sampled from: [horizon, action_dim of the model]."""
    return noise.standard_normal(policy.noise_shape, np.float32)


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
        jumps: see `Results`.
        frames: pictures [H, W, 3] uint8 of a filmed episode, from the start to the end.
    """

    episode: Episode
    latency_ms: list[float]
    jumps: list[float]
    frames: list[NDArray[np.uint8]] = field(default_factory=list)


class Runner:
    """Runs episodes of a plan with one policy and one environment.

    Attributes:
        execute: actions of a chunk that are executed before the next one's observation.
        delay: ticks from an observation to the chunk for it.

    Raises:
        Pi0Error: they do not fit together.
    """

    def __init__(self, policy: Policy | RemotePolicy, env: Environment, plan: EvalPlan) -> None:
        horizon = policy.noise_shape[0]
        self.execute = plan.execute or policy.n_action_steps
        if self.execute > horizon:
            raise ConfigError(
                f"execute: expected at most the {horizon} actions of a chunk, found {self.execute}."
            )
        ticks = plan.injected_latency / 1000 * env.fps
        self.delay = math.ceil(ticks - 1e-9)  # 300 ms at 10 Hz are 3
        if self.delay and self.execute + self.delay > horizon:
            raise ConfigError(
                f"latency: expected the next chunk before the {horizon} actions of the last are "
                f"over, found {self.execute} that are executed before it is asked for and "
                f"{self.delay} ticks of {1000 / env.fps:g} ms until it is there. Execute fewer "
                "(--execute), or lower --latency."
            )
        if plan.perturb and not isinstance(policy, Policy):
            raise ConfigError(
                "perturb: expected a policy in this process, found one behind a server, which "
                "hands out no actions in the model's units. Leave out --perturb."
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
        env, policy, background = self._env, self._policy, LateResults(self.delay)
        chunks = _Chunks(policy, job.seed, self._plan.perturb, self.delay)
        buffer = ActionBuffer(
            chunks,
            execution_horizon=self.execute,
            overlap="inpaint" if policy.real_time else "replace",
            when_dry="error",
            executor=background,
        )
        policy.reset()
        moment = env.reset(job.seed, job.task)
        prompt = moment.prompt or ""
        frames = [env.render()] if job.film else []
        names = policy.pipeline.robot.action_names
        success, wrong, outside = False, moment.wrong, 0
        while not moment.over:
            seen = read(moment, policy.pipeline, self._plan.env.blank_cameras)
            action = buffer.step(seen).astype(np.float64)
            bounded, beyond = env.within(action[None], policy.on_limit, names)
            moment = env.step(bounded[0])
            background.tick()
            chunks.tick += 1
            outside += beyond
            success = success or bool(moment.success)
            wrong = None if moment.wrong is None else bool(wrong or moment.wrong)
            frames += [env.render()] if job.film else []
        wrong = None if wrong is None else wrong and not success
        name = env.id if job.task is None else job.task
        episode = Episode(name, job.seed, prompt, success, wrong, chunks.tick, outside)
        return Trial(episode, chunks.latency_ms, chunks.jumps, frames)


class _Chunks:
    """The chunks of one episode, whose seed decides their noise.

    Attributes:
        tick: of the episode, which the loop counts.
        limits, action_names, on_limit: of the policy's robot, for the borders of chunks.
    """

    def __init__(
        self, policy: Policy | RemotePolicy, seed: int, perturb: float, delay: int
    ) -> None:
        self.tick = 0
        robot = policy.robot if isinstance(policy, Policy) else policy
        self.limits, self.action_names = robot.limits, robot.action_names
        self.on_limit: str = policy.metadata.get("on_limit", policy.on_limit)
        self.latency_ms: list[float] = []
        self.jumps: list[float] = []
        self._policy, self._perturb, self._delay = policy, perturb, delay
        self._noise, self._perturbation = (stream(seed, which) for which in (NOISE, PERTURBATION))
        self._last: tuple[int, Floats] | None = None

    def infer(self, observation: Any, /, **inpainting: Any) -> dict[str, Any]:
        """The chunk for the observation of this tick."""
        noise = draw_noise(self._policy, self._noise)
        result = self._policy.infer(observation, noise, **inpainting)
        self.latency_ms.append(result["policy_timing"]["total_ms"])
        actions = self._perturbed(result)
        self._measure_jump(actions)
        return {"actions": actions}

    def _perturbed(self, result: dict[str, Any]) -> Floats:
        actions: Floats = result["actions"].astype(np.float64)
        if self._perturb:
            assert isinstance(self._policy, Policy)
            sampled, decode = result["model_actions"], self._policy.pipeline.decode
            moved = sampled + self._perturb * self._perturbation.standard_normal(sampled.shape)
            actions += decode(moved, result["state"]) - decode(sampled, result["state"])
        return actions

    def _measure_jump(self, actions: Floats) -> None:
        """The border is where this chunk takes over, if the last one goes so far."""
        if self._last is not None:
            start, last = self._last
            border = self.tick + self._delay
            if border - start < len(last):
                jump = actions[self._delay] - last[border - start]
                self.jumps.append(float(np.sqrt(np.mean(jump**2))))
        self._last = self.tick, actions
