"""What a policy must know of a robot, as a table: cameras, state, actions, and their conventions.

The built-in tables are in `robots.py`, tables in TOML files are read by `robot_file.py`, and other
distributions may bring theirs as entry points. All of them are checked here when they are made.

Knows nothing of statistics, prompts or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ConfigError, ObservationError
from pi0.number import is_count, is_number
from pi0.policy.limits import ActionLimits

Floats = NDArray[np.float64]

RATES = (1e-3, 1e6)  # actions per second that a robot may execute

SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True)
class Camera:
    """A camera of a robot.

    Attributes:
        key: where its image is in an observation; "a/b" is the literal key or b inside a.
        names: short names, as `--image NAME=FILE` takes them.
        required: an absent camera is an error; else the model does without it.
    """

    key: str
    names: tuple[str, ...] = ()
    required: bool = True


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are(fits: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(fits, value))


def _is_camera(value: Any) -> bool:
    if not isinstance(value, Camera) or type(value.required) is not bool:
        return False
    return _is_text(value.key) and TEXTS[1](value.names)


def _is_part_of_state(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return _is_text(value[0]) and (value[1] is None or is_number(value[1]))


# What each field of a `Robot` must be, before its values are looked at. A text in place of a tuple
# of one text would otherwise be taken for its letters.
TEXTS = ("a tuple of texts", _are(_is_text))
FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text", lambda value: _is_text(value) and bool(value)),
    "cameras": (
        "at least one Camera(key=…, names=(…), required=True or False) in a tuple",
        lambda value: bool(value) and _are(_is_camera)(value),
    ),
    "state": ("a tuple of (key, length)", _are(_is_part_of_state)),
    "ignored": TEXTS,
    "delta": (
        "whole numbers other than 0 in a tuple",
        _are(lambda run: isinstance(run, int) and not isinstance(run, bool) and run != 0),
    ),
    **dict.fromkeys(
        ("encode_state", "decode_actions", "encode_actions"),
        ("a function", lambda value: value is None or callable(value)),
    ),
    "action_names": TEXTS,
    "action_units": TEXTS,
    "control_hz": ("a number", lambda value: value is None or is_number(value)),
    "limits": ("ActionLimits", lambda value: value is None or isinstance(value, ActionLimits)),
    "state_in_prompt": ("True, False or None", lambda value: value is None or type(value) is bool),
}  # fmt: skip


@dataclass(frozen=True)
class Robot:
    """A robot's side of a policy.

    Actions that the model sees may be relative to the state (`delta`) and in other conventions
    than the robot's (joint signs, gripper units). Each convention comes with its inverse, so that
    recorded actions can be turned into training targets.

    Attributes:
        cameras: in the order of the model's image slots.
        state: (key, length) of the vectors that make up the state, in order; a length of None
            means as many values as there are statistics for.
        action_dim: actions handed out; None: as many as there are statistics for.
        ignored: observation keys that are known and not read.
        delta: signed run lengths over action dimensions: a positive run is relative to the state,
            a negative one absolute. (6, -1) is six relative actions, then one absolute.
        encode_state: state [..., D] in the robot's convention → in the model's.
        decode_actions, encode_actions: actions [..., D] from the model's convention to the robot's,
            and its inverse.
        action_names, action_units: one for each action, for plots and messages; may be empty.
        control_hz: how many actions the robot executes a second, if that is known.
        limits: see `ActionLimits`; None: the robot states none.
        state_in_prompt: whether π0.5 was trained on this robot with the state in its prompt; None:
            the checkpoint's files decide. π0 has a token of the state and does not read this.

    Raises:
        ConfigError: the table contradicts itself.
    """

    name: str
    cameras: tuple[Camera, ...]
    state: tuple[tuple[str, int | None], ...]
    action_dim: int | None
    ignored: tuple[str, ...] = ()
    delta: tuple[int, ...] = ()
    encode_state: Callable[[Floats], Floats] | None = None
    decode_actions: Callable[[Floats], Floats] | None = None
    encode_actions: Callable[[Floats], Floats] | None = None
    action_names: tuple[str, ...] = ()
    action_units: tuple[str, ...] = ()
    control_hz: float | None = None
    limits: ActionLimits | None = None
    state_in_prompt: bool | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected {expected}, found {getattr(self, name)!r}"
            for name, (expected, fits) in FORMS.items()
            if not fits(getattr(self, name))
        ]
        if not problems:
            problems = [*self._camera_problems(), *self._vector_problems()]
        if problems:
            raise ConfigError(f"robot {self.name!r}: " + "; ".join(problems) + ".")

    @property
    def state_dim(self) -> int | None:
        """Values of the whole state; None if the statistics decide."""
        lengths = [length for _, length in self.state]
        return None if None in lengths else sum(length or 0 for length in lengths)

    @property
    def has_conventions(self) -> bool:
        """Whether the model sees other states or actions than the robot's, normalisation apart."""
        relative = any(run > 0 for run in self.delta)
        return relative or self.encode_state is not None or self.encode_actions is not None

    def relative(self, width: int) -> NDArray[np.bool_]:
        """[width] True for the actions that are relative to the state; those beyond `delta` are
        absolute."""
        mask = np.zeros(width, np.bool_)
        start = 0
        for run in self.delta:
            mask[start : start + abs(run)] = run > 0
            start += abs(run)
        return mask

    def reach(self, width: int) -> int:
        """How many state values the relative ones among `width` actions are added to."""
        return int(self.relative(width).nonzero()[0].max(initial=-1)) + 1

    def camera_key(self, name: str) -> str | None:
        """The key of the camera that a short name, a key or its last part means; None if there is
        none."""
        for camera in self.cameras:
            if name == camera.key or name in camera.names:
                return camera.key
        ends = [c.key for c in self.cameras if name == c.key.rpartition("/")[2]]
        return ends[0] if len(ends) == 1 else None

    def observation(self, images: Mapping[str, Any], state: Floats, prompt: str) -> dict[str, Any]:
        """An observation in this robot's own keys, from images by camera key and a flat state.

        Raises:
            ObservationError: the state has not as many values as the robot's.
        """
        state = state[0] if state.ndim == 2 and len(state) == 1 else state
        if state.ndim != 1 or self.state_dim not in (None, len(state)):
            raise ObservationError(
                f"state: expected {self.state_dim or 'a list of'} values for robot {self.name}, "
                f"found shape {list(state.shape)}."
            )
        ends = np.cumsum([length or len(state) for _, length in self.state])[:-1]
        parts = np.split(state, ends)
        return {
            **images,
            **{key: part for (key, _), part in zip(self.state, parts, strict=True)},
            "prompt": prompt,
        }

    def _camera_problems(self) -> list[str]:
        keys = [camera.key for camera in self.cameras]
        # A camera's own key may be one of its short names.
        names = [name for c in self.cameras for name in {c.key, *c.names}]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            return [f"cameras: expected distinct keys and names, found {', '.join(twice)} twice"]
        groups = {*keys}, {key for key, _ in self.state}, {*self.ignored}, {"prompt", "task"}
        every = [key for group in groups for key in group]
        shared = sorted({key for key in every if every.count(key) > 1})
        if shared:
            return [
                "cameras, state, ignored and prompt: expected keys of their own, found "
                f"{', '.join(shared)} in two of them"
            ]
        return [] if all(keys) else ["cameras: expected a key for each, found an empty one"]

    def _vector_problems(self) -> list[str]:
        problems = []
        keys = [key for key, _ in self.state]
        if not all(keys) or not keys or len(set(keys)) < len(keys):
            problems.append(f"state: expected distinct keys, at least one, found {keys}")
        lengths = [length for _, length in self.state]
        if any(not is_count(length) for length in lengths if length is not None):
            problems.append(f"state: expected lengths of 1 or more, found {lengths}")
        elif None in lengths and len(lengths) > 1:
            problems.append("state: expected a length for each of several keys, found None")
        if self.action_dim is not None and not is_count(self.action_dim):
            problems.append(f"action_dim: expected 1 or more, found {self.action_dim!r}")
            return problems
        slowest, fastest = RATES
        if self.control_hz is not None and not slowest <= self.control_hz <= fastest:
            problems.append(
                f"control_hz: expected {slowest:g} to {fastest:g}, found {self.control_hz}"
            )
        return problems + self._action_problems()

    def _action_problems(self) -> list[str]:
        problems = []
        covered = sum(map(abs, self.delta))
        bounds = {"actions": self.action_dim, "state values": self.state_dim}
        reach = {"actions": covered, "state values": self.reach(covered)}
        problems += [
            f"delta: expected runs over at most the {bound} {what}, found {reach[what]}"
            for what, bound in bounds.items()
            if bound is not None and reach[what] > bound
        ]
        if self.action_dim is not None:
            lengths = {
                "action_names": len(self.action_names),
                "action_units": len(self.action_units),
                "limits": 0 if self.limits is None else len(self.limits.low),
            }
            problems += [
                f"{name}: expected one for each of the {self.action_dim} actions, found {length}"
                for name, length in lengths.items()
                if length and length != self.action_dim
            ]
        elif self.action_names or self.action_units or self.limits:
            problems.append("action_names, action_units, limits: expected action_dim beside them")
        twice = sorted({name for name in self.action_names if self.action_names.count(name) > 1})
        if twice:
            problems.append(f"action_names: expected distinct ones, found {', '.join(twice)} twice")
        indices = [i for i in (self.limits.state if self.limits else ()) if i is not None]
        if any(not 0 <= i < (self.state_dim or 0) for i in indices):
            problems.append(f"limits.state: expected indices of state values, found {indices}")
        elif self.limits and self.encode_state is None and self.decode_actions is None:
            own = self.relative(len(self.limits.state)).nonzero()[0].tolist()
            states = [self.limits.state[i] for i in own]
            if any(n not in (None, i) for i, n in zip(own, states, strict=True)):
                problems.append(
                    f"limits.state: expected {own} for the relative actions, which are added to "
                    f"the state values of their own index, found {states}"
                )
        if (self.decode_actions is None) != (self.encode_actions is None):
            problems.append("decode_actions and encode_actions: expected both or neither")
        return problems
