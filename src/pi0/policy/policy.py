"""Policy: a robot's observation in, its actions out.

A policy is a `Pipeline`, an engine, and the noise: it is drawn here and nowhere else, from a
generator on the CPU, so that a seed gives the same actions on every device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.closing import Closing
from pi0.config import MAX_STEPS
from pi0.engines.base import Engine, make_engine
from pi0.engines.fastest import choose_engine, require_options
from pi0.engines.guidance import Guidance
from pi0.errors import ConfigError, EngineError
from pi0.inputs import ModelInputs, check_noise, to_tensor
from pi0.model.flow import check_sampler
from pi0.number import is_whole
from pi0.policy.encoded import Encoded, Sampled
from pi0.policy.limits import ON_LIMIT, apply_limits, as_data, summary
from pi0.policy.observation import Observation
from pi0.policy.pipeline import Pipeline
from pi0.policy.realtime import RealTimeChunking, make_inpainting, require_inverse
from pi0.policy.resolve import prepare
from pi0.policy.robot import Robot
from pi0.policy.setup import PolicyOptions

logger = logging.getLogger("pi0")
WITHOUT_LIMITS = (
    "robot %s states no limits of its actions: they are returned unchecked. A robot file can "
    "state them (docs/robots.md)."
)
_without_limits: set[str] = set()  # robots of which it was said that they state no limits


class Policy(Closing):
    """A π0 policy for one robot. Make one with `from_checkpoint`.

    Any number of threads may call one policy: each gets the answer that it would get alone for its
    noise. Where the noise is drawn by the policy, the order of calls decides who gets which.

    Attributes:
        pipeline: pre- and post-processing.
        engine: computes actions from model inputs.
        steps, sampler: denoising steps, and how they are taken: "euler" or "midpoint".
        n_action_steps: actions of a chunk that `select_action` hands out before it computes anew.
        on_limit: "error", "clamp" or "warn", for actions beyond the robot's limits.
        real_time: how `infer` continues a previous chunk; None: it does not.
        metadata: what this policy is, as plain data.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        engine: Engine,
        *,
        steps: int = 10,
        sampler: str = "euler",
        seed: int = 0,
        n_action_steps: int | None = None,
        on_limit: str = "error",
        real_time: RealTimeChunking | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if engine.config != pipeline.config:
            raise ConfigError(
                "engine: expected one made for this checkpoint and image size, found another "
                f"configuration: {engine.config} instead of {pipeline.config}."
            )
        horizon = engine.config.horizon
        self.pipeline = pipeline
        self.engine = engine
        self.steps = _count("steps", steps, 1, MAX_STEPS)
        self.sampler = check_sampler(sampler)
        self.n_action_steps = _count(
            "n_action_steps", horizon if n_action_steps is None else n_action_steps, 1, horizon
        )
        if on_limit not in ON_LIMIT:
            raise ConfigError(
                f"on_limit: expected one of {', '.join(ON_LIMIT)}, found {on_limit!r}."
            )
        self.on_limit, self.real_time = on_limit, real_time
        if not isinstance(real_time, RealTimeChunking | None):
            raise ConfigError(f"real_time: expected RealTimeChunking(), found {real_time!r}.")
        if real_time is not None:
            engine.check_guidance(real_time.jacobian == "exact")
            require_inverse(pipeline)
        self.metadata = {
            **(metadata or {}),
            "engine": engine.info,
            "steps": self.steps,
            "sampler": sampler,
            "n_action_steps": self.n_action_steps,
            "on_limit": on_limit,
            "real_time": asdict(real_time) if real_time else None,
        }
        self._generator = torch.Generator().manual_seed(_count("seed", seed, 0, 2**63 - 1))
        self._queue: deque[NDArray[np.float32]] = deque()
        self._last: NDArray[np.float64] | None = None  # what `select_action` handed out last
        self._lock = threading.Lock()  # of the generator
        self._queue_lock = threading.Lock()
        _say_once_without_limits(pipeline.robot)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint | Path | str,
        *,
        robot: str | Path | Robot | None = None,
        engine: str | Engine = "auto",
        device: str | None = None,
        dtype: str | None = None,
        tokenizer: Path | str | None = None,
        norm_stats: Path | str | None = None,
        norm_mode: str | None = None,
        preprocessing: str | None = None,
        resize: str | None = None,
        prompt: str | None = None,
        state_in_prompt: bool | None = None,
        default_prompt: str | None = None,
        image_size: int | None = None,
        horizon: int | None = None,
        max_tokens: int | None = None,
        base: Path | str | None = None,
        steps: int | None = None,
        sampler: str = "euler",
        seed: int = 0,
        n_action_steps: int | None = None,
        on_limit: str = "error",
        real_time: RealTimeChunking | None = None,
        weight_cache: bool = False,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Policy:
        """A policy from a checkpoint: a folder, a file, an adapter or an opened one.

        Whatever the checkpoint's own files do not say, and neither does an argument, is a warning
        or an error; `metadata["findings"]` keeps them.

        Args:
            robot, tokenizer, norm_stats, norm_mode, preprocessing, resize, prompt,
                state_in_prompt, default_prompt, image_size: see `PolicyOptions`.
            engine: ENGINE[:PRECISION][@DEVICE], an engine that is made already, or for "auto" the
                fastest on this machine that is exact to float32.
            device, dtype: complete the name of the engine.
            horizon, max_tokens: of a checkpoint whose files do not say.
            base: the full model of an adapter; None: the one that the adapter names.
            steps: denoising steps; None: what config.json says, else 10.
            seed: of the noise.
            sampler, n_action_steps, on_limit, real_time: see the attributes.
            weight_cache: keep packed weights in a file beside the checkpoint, for the next start.
            progress: called with bytes of weights read.

        Raises:
            Pi0Error: something that the policy needs is missing or does not fit.
        """
        require_options(engine, dtype, device)
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint, horizon, max_tokens, base)
        options = PolicyOptions(
            robot=robot,
            tokenizer=tokenizer,
            norm_stats=norm_stats,
            norm_mode=norm_mode,
            preprocessing=preprocessing,
            resize=resize,
            prompt=prompt,
            image_size=image_size,
            default_prompt=default_prompt,
            state_in_prompt=state_in_prompt,
        )
        setup = prepare(checkpoint, options)
        pipeline = setup.require()
        # Last, because it is what takes long.
        if not isinstance(engine, Engine):
            engine = make_engine(
                choose_engine(engine, checkpoint.config, dtype, device, image_size),
                checkpoint,
                image_size=image_size,
                weight_cache=weight_cache,
                progress=progress,
            )
        return cls(
            pipeline,
            engine,
            steps=setup.steps if steps is None else steps,
            sampler=sampler,
            seed=seed,
            n_action_steps=setup.n_action_steps if n_action_steps is None else n_action_steps,
            on_limit=on_limit,
            real_time=real_time,
            metadata=setup.describe(),
        )

    def infer(
        self,
        observation: Observation,
        noise: NDArray[np.floating] | Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
        *,
        previous: NDArray[np.floating] | None = None,
        delay: int = 0,
    ) -> dict[str, Any]:
        """The actions for an observation.

        Args:
            observation: the robot's keys (`Robot.cameras`, `Robot.state`) and "prompt" or "task".
            noise: [horizon, action_dim of the model] or [1, …], any floating point; None: drawn
                from the policy's generator.
            on_step: called after each denoising step.
            previous: [n, D] in robot units, actions of an earlier chunk that are still to be
                executed, the first at the tick of this observation: the new chunk continues them
                (`real_time`). None: a chunk of its own.
            delay: how many of them will have been executed when the new chunk arrives.

        Returns:
            "actions" [horizon, D] float32 in robot units; "model_actions" [horizon, action_dim of
            the model] float32 in the model's units; "state" [D] float32 as observed; "limits":
            what the guard found (see `apply_limits`); "policy_timing" in milliseconds.

        Raises:
            ObservationError: something in the observation cannot be used.
            LimitError: an action is beyond the robot's limits, and `on_limit` is "error".
            EngineError: the engine's answer is not finite.
            ConfigError: `previous` is given, and `real_time` is None.
        """
        encoded = self.encode(observation, noise, previous=previous, delay=delay)
        return self.decode(encoded, self.sample([encoded], on_step)[0])

    def encode(
        self,
        observation: Observation,
        noise: NDArray[np.floating] | Tensor | None = None,
        *,
        previous: NDArray[np.floating] | None = None,
        delay: int = 0,
    ) -> Encoded:
        """The first part of `infer`, with its arguments: what the engine is given.

        `sample` is the second, for several observations at once, and `decode` the last.

        Raises:
            ObservationError, ConfigError: see `infer`.
        """
        start = time.perf_counter()
        inputs, state = self.pipeline.encode(observation)
        x = self._noise(noise)
        guidance = self._guidance(previous, delay, state)
        return Encoded(inputs, state, x, guidance, time.perf_counter() - start)

    def sample(
        self, batch: Sequence[Encoded], on_step: Callable[[], None] = lambda: None
    ) -> list[Sampled]:
        """The actions of observations whose `batch_key` is equal, in one call of the engine.

        Raises:
            EngineError: the engine takes one observation at a time, or its answer is not finite.
        """
        self.engine.check_batch(len(batch))
        inputs = ModelInputs.joined([row.inputs for row in batch])
        noise = torch.cat([row.noise for row in batch])
        start = time.perf_counter()
        how = self.steps, on_step, batch[0].guidance, self.sampler
        actions = self.engine.sample(inputs, noise, *how)
        seconds = time.perf_counter() - start
        return [Sampled(row.numpy(), seconds) for row in actions.detach().to("cpu", torch.float32)]

    def decode(
        self, encoded: Encoded, sampled: Sampled, before: NDArray[np.float64] | None = None
    ) -> dict[str, Any]:
        """The last part of `infer`: what it returns.

        Args:
            before: the action [D] that the robot executed last, if it is known.

        Raises:
            LimitError, EngineError: see `infer`.
        """
        start, state = time.perf_counter(), encoded.state
        actions = self.pipeline.decode(sampled.actions.astype(np.float64), state)
        with np.errstate(over="ignore"):
            if not np.isfinite(actions.astype(np.float32)).all():
                raise EngineError(
                    "actions: expected finite values in the robot's units, found NaN or infinite "
                    "ones. The statistics or the robot's conventions are damaged."
                )
        limits: dict[str, Any] = {}
        if self.pipeline.robot.limits is not None:
            actions, limits = self._guard(actions, state, before)
        seconds = time.perf_counter() - start
        return {
            "actions": actions.astype(np.float32),
            "model_actions": sampled.actions,
            "state": state.astype(np.float32),
            "limits": limits,
            "policy_timing": {
                "preprocess_ms": encoded.seconds * 1e3,
                "infer_ms": sampled.seconds * 1e3,
                "postprocess_ms": seconds * 1e3,
                "total_ms": (encoded.seconds + sampled.seconds + seconds) * 1e3,
            },
        }

    def select_action(self, observation: Observation) -> NDArray[np.float32]:
        """The next action [D]; a new chunk is computed after every `n_action_steps` of them. The
        queue is the policy's, so for one robot's loop at a time; `reset` empties it."""
        with self._queue_lock:
            if not self._queue:
                encoded = self.encode(observation)
                result = self.decode(encoded, self.sample([encoded])[0], self._last)
                self._queue.extend(result["actions"][: self.n_action_steps])
            action = self._queue.popleft()
            self._last = action.astype(np.float64)
            return action

    def reset(self) -> None:
        """Forgets the actions that `select_action` has not handed out: a new episode begins."""
        with self._queue_lock:
            self._queue.clear()
            self._last = None

    @property
    def robot(self) -> Robot:
        """The robot's table."""
        return self.pipeline.robot

    def close(self) -> None:
        """Frees the engine and forgets actions; the policy cannot be used afterwards."""
        self.reset()
        self.engine.close()

    def draw_noise(self) -> Tensor:
        """The generator's next noise, [1, horizon, action_dim of the model] float32."""
        with self._lock:
            return torch.randn(1, *self.noise_shape, generator=self._generator)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Horizon and action_dim of the model."""
        return self.engine.config.horizon, self.engine.config.action_dim

    def _noise(self, noise: NDArray[np.floating] | Tensor | None) -> Tensor:
        if noise is None:
            return self.draw_noise()
        given = to_tensor("noise", noise)
        if given.is_floating_point():
            given = given.detach().to("cpu", torch.float32)
        batch = 1 if given.ndim == 3 else None
        return check_noise(self.engine.config, batch, given).view(1, *self.noise_shape)

    def _guidance(
        self, previous: NDArray[np.floating] | None, delay: int, state: NDArray[np.float64]
    ) -> Guidance | None:
        if previous is None:
            return None
        if self.real_time is None:
            wanted = "a policy made with real_time=RealTimeChunking()"
            raise ConfigError(f"previous: expected {wanted}, found one without.")
        return make_inpainting(self.real_time, self.pipeline, previous, delay, state)

    def _guard(
        self,
        actions: NDArray[np.float64],
        state: NDArray[np.float64],
        before: NDArray[np.float64] | None,
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        robot = self.pipeline.robot
        assert robot.limits is not None
        actions, violations = apply_limits(
            robot.limits, actions, state, self.on_limit, robot.action_names, before
        )
        if violations:
            done = "clamped" if self.on_limit == "clamp" else "returned as they are"
            logger.warning("robot %s: %s; %s.", robot.name, summary(violations), done)
        return actions, as_data(violations, self.on_limit)


def _count(name: str, value: Any, low: int, high: int) -> int:
    if not (is_whole(value) and low <= value <= high):
        raise ConfigError(f"{name}: expected a whole number from {low} to {high}, found {value!r}.")
    return int(value)


def _say_once_without_limits(robot: Robot) -> None:
    if robot.limits is None and robot.name not in _without_limits:
        _without_limits.add(robot.name)
        logger.warning(WITHOUT_LIMITS, robot.name)
