"""The way of data around the model, in both directions: robot units here, model units there.

`encode` turns an observation into the model's inputs, `decode` the model's actions into the
robot's, and `encode_actions`, the inverse of `decode`, recorded actions into training targets.
Inference, training, evaluation and serving all use these three.

    encode           robot → model convention, normalise, pad; images and prompt beside it (in
                     π0.5 the prompt holds the normalised state)
    decode           unnormalise, relative → absolute, model → robot convention, cut to the robot
    encode_actions   robot → model convention, absolute → relative, normalise, pad

The order is that of openpi's transforms (`policy_config.py`) and of LeRobot's processors. Knows no
engine and draws no noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0.config import Pi0Config
from pi0.errors import ConfigError, ObservationError, Pi0Error
from pi0.inputs import MAX_PIXEL, OVERFLOW_SIGMA, ModelInputs
from pi0.policy import images
from pi0.policy.normalize import OUTLIER_SIGMA, Normalizer
from pi0.policy.observation import (
    Observation,
    camera_keys,
    check_default_prompt,
    check_observation,
    lookup,
    read_image,
    read_prompt,
    read_state,
)
from pi0.policy.robot import Robot
from pi0.policy.tokenizer import PromptFormat, Tokenizer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pipeline:
    """Pre- and post-processing for one robot and one checkpoint; immutable, for any thread.

    Attributes:
        config: sizes of the model.
        resize: whose way of resizing images, "openpi" or "lerobot".
        prompt: how prompts are cleaned, ended and padded.
        state_stats, action_stats: robot units (in the model's convention) to model units and back.
        target_stats: normalises recorded actions; other than `action_stats` only where a LeRobot
            checkpoint's two processors say so.
        image_stats: by camera, of channels; only some LeRobot checkpoints have them.
        rename: observation key as it comes → key that the robot's table knows.
        default_prompt: what to do if an observation does not say.

    Raises:
        ObservationError: the default prompt is no sentence.
    """

    config: Pi0Config
    robot: Robot
    tokenizer: Tokenizer
    resize: str
    prompt: PromptFormat
    state_stats: Normalizer
    action_stats: Normalizer
    target_stats: Normalizer
    image_stats: Mapping[str, Normalizer] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.default_prompt is not None:
            check_default_prompt(self.default_prompt)

    @property
    def action_dim(self) -> int:
        """Actions handed out."""
        return self.robot.action_dim or self.action_stats.width

    def observation(self, images: Mapping[str, Any], state: Floats, prompt: str) -> dict[str, Any]:
        """See `Robot.observation`; in the keys from before the renames, so that `encode` reads them
        as these cameras and this state even where a rename goes on from another's result."""
        sources = {name: key for key, name in self.rename.items()}
        seen = self.robot.observation(images, state, prompt)
        return {sources.get(k, k) if k in self.rename else k: value for k, value in seen.items()}

    def encode(self, observation: Observation) -> tuple[ModelInputs, Floats]:
        """An observation as the model reads it (batch of 1), and the state [D] as observed.

        Raises:
            ObservationError: something in the observation cannot be used.
        """
        observation = check_observation(observation, self.robot, self.rename)
        state = read_state(observation, self.robot, self._state_widths())
        pixels = self._images(observation)
        prompt = read_prompt(observation, self.default_prompt)
        normalized = self.encode_state(state)
        _check_outliers(state, normalized)
        tokens, token_mask = self.tokenizer.tokenize(prompt, self.prompt, normalized)
        inputs = ModelInputs.validated(
            self.config,
            max_pixel=np.inf if self.image_stats else MAX_PIXEL,
            images=torch.stack(pixels)[None],
            image_mask=torch.ones(1, len(pixels), dtype=torch.bool),
            tokens=tokens[None],
            token_mask=token_mask[None],
            state=_padded(normalized[None], self.config.state_dim),
        )
        return inputs, state

    def encode_state(self, states: Floats) -> Floats:
        """States [..., D] as observed → normalised, in the model's convention, not padded."""
        return self.state_stats.normalize(self._model_convention(states))

    def decode(self, actions: Floats, state: Floats) -> Floats:
        """Actions in the model's units as the robot executes them.

        Args:
            actions: [..., H, action_dim of the model].
            state: [..., D] as `encode` returned it; leading axes as those of the actions.

        Returns:
            [..., H, `action_dim`] float64 in the robot's units.
        """
        actions = np.asarray(actions, np.float64)
        self._check(actions, state, self.config.action_dim)
        out = self.action_stats.unnormalize(actions)
        self._add_state(out, state, sign=1)
        out = out[..., : self.action_dim]
        if self.robot.decode_actions:
            out = self._converted("decode_actions", out)
        return out

    def encode_actions(self, actions: Floats, state: Floats) -> Floats:
        """Recorded actions as training targets; the inverse of `decode`.

        Args:
            actions: [..., H, D] in the robot's units, D being `action_dim`.
            state: [..., D] as observed when the chunk begins.

        Returns:
            [..., H, action_dim of the model] float64, padded with zeros.

        Raises:
            ObservationError: not as many actions as the robot has.
        """
        out = np.array(actions, np.float64)  # a copy, which is changed below
        self._check(out, state, self.action_dim)
        if self.robot.encode_actions:
            out = self._converted("encode_actions", out)
        self._add_state(out, state, sign=-1)
        return _pad(self.target_stats.normalize(out), self.config.action_dim)

    def _state_widths(self) -> range:
        """Allowed lengths of a state for which the robot's table leaves the choice to the
        statistics: their own, or, if they are those of the model's padded state, any that has what
        relative actions are added to."""
        width, shortest = self.state_stats.width, max(1, self.robot.reach(self.action_dim))
        return range(shortest if width == self.config.state_dim else width, width + 1)

    def _model_convention(self, state: Floats) -> Floats:
        return self._converted("encode_state", state) if self.robot.encode_state else state

    def _converted(self, name: str, values: Floats) -> Floats:
        """Values through one of the robot's functions, which may be somebody else's."""
        label, shape = f"robot {self.robot.name}: {name}", list(values.shape)
        try:
            out = np.asarray(getattr(self.robot, name)(values.copy()))
            if np.iscomplexobj(out):
                raise TypeError("complex numbers")
            out = out.astype(np.float64)
        except Pi0Error:  # its own sentence, such as of a state that it refuses
            raise
        except Exception as error:
            raise ConfigError(
                f"{label}: expected real numbers {shape}, as it was given, found "
                f"{type(error).__name__}: {error}."
            ) from error
        if out.shape != values.shape:
            raise ConfigError(
                f"{label}: expected shape {shape}, as it was given, found {list(out.shape)}."
            )
        return out

    def _check(self, actions: Floats, state: Floats, width: int) -> None:
        """Raises ObservationError unless actions are [..., H, width] and the state fits them."""
        name, state = self.robot.name, np.asarray(state)
        if actions.ndim < 2 or actions.shape[-1] != width:
            raise ObservationError(
                f"actions: expected [..., H, {width}] for robot {name}, found shape "
                f"{list(actions.shape)}."
            )
        length = self.robot.state_dim
        widths = self._state_widths() if length is None else range(length, length + 1)
        if (
            state.shape[:-1] != actions.shape[:-2]
            or not state.ndim
            or state.shape[-1] not in widths
        ):
            raise ObservationError(
                f"state: expected {[*actions.shape[:-2], widths[-1]]} beside actions "
                f"{list(actions.shape)} for robot {name}, found shape {list(state.shape)}."
            )
        if not (np.isfinite(actions).all() and np.isfinite(state).all()):
            raise ObservationError("actions and state: expected finite values, found others.")

    def _add_state(self, actions: Floats, state: Floats, sign: int) -> None:
        """Adds the state to relative actions [..., H, D], or takes it away, in place."""
        encoded = self._model_convention(np.asarray(state, np.float64))
        width = min(actions.shape[-1], encoded.shape[-1])
        relative = self.robot.relative(width)
        actions[..., :width] += sign * np.where(relative, encoded[..., None, :width], 0)

    def _images(self, observation: Observation) -> list[Tensor]:
        """The images that are there. An absent one is left out, which gives the same actions as a
        masked one (tests/model/test_masks.py) and costs nothing."""
        robot, size = self.robot, self.config.vision.image_size
        pixels = []
        for camera in robot.cameras:
            image = lookup(observation, camera.key)
            if image is not None:
                array = read_image(camera.key, image)
                stats = self.image_stats.get(camera.key)
                pixels.append(images.to_model(camera.key, array, size, self.resize, stats))
            elif camera.required:
                raise ObservationError(
                    f"camera {camera.key}: expected an image for robot {robot.name}, found none."
                )
        if not pixels:
            raise ObservationError(
                f"images: expected at least one of the cameras {camera_keys(robot)}, found none."
            )
        return pixels


def _check_outliers(state: Floats, normalized: Floats) -> None:
    """Warns of values that nobody trained on, and refuses those that the model overflows with.

    Raises:
        ObservationError: the second.
    """
    outliers = np.flatnonzero(~(np.abs(normalized) <= OUTLIER_SIGMA))
    if not outliers.size:
        return
    worst = ", ".join(f"state[{i}] = {state[i]:.6g}" for i in outliers[:4])
    more = f" and {outliers.size - 4} more" if outliers.size > 4 else ""
    found, question = f"{worst}{more}", "Is it this robot's, in its units?"
    far = "standard deviations or half ranges from what the checkpoint was trained on"
    if not np.all(np.abs(normalized) <= OVERFLOW_SIGMA):
        raise ObservationError(
            f"state: expected values less than {OVERFLOW_SIGMA:g} {far}, found {found}. {question}"
        )
    warnings.warn(f"state: {found}: more than {OUTLIER_SIGMA:.0f} {far}. {question}", stacklevel=4)


def _padded(values: Floats, width: int) -> Tensor:
    with np.errstate(over="ignore"):  # ModelInputs refuses what float32 cannot hold
        return torch.from_numpy(_pad(values, width).astype(np.float32))


def _pad(values: Floats, width: int) -> Floats:
    """Zeros at the end of the last axis, up to a width."""
    edges = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    return np.pad(values, edges)
