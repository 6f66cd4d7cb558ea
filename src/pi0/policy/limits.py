"""The limits of a robot's actions, and the one guard that applies them.

The guard is the last thing between a policy and a robot: it sees actions in the robot's own units,
after everything else. Limits are those that the robot's table states; nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ConfigError, LimitError
from pi0.number import is_real, is_whole

Floats = NDArray[np.float64]
ON_LIMIT = ("error", "clamp", "warn")
HUGE = 1e30  # no limit of a robot
SHOWN = 4  # of several violations, in a message


@dataclass(frozen=True)
class ActionLimits:
    """Limits of each action, in its units, kept as plain numbers. None where there is none.

    Attributes:
        low, high: the least and the greatest value.
        step: the largest change from one tick to the next.
        state: index of the state value that an action commands, if it is a position of something
            that is measured: the first action may then be at most `step` from it, too.

    Raises:
        ConfigError: columns of different lengths, or limits that exclude everything.
    """

    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    step: tuple[float | None, ...]
    state: tuple[int | None, ...]

    def __post_init__(self) -> None:
        for name, column in vars(self).items():
            fits = is_whole if name == "state" else is_real
            if not isinstance(column, (list, tuple, np.ndarray)) or not all(
                value is None or fits(value) for value in column
            ):
                raise ConfigError(f"limits: {name}: expected a tuple of numbers, found {column!r}.")
            plain = (x.item() if isinstance(x, np.generic) else x for x in column)
            object.__setattr__(self, name, tuple(plain))
        lengths = {len(column) for column in vars(self).values()}
        if len(lengths) != 1:
            raise ConfigError(f"limits: expected columns of one length, found {sorted(lengths)}.")
        for i, (low, high, step) in enumerate(zip(self.low, self.high, self.step, strict=True)):
            numbers = [value for value in (low, high, step) if value is not None]
            if not all(abs(n) < HUGE for n in numbers):
                raise ConfigError(
                    f"limits of action {i}: expected finite numbers, found {numbers}."
                )
            if low is not None and high is not None and low > high:
                raise ConfigError(
                    f"limits of action {i}: expected low at most high, found {low} and {high}."
                )
            if step is not None and step <= 0:
                raise ConfigError(
                    f"limits of action {i}: expected a step of more than 0, found {step}."
                )


@dataclass(frozen=True)
class Violation:
    """Ticks of one action that were beyond one of its limits; `value` is the worst of them."""

    action: int
    name: str
    kind: str  # "low", "high" or "step"
    limit: float
    value: float
    ticks: list[int]

    def __str__(self) -> str:
        bound = {
            "low": f"at least {self.limit:g}",
            "high": f"at most {self.limit:g}",
            "step": f"a change of at most {self.limit:g} a tick",
        }[self.kind]
        where = f"tick {self.ticks[0]}" + (
            f" and {len(self.ticks) - 1} more" if len(self.ticks) > 1 else ""
        )
        return f"action {self.name}: expected {bound}, found {self.value:.6g} at {where}"


def apply_limits(
    limits: ActionLimits,
    actions: Floats,
    state: Floats | None,
    on_limit: str,
    names: tuple[str, ...] = (),
    last: Floats | None = None,
) -> tuple[Floats, list[Violation]]:
    """Actions [H, D] that a robot may execute, and where the given ones were beyond its limits.

    With "clamp", values are brought into [low, high] and then to within `step` of the tick before,
    tick by tick; with "warn" they are handed out as they are. Before the first tick are the state,
    where the limits say which value of it an action commands, and `last`, which counts where no
    value is within a step of both. Actions are handed out in float32, in which limits are compared:
    an action at its limit is within it before and after rounding.

    Args:
        state: [D] as observed, which `limits.state` points into; None: it does not count.
        last: the action [D] that the robot executed last, if it is known.

    Raises:
        LimitError: `on_limit` is "error", and an action is beyond a limit; or "clamp", and the
            range is further away than a step.
    """
    low, high, step = (_column(limits, name) for name in ("low", "high", "step"))
    starts = []
    if state is not None:
        starts.append(np.array([np.nan if i is None else state[i] for i in limits.state]))
    if last is not None:
        starts.append(last)
    change = np.abs(np.diff(actions, axis=0, prepend=actions[:1]))
    with np.errstate(invalid="ignore"):
        if starts:
            change[0] = np.fmax.reduce([np.abs(actions[0] - start) for start in starts])
        rounding = np.finfo(np.float32).eps * (np.abs(actions) + change)
        beyond = {"low": actions < low, "high": actions > high, "step": change > step + rounding}
    shown = {"low": actions, "high": actions, "step": change}
    violations = [
        _violation(limits, i, kind, bad[:, i], shown[kind][:, i], names)
        for i in range(actions.shape[1])
        for kind, bad in beyond.items()
        if bad[:, i].any()
    ]
    if not violations or on_limit == "warn":
        return actions, violations
    refused = f"{summary(violations)}. No action of this chunk is returned. "
    clamped = _clamp(actions, starts, low, high, step)
    outside = np.flatnonzero(((clamped < low) | (clamped > high)).any(axis=0))
    if outside.size:
        name = names[outside[0]] if names else outside[0]
        raise LimitError(
            f"{refused}They cannot be clamped: action {name} starts further from its range than a "
            "step. Move the robot into its range first."
        )
    if on_limit == "error":
        raise LimitError(
            f'{refused}on_limit="clamp" (--on-limit clamp) would bring them within the limits.'
        )
    return clamped, violations


def summary(violations: list[Violation]) -> str:
    """The first few violations, in words."""
    more = [f"and {len(violations) - SHOWN} more"] * (len(violations) > SHOWN)
    return "; ".join([*map(str, violations[:SHOWN]), *more])


def as_data(violations: list[Violation], on_limit: str) -> dict[str, Any]:
    """What a result says of the limits, as plain data."""
    return {"on_limit": on_limit, "violations": [vars(violation) for violation in violations]}


def _column(limits: ActionLimits, name: str) -> Floats:
    missing = -np.inf if name == "low" else np.inf
    column = [missing if value is None else value for value in getattr(limits, name)]
    return np.array(column, np.float64 if name == "step" else np.float32).astype(np.float64)


def _violation(
    limits: ActionLimits,
    action: int,
    kind: str,
    bad: NDArray[np.bool_],
    shown: Floats,
    names: tuple[str, ...],
) -> Violation:
    worst = shown[bad].min() if kind == "low" else shown[bad].max()
    name = names[action] if names else str(action)
    limit = float(getattr(limits, kind)[action])
    return Violation(action, name, kind, limit, float(worst), np.flatnonzero(bad).tolist())


def _clamp(
    actions: Floats, starts: list[Floats], low: Floats, high: Floats, step: Floats
) -> Floats:
    out = np.clip(actions, low, high)
    for row in out:
        for before in starts:
            # Where nothing is known of the tick before, fmin and fmax take the other operand.
            np.fmax(np.fmin(row, before + step), before - step, out=row)
        starts = [row]
    return out
