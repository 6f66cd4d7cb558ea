"""A π0 checkpoint as a policy of inspect-robots."""

from __future__ import annotations

import zlib

from inspect_robots import (
    Action,
    ActionChunk,
    Box,
    CameraSpec,
    Observation,
    ObservationSpace,
    PolicyBase,
    PolicyConfig,
    PolicyInfo,
    Scene,
)

from inspect_robots_pi0.semantics import semantics_of
from pi0.errors import ConfigError
from pi0.eval.rollout import NOISE, draw_noise, stream
from pi0.policy import Policy


class Pi0Policy(PolicyBase):
    """Acts with a checkpoint; its cameras and states have the keys of the robot's table.

    Args:
        checkpoint: a path as `Policy.from_checkpoint` takes it, or a policy that is made already.
        robot, engine, steps, on_limit, tokenizer, norm_stats, preprocessing: see there.
        execute: actions of a chunk that are handed out; None: the policy's `n_action_steps`.
        seed: of the noise, for scenes that do not hold `env_seed`.
        control_mode: what actions mean, in inspect-robots' words; None: known for the tabletop.

    Raises:
        Pi0Error: see `Policy.from_checkpoint`.
    """

    def __init__(
        self,
        checkpoint: str | Policy,
        robot: str | None = None,
        engine: str = "auto",
        steps: int | None = None,
        execute: int | None = None,
        seed: int = 0,
        on_limit: str = "error",
        tokenizer: str | None = None,
        norm_stats: str | None = None,
        preprocessing: str | None = None,
        control_mode: str | None = None,
    ) -> None:
        if not isinstance(checkpoint, Policy):
            checkpoint = Policy.from_checkpoint(
                checkpoint,
                robot=robot,
                engine=engine,
                steps=steps,
                on_limit=on_limit,
                tokenizer=tokenizer,
                norm_stats=norm_stats,
                preprocessing=preprocessing,
            )
        self.policy = policy = checkpoint
        horizon = policy.engine.config.horizon
        self._execute = policy.n_action_steps if execute is None else execute
        if not 1 <= self._execute <= horizon:
            raise ConfigError(f"execute: expected 1 to {horizon} actions, found {execute}.")
        self._seed, self._epoch, self._instruction = seed, 0, ""
        self._noise = stream(seed, NOISE)
        self.config = PolicyConfig(action_horizon=self._execute)
        self.info = _describe(policy, control_mode)

    def on_trial_start(self, scene_id: str, epoch: int, log_dir: str, run_id: str) -> None:
        """Remembers the epoch, which inspect-robots does not tell `reset`."""
        self._epoch = epoch

    def reset(self, scene: Scene) -> None:
        """Begins an episode: its noise follows from the scene."""
        seed = scene.metadata.get("env_seed")
        if seed is None:
            seed = zlib.crc32(f"{self._seed}:{scene.id}:{self._epoch}".encode())
        self._noise = stream(seed, NOISE)
        self._instruction = scene.instruction

    def act(self, observation: Observation) -> ActionChunk:
        """The first `execute` actions of a chunk.

        Raises:
            Pi0Error: see `Policy.infer`.
        """
        robot = self.policy.robot
        known = {camera.key for camera in robot.cameras} | {key for key, _ in robot.state}
        seen = {**observation.images, **observation.state}
        result = self.policy.infer(
            {
                **{key: value for key, value in seen.items() if key in known},
                "prompt": observation.instruction or self._instruction,
            },
            noise=draw_noise(self.policy, self._noise),
        )
        return ActionChunk(
            [Action(action) for action in result["actions"][: self._execute]],
            control_hz=robot.control_hz,
            inference_latency_s=result["policy_timing"]["total_ms"] / 1e3,
        )


def _describe(policy: Policy, control_mode: str | None) -> PolicyInfo:
    robot, config = policy.robot, policy.engine.config
    size = config.vision.image_size
    cameras = tuple(CameraSpec(c.key, size, size) for c in robot.cameras if c.required)
    return PolicyInfo(
        name="pi0",
        action_space=Box(
            (policy.pipeline.action_dim,),
            semantics=semantics_of(robot.name, robot.action_names, control_mode),
        ),
        observation_space=ObservationSpace(cameras, frozenset(key for key, _ in robot.state)),
        control_hz=robot.control_hz,
        checkpoint=policy.metadata.get("checkpoint"),
    )
