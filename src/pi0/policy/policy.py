"""Policy: a robot's observation in, its actions out.

Inwards: robot conventions → normalise → resize → tokenise → pad. Outwards, the mirror: unnormalise
→ relative to absolute → robot conventions → cut to the robot. The noise is drawn here and nowhere
else, from a generator on the CPU, so that a seed gives the same actions on every device.

Knows no engine: it is handed one, or asks the registry for it by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0.checkpoint.files import read_json
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.engines.base import Engine, make_engine
from pi0.errors import ObservationError, Pi0Error
from pi0.findings import enforce
from pi0.inputs import ModelInputs, check_noise, to_tensor
from pi0.policy import images
from pi0.policy.lerobot import LerobotProgram, is_lerobot, read_program
from pi0.policy.normalize import (
    NEEDED,
    Normalizer,
    Statistics,
    find_norm_stats,
    identity,
    make_normalizer,
    read_norm_stats,
)
from pi0.policy.robots import ROBOTS, Camera, Robot, delta_mask
from pi0.policy.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Conventions:
    """Whose way of resizing images and cleaning prompts a checkpoint was trained with: each
    "openpi" or "lerobot"."""

    resize: str
    prompt: str


class Policy:
    """A π0 policy for one robot. Make one with `from_checkpoint`.

    Attributes:
        engine: computes actions from model inputs.
        robot, conventions: see their classes.
        state_stats, action_stats: robot units to model units and back.
        steps: denoising steps.
    """

    def __init__(
        self,
        engine: Engine,
        robot: Robot,
        tokenizer: Tokenizer,
        conventions: Conventions,
        state_stats: Normalizer,
        action_stats: Normalizer,
        steps: int = 10,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.robot = robot
        self.tokenizer = tokenizer
        self.conventions = conventions
        self.state_stats = state_stats
        self.action_stats = action_stats
        self.steps = steps
        self._generator = torch.Generator().manual_seed(seed)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint | Path | str,
        *,
        robot: str | Robot | None = None,
        engine: str = "reference",
        device: str | None = None,
        dtype: str | None = None,
        tokenizer: Path | str | None = None,
        norm_stats: Path | str | None = None,
        norm_mode: str | None = None,
        resize: str | None = None,
        prompt: str | None = None,
        image_size: int | None = None,
        steps: int = 10,
        seed: int = 0,
        progress: Callable[[int], None] = lambda _: None,
        cache: bool = False,
    ) -> Policy:
        """A policy from a checkpoint: a folder, a file or an opened one.

        Args:
            robot: a name of `ROBOTS` or a table of your own; None: what a LeRobot checkpoint says,
                else "generic".
            tokenizer, norm_stats: files; None: looked for in the checkpoint (and caches).
                norm_stats "none": states and actions are in the model's units already.
            norm_mode: "mean_std", "quantiles" or "min_max"; None: what a LeRobot checkpoint says,
                else "mean_std" for π0.
            resize, prompt: "openpi" or "lerobot"; None: whose files the checkpoint has.
            image_size: pixels the model runs at; None: the checkpoint's.
            progress: called with bytes of weights read.
            cache: keep packed weights in a file beside the checkpoint, for the next start.

        Raises:
            Pi0Error: something that the policy needs is missing or does not fit.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        folder = checkpoint.folder
        program = _read_program(
            folder, norm_stats, norm_mode, robot is not None, tokenizer is not None
        )
        if program:
            enforce(program.findings)
        origin = "lerobot" if program else "openpi"
        conventions = Conventions(resize or origin, prompt or origin)
        for name, value in vars(conventions).items():
            if value not in images.RESIZE:
                raise Pi0Error(f"{name}: expected openpi or lerobot, found {value!r}.")
        table = choose_robot(robot, folder)
        state_stats, action_stats = _normalizers(checkpoint, program, norm_stats, norm_mode)
        words = load_tokenizer(Path(tokenizer) if tokenizer else find_tokenizer(folder))
        # Last, because it is what takes long.
        machine = make_engine(engine, checkpoint, device, dtype, image_size, progress, cache)
        return cls(
            machine, table, words, conventions, state_stats, action_stats, steps=steps, seed=seed
        )

    def infer(
        self,
        observation: Mapping[str, Any],
        noise: NDArray[np.float32] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """The actions for an observation.

        Args:
            observation: the robot's keys (`Robot.cameras`, `Robot.state`) and "prompt".
            noise: [horizon, action_dim] float32; None: drawn from the policy's generator.
            on_step: called after each denoising step.

        Returns:
            "actions" [horizon, D] float32 in robot units, "state" [D] as observed, "timing" in
            milliseconds.

        Raises:
            ObservationError: something in the observation cannot be used.
        """
        start = time.perf_counter()
        config = self.engine.config
        inputs = self.prepare(observation)
        if noise is None:
            x = torch.randn(1, config.horizon, config.action_dim, generator=self._generator)
        else:
            x = check_noise(config, 1, to_tensor("noise", noise)[None])
        ready = time.perf_counter()
        sampled = self.engine.sample(inputs, x, self.steps, on_step)
        done = time.perf_counter()
        state = self._state(observation)
        actions = self._outputs(sampled[0].double().numpy(), state)
        end = time.perf_counter()
        return {
            "actions": actions.astype(np.float32),
            "state": state.astype(np.float32),
            "timing": {
                "preprocess_ms": (ready - start) * 1e3,
                "infer_ms": (done - ready) * 1e3,
                "postprocess_ms": (end - done) * 1e3,
                "total_ms": (end - start) * 1e3,
            },
        }

    def prepare(self, observation: Mapping[str, Any]) -> ModelInputs:
        """An observation as the model reads it; see `infer`."""
        config = self.engine.config
        state = self.state_stats.normalize(self._encode(self._state(observation)))
        pixels = self._images(observation)
        tokens, token_mask = self.tokenizer.tokenize(
            observation.get("prompt", ""), config.max_tokens, self.conventions.prompt
        )
        padded = torch.zeros(1, config.state_dim)
        padded[0, : len(state)] = torch.from_numpy(state)
        return ModelInputs.validated(
            config,
            images=torch.stack(pixels)[None],
            image_mask=torch.ones(1, len(pixels), dtype=torch.bool),
            tokens=tokens[None],
            token_mask=token_mask[None],
            state=padded,
        )

    def _encode(self, state: Floats) -> Floats:
        return self.robot.encode_state(state) if self.robot.encode_state else state

    def _outputs(self, actions: Floats, state: Floats) -> Floats:
        actions = self.action_stats.unnormalize(actions)
        width = min(actions.shape[-1], len(state))
        relative = delta_mask(self.robot.delta, width)
        actions[:, :width] += np.where(relative, self._encode(state)[:width], 0)
        if self.robot.action_dim is not None:
            actions = actions[:, : self.robot.action_dim]
        return self.robot.decode_actions(actions) if self.robot.decode_actions else actions

    def _state(self, observation: Mapping[str, Any]) -> Floats:
        parts = []
        for key, length in self.robot.state:
            value = lookup(observation, key)
            if value is None:
                raise ObservationError(
                    f"observation of robot {self.robot.name}: expected {key!r}, found "
                    f"{', '.join(map(repr, observation))}."
                )
            part = np.atleast_1d(np.asarray(value, np.float64))
            expected = self.state_stats.width if length is None else length
            fits = len(part) == length if length else 1 <= len(part) <= expected
            if part.ndim != 1 or not fits:
                raise ObservationError(
                    f"{key}: expected {'' if length else '1 to '}{expected} values for robot "
                    f"{self.robot.name}, found shape {list(part.shape)}."
                )
            if not np.isfinite(part).all():
                raise ObservationError(
                    f"{key}: expected finite values, found {part[~np.isfinite(part)][0]} at index "
                    f"{int(np.flatnonzero(~np.isfinite(part))[0])}."
                )
            parts.append(part)
        return np.concatenate(parts)

    def _images(self, observation: Mapping[str, Any]) -> list[Tensor]:
        """The images that are there. An absent one is left out, which gives the same actions as a
        masked one (tests/model/test_masks.py) and costs nothing."""
        robot, size = self.robot, self.engine.config.vision.image_size
        _refuse_unknown(observation, robot)
        pixels = []
        for camera in robot.cameras:
            image = lookup(observation, camera.key)
            if image is not None:
                convention = self.conventions.resize
                pixels.append(images.to_model(camera.key, np.asarray(image), size, convention))
            elif camera.required:
                raise ObservationError(
                    f"camera {camera.key}: expected an image for robot {robot.name}, found none."
                )
        if not pixels:
            raise ObservationError(
                f"images: expected at least one of the cameras {_camera_keys(robot)}, found none."
            )
        return pixels


def lookup(observation: Mapping[str, Any], key: str) -> Any:
    """The value of a literal key, or of "a/b" inside nested mappings; None if there is none."""
    if key in observation:
        return observation[key]
    head, _, rest = key.partition("/")
    inner = observation.get(head)
    return lookup(inner, rest) if rest and isinstance(inner, Mapping) else None


def _refuse_unknown(observation: Mapping[str, Any], robot: Robot) -> None:
    keys = {
        f"{key}/{inner}" if isinstance(value, Mapping) else key
        for key, value in observation.items()
        for inner in (value if isinstance(value, Mapping) else [""])
    }
    known = {camera.key for camera in robot.cameras} | {key for key, _ in robot.state}
    unknown = sorted(keys - known - {"prompt", *robot.ignored})
    if unknown:
        raise ObservationError(
            f"observation: expected for robot {robot.name} the cameras {_camera_keys(robot)}, "
            f"{', '.join(key for key, _ in robot.state)} and prompt, found also "
            f"{', '.join(unknown)}."
        )


def _camera_keys(robot: Robot) -> str:
    return ", ".join(camera.key for camera in robot.cameras)


def _read_program(
    folder: Path,
    norm_stats: Path | str | None = None,
    norm_mode: str | None = None,
    robot_given: bool = False,
    tokenizer_given: bool = False,
) -> LerobotProgram | None:
    path = folder / "config.json"
    settings = read_json(path) if path.exists() else {}
    if not is_lerobot(folder, settings):
        return None
    statistics: Mapping[str, Statistics] | Literal["none"] | None = None
    if norm_stats is not None:
        statistics = "none" if norm_stats == "none" else read_norm_stats(Path(norm_stats))
    return read_program(
        folder,
        settings,
        statistics=statistics,
        norm_mode=norm_mode,
        robot_given=robot_given,
        tokenizer_given=tokenizer_given,
    )


def _lerobot_robot(program: LerobotProgram) -> Robot:
    return Robot(
        name="lerobot",
        # As in LeRobot, one camera at least must be there, the others may be absent.
        cameras=tuple(
            Camera(key, (key.removeprefix("observation.images."),), required=False)
            for key in program.cameras
        ),
        state=((program.state_key, program.state.width),),
        action_dim=program.action_dim,
        delta=tuple(1 if relative else -1 for relative in program.relative or ()),
    )


def choose_robot(robot: str | Robot | None, folder: Path) -> Robot:
    """The robot of a name; for None, what a LeRobot folder says, else the generic one.

    Raises:
        Pi0Error: there is none of that name.
    """
    if isinstance(robot, Robot):
        return robot
    if robot is None:
        program = _read_program(folder)
        return _lerobot_robot(program) if program else ROBOTS["generic"]
    if robot not in ROBOTS:
        raise Pi0Error(f"robot: expected one of {', '.join(ROBOTS)}, found {robot!r}.")
    return ROBOTS[robot]


def _normalizers(
    checkpoint: Checkpoint,
    program: LerobotProgram | None,
    norm_stats: Path | str | None,
    mode: str | None,
) -> tuple[Normalizer, Normalizer]:
    config = checkpoint.config
    if mode is not None and mode not in NEEDED:
        raise Pi0Error(f"norm_mode: expected one of {', '.join(NEEDED)}, found {mode!r}.")
    if norm_stats == "none":
        return identity("state", config.state_dim), identity("actions", config.action_dim)
    if program is not None:
        return program.state, program.actions
    path = Path(norm_stats) if norm_stats else find_norm_stats(checkpoint.folder)
    stats = read_norm_stats(path)
    mode = mode or ("quantiles" if config.adaptive_norm else "mean_std")
    return (
        make_normalizer("state", mode, "openpi", stats["state"]),
        make_normalizer("actions", mode, "openpi", stats["actions"]),
    )
