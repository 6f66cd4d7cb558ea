"""A Gymnasium environment as evaluation sees it: made, checked against the policy, stepped.

The code of an environment is somebody else's and may raise anything; here it becomes one sentence.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ConfigError, ObservationError, Pi0Error, install_hint
from pi0.eval.plan import EnvOptions
from pi0.policy.limits import ActionLimits, apply_limits, summary
from pi0.policy.observation import lookup
from pi0.policy.robot import Robot

logger = logging.getLogger("pi0")
T = TypeVar("T")

SUCCESS_KEYS = ("success", "is_success")  # the tabletop's; LeRobot's and gymnasium-robotics'
DEFAULT_FPS = 10.0  # of films, where an environment does not say
SHOWN_IDS = 20
SIM_PACKAGES = ("gymnasium", "mujoco")


class Surface(Protocol):
    """What an environment needs of a policy's `Pipeline`, here or behind a server."""

    @property
    def robot(self) -> Robot: ...
    @property
    def rename(self) -> Mapping[str, str]: ...
    @property
    def action_dim(self) -> int: ...


@dataclass(frozen=True)
class Moment:
    """What an environment returned: by `reset` with `over` False, or by `step`.

    Attributes:
        success, wrong: None if the environment did not say.
        over: terminated or truncated.
    """

    observation: Any
    prompt: str | None
    success: bool | None
    wrong: bool | None
    over: bool


class Environment:
    """An environment for one policy at a time.

    Attributes:
        id: its name in sentences.
        tasks: what it declares, or nothing.
        robot: the robot table that its metadata name for its observations, or None.
        fps: of its films.
        spaces: of its observations by key; "a/b" is b inside a.
        limits: its action space [D] as limits.

    Raises:
        Pi0Error: there is no such environment, a package is missing, its observations hold no
            image, or its actions are no vector.
    """

    def __init__(self, options: EnvOptions, film: bool = False) -> None:
        self.id = options.id
        self._options = options
        self._env = _make(options, film)
        inner, space = self._env.unwrapped, self._env.action_space
        self.tasks = self._declared(getattr(inner, "tasks", None))
        metadata = self._env.metadata
        self.robot = metadata.get("robot")
        self.fps = float(metadata.get("render_fps") or DEFAULT_FPS)
        from gymnasium.spaces import Box

        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ConfigError(
                f"environment {self.id}: expected actions that are a vector (a Box of one axis), "
                f"found {space}."
            )
        self.limits = _limits(space)
        self._dtype = space.dtype
        self.spaces = dict(_leaves(self._env.observation_space))
        if not any(isinstance(s, Box) and len(s.shape) == 3 for s in self.spaces.values()):
            raise ConfigError(
                f"environment {self.id}: expected observations with images, found "
                f"{self._env.observation_space}. A wrapper may add pictures, such as Gymnasium's "
                "AddRenderObservation."
            )

    def _declared(self, tasks: Any) -> tuple[str, ...]:
        """The tasks that an environment has as an attribute."""
        if tasks is None:
            return ()
        if not isinstance(tasks, (tuple, list)) or not all(isinstance(t, str) for t in tasks):
            raise ConfigError(
                f"environment {self.id}: expected its attribute tasks to be a tuple of names, "
                f"found {tasks!r:.80}."
            )
        return tuple(tasks)

    def require_tasks(self, tasks: tuple[str, ...], seed: int) -> None:
        """Refuses tasks, if it declares none or fails with one of them."""
        if tasks and not self.tasks:
            raise ConfigError(
                f"environment {self.id}: expected one with tasks for --tasks, found that it "
                "declares none. Leave the option out."
            )
        for task in tasks:
            try:
                self._reset(seed, task, {})
            except Pi0Error as error:
                if task in self.tasks or isinstance(error, ConfigError):  # which names the tasks
                    raise
                raise ConfigError(
                    f"environment {self.id}: expected one of the tasks {', '.join(self.tasks)}, "
                    f"found {task!r}."
                ) from error

    def require_fit(self, pipeline: Surface) -> None:
        """Compares its spaces with what a policy reads and hands out.

        Raises:
            ConfigError: a key of the robot's table that it does not have, or actions of another
                width.
        """
        robot, space = pipeline.robot, self.spaces
        wanted = [c.key for c in robot.cameras if c.required] + [key for key, _ in robot.state]
        missing = [key for key in wanted if find(space, key, pipeline.rename) is None]
        images = [c.key for c in robot.cameras if find(space, c.key, pipeline.rename) is not None]
        if missing or not images:
            absent = missing or [camera.key for camera in robot.cameras]
            raise ConfigError(
                f"environment {self.id}: expected {', '.join(absent)} in its observations for "
                f"robot {robot.name}, found {', '.join(self.spaces)}. Name the robot whose keys "
                "these are (--robot)."
            )
        width = len(self.limits.low)
        if width != pipeline.action_dim:
            raise ConfigError(
                f"environment {self.id}: expected a policy with {width} actions, found "
                f"{pipeline.action_dim} of robot {robot.name}. Name the robot that the "
                "environment has (--robot), and a checkpoint for it."
            )

    def require_swap(self, seed: int, task: str | None) -> None:
        """Refuses swapped sentences where it does not swap them, seen by an episode's sentence."""
        plain = self._reset(seed, task, {}).prompt
        swapped = self._reset(seed, task, {"instruction": "swapped"}).prompt
        if plain is None or plain == swapped:
            raise ConfigError(
                f"environment {self.id}: expected one that knows the reset option instruction: "
                f"swapped, found the sentence {swapped!r} with and without it. Leave out "
                "--prompt-swap."
            )

    def reset(self, seed: int | None, task: str | None) -> Moment:
        """Begins an episode."""
        swap = {"instruction": "swapped"} if self._options.prompt_swap else {}
        return self._reset(seed, task, swap)

    def within(
        self, actions: NDArray[np.float64], on_limit: str, names: tuple[str, ...]
    ) -> tuple[NDArray[np.float64], int]:
        """Actions [K, D] in its action space, and how many of the given values are beyond it.

        Args:
            on_limit: see `apply_limits`; "warn" logs a warning.
            names: of the actions, for sentences; may be empty.

        Raises:
            LimitError: see `apply_limits`.
        """
        actions, violations = apply_limits(self.limits, actions, None, on_limit, names)
        if violations and on_limit == "warn":
            beyond = summary(violations)
            logger.warning("environment %s: %s; handed on as they are.", self.id, beyond)
        return actions, sum(len(violation.ticks) for violation in violations)

    def step(self, action: NDArray[np.float64]) -> Moment:
        """Executes an action [D].

        Raises:
            ConfigError: it does not report success.
        """
        return self._call("step", self._step, action.astype(self._dtype))

    def _step(self, action: NDArray[Any]) -> Moment:
        observation, _, terminated, truncated, info = self._env.step(action)
        moment = self._moment(observation, info, bool(terminated or truncated))
        if moment.success is None:
            raise ConfigError(
                f"environment {self.id}: expected {' or '.join(SUCCESS_KEYS)} in info, found "
                f"{', '.join(map(str, info)) or 'nothing'}."
            )
        return moment

    def render(self) -> NDArray[np.uint8]:
        """A picture [H, W, 3] for films.

        Raises:
            Pi0Error: it gives none.
        """
        picture = np.asarray(self._call("render", self._env.render))
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise Pi0Error(
                f"environment {self.id}: expected pictures [H, W, 3] uint8 from render for films, "
                f"found {picture.dtype} {list(picture.shape)}. Leave out --video."
            )
        return picture

    def close(self) -> None:
        """Releases what it holds."""
        self._call("close", self._env.close)

    def _reset(self, seed: int | None, task: str | None, options: dict[str, str]) -> Moment:
        asked = {**({} if task is None else {"task": task}), **options}

        def begin() -> Moment:
            observation, info = self._env.reset(seed=seed, options=asked or None)
            return self._moment(observation, info, over=False)

        return self._call("reset", begin)

    def _moment(self, observation: Any, info: Mapping[str, Any], over: bool) -> Moment:
        prompt = info.get("prompt") if self._options.prompt is None else self._options.prompt
        success, wrong = (
            next((self._flag(key, info[key]) for key in keys if info.get(key) is not None), None)
            for keys in (SUCCESS_KEYS, ("wrong",))
        )
        return Moment(observation, prompt, success, wrong, over)

    def _flag(self, key: str, value: Any) -> bool:
        try:
            return bool((np.asarray(value) > 0).any())  # NaN is no success
        except TypeError as error:
            raise ConfigError(
                f"environment {self.id}: expected true or false as {key} in info, found "
                f"{value!r:.80}."
            ) from error

    def _call(self, what: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
        try:
            return function(*args, **options)
        except Pi0Error:
            raise
        except Exception as error:  # code of somebody else, which may raise anything
            raise Pi0Error(
                f"environment {self.id}: expected {what} to succeed, found {type(error).__name__}: "
                f"{error}."
            ) from error


def find(observation: Any, key: str, rename: Mapping[str, str]) -> Any:
    """What an observation, or its space, has under a robot's key or under a name that the
    checkpoint renames to it; None if there is nothing."""
    names = (key, *(name for name, target in rename.items() if target == key))
    for name in names if isinstance(observation, Mapping) else ():
        value = lookup(observation, name)
        if value is not None:
            return value
    return None


def read(moment: Moment, pipeline: Surface, blank_cameras: bool) -> dict[str, Any]:
    """A policy's observation: what the robot's table names, and the sentence.

    Raises:
        ObservationError: there is no sentence.
    """
    if not isinstance(moment.prompt, str) or not moment.prompt.strip():
        raise ObservationError(
            "prompt: expected a sentence from --prompt or the environment's info, found "
            + ("none" if moment.prompt is None else f"{moment.prompt!r:.80}")
            + ". Name it with --prompt."
        )
    out: dict[str, Any] = {"prompt": moment.prompt}
    for camera in pipeline.robot.cameras:
        image = find(moment.observation, camera.key, pipeline.rename)
        if image is not None:
            out[camera.key] = np.zeros_like(image) if blank_cameras else image
    for key, _ in pipeline.robot.state:
        out[key] = find(moment.observation, key, pipeline.rename)
    return out


def _make(options: EnvOptions, film: bool) -> Any:
    """The Gymnasium environment, without Gymnasium's own checks of it."""
    gymnasium = _import_gymnasium()
    name = options.id
    more: dict[str, Any] = {**options.arguments, **({"render_mode": "rgb_array"} if film else {})}
    if options.max_steps is not None:
        more["max_episode_steps"] = options.max_steps
    try:
        if name.startswith("pi0/"):
            importlib.import_module("pi0.sim")  # which registers it
        return gymnasium.make(name, disable_env_checker=True, **more)
    except Pi0Error:
        raise
    except gymnasium.error.UnregisteredEnv as error:
        raise ConfigError(_unknown(name, gymnasium.registry)) from error
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        causes = (error, error.__cause__)
        package = next((n for e in causes if (n := getattr(e, "name", None))), str(error))
        hint = install_hint("sim") if package in SIM_PACKAGES else "Install it."
        raise Pi0Error(
            f"environment {name}: expected its packages, found no {package}. {hint}"
        ) from error
    except Exception as error:  # code of somebody else, which may raise anything
        raise Pi0Error(
            f"environment {name}: expected gymnasium.make to make it, found "
            f"{type(error).__name__}: {error}."
        ) from error


def _import_gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise Pi0Error(
            "evaluation: expected the package gymnasium, which the extra pi0[sim] brings, found "
            f"none. {install_hint('sim')}"
        ) from error
    return gymnasium


def _unknown(name: str, registry: Mapping[str, Any]) -> str:
    """The sentence for an environment that is not registered, with the nearest of its namespace."""
    short = name.rpartition(":")[2]
    namespace, slash, _ = short.rpartition("/")
    known = [other for other in registry if other.rpartition("/")[0] == namespace]
    if not known:
        return (
            f"environment: expected a registered Gymnasium environment, found {name!r}; nothing is "
            f"registered under {namespace + slash!r}. If a package registers it, name it as "
            f"PACKAGE:{name}."
        )
    more = f" and {len(known) - SHOWN_IDS} more" if len(known) > SHOWN_IDS else ""
    nearest = difflib.get_close_matches(short, known, SHOWN_IDS, cutoff=0)
    return f"environment: expected one of {', '.join(nearest)}{more}, found {name!r}."


def _leaves(space: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every space inside nested dict spaces, with its keys joined by "/"."""
    if isinstance(space, Mapping):
        for key, inner in space.items():
            yield from _leaves(inner, f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix or "a single array", space


def _limits(space: Any) -> ActionLimits:
    low, high = (
        tuple(float(v) if np.isfinite(v) else None for v in bound)
        for bound in (space.low, space.high)
    )
    none = (None,) * len(low)
    return ActionLimits(low, high, none, none)
