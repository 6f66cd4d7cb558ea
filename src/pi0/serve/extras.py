"""What a client may say beside its observation: keys that begin with `pi0/`, all of them optional.

They are taken off before the policy reads the observation, so that openpi's client, which packs
whatever it is given, sends them unchanged.

    pi0/reset      true: with this observation another episode begins (for `--record`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi0.errors import ObservationError

PREFIX = "pi0/"
RESET = "pi0/reset"
KEYS = (RESET,)


@dataclass(frozen=True)
class Extras:
    """See above.

    Attributes:
        reset: another episode begins.
    """

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
            f"observation: expected of the keys that begin with {PREFIX} only {', '.join(KEYS)}, "
            f"found {unknown[0]}."
        )
    rest = {key: value for key, value in observation.items() if key not in said}
    return rest, Extras(reset=_flag(RESET, said.get(RESET, False)))


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ObservationError(f"{key}: expected true or false, found {value!r}.")
