"""What a client may say beside its observation: keys that begin with `pi0/`, all of them optional.

They are taken off before the policy reads the observation. openpi's client packs whatever it is
given, and so sends them unchanged.

    pi0/previous   [n, D], actions of an earlier chunk that are still to be executed, the first at
                   the tick of this observation: the new chunk continues them
    pi0/delay      how many of them will have been executed when the answer is there; 0 without it
    pi0/noise      what the chunk is sampled from, [horizon, action_dim of the model]
    pi0/reset      true: with this observation another episode begins (for `--record`)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ObservationError, kind_of
from pi0.number import is_whole

PREFIX = "pi0/"
PREVIOUS, DELAY, NOISE, RESET = "pi0/previous", "pi0/delay", "pi0/noise", "pi0/reset"
KEYS = (PREVIOUS, DELAY, NOISE, RESET)


@dataclass(frozen=True)
class Extras:
    """See above, and `Policy.infer`, whose arguments the first three are."""

    previous: NDArray[Any] | None = None
    delay: int = 0
    noise: NDArray[Any] | None = None
    reset: bool = False


def split_extras(observation: Any) -> tuple[Any, Extras]:
    """The observation without its `pi0/` keys, and what they say.

    Raises:
        ObservationError: a key that there is not, or a value of another kind.
    """
    if not isinstance(observation, Mapping):
        return observation, Extras()  # which the policy refuses
    said = {key: value for key, value in observation.items() if str(key).startswith(PREFIX)}
    unknown = [key for key in said if key not in KEYS]
    if unknown:
        raise ObservationError(
            f"observation: expected no key that begins with {PREFIX} but {', '.join(KEYS)}, found "
            f"{unknown[0]}."
        )
    if DELAY in said and PREVIOUS not in said:
        raise ObservationError(f"{DELAY}: expected beside {PREVIOUS}, found alone.")
    rest = {key: value for key, value in observation.items() if key not in said}
    return rest, Extras(
        previous=_numbers(PREVIOUS, said[PREVIOUS]) if PREVIOUS in said else None,
        delay=_count(DELAY, said.get(DELAY, 0)),
        noise=_numbers(NOISE, said[NOISE]) if NOISE in said else None,
        reset=_flag(RESET, said.get(RESET, False)),
    )


@contextlib.contextmanager
def naming_extras() -> Iterator[None]:
    """Errors of the block about arguments of `Policy.infer` name the keys that these were."""
    try:
        yield
    except ObservationError as error:
        text = str(error)
        if f"{PREFIX}{text.partition(':')[0]}" in KEYS:
            raise ObservationError(f"{PREFIX}{text}") from error
        raise


def add_extras(observation: Mapping[str, Any], extras: Extras) -> dict[str, Any]:
    """An observation that says them; the inverse of `split_extras`."""
    said: dict[str, Any] = {}
    if extras.previous is not None:
        said |= {PREVIOUS: extras.previous, DELAY: extras.delay}
    if extras.noise is not None:
        said[NOISE] = extras.noise
    if extras.reset:
        said[RESET] = True
    return {**observation, **said}


def _numbers(key: str, value: Any) -> NDArray[Any]:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        kind = value.dtype if isinstance(value, np.ndarray) else kind_of(value)
        raise ObservationError(f"{key}: expected an array of numbers, found {kind}.")
    return value.copy()  # what comes over the wire is read-only, of which PyTorch would warn


def _count(key: str, value: Any) -> int:
    if is_whole(value):
        return int(value)
    raise ObservationError(f"{key}: expected a whole number, found {value!r}.")


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ObservationError(f"{key}: expected true or false, found {value!r}.")
