"""The fields of each step of a LeRobot processor: their defaults, and which values are carried out.

A check answers with "expected …, found …", or None where a value is carried out. Source: the
dataclasses in LeRobot 0.6.1's `processor/`.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pi0.checkpoint.lerobot import EPS
from pi0.number import is_count, is_number

Check = Callable[[Any], str | None]

FEATURE_TYPES = ("STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE")
MOST_TOKENS = 100_000  # that prompts are padded to, in memory
MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")


@dataclass(frozen=True)
class Field:
    """A field of a step's config; a default that `check` refuses makes the field a required one."""

    default: Any
    check: Check


def show(value: Any) -> str:
    """A value of a JSON file for a message, shortened."""
    return "none" if value is None else reprlib.repr(value)


def _where(expected: str, fits: Callable[[Any], bool]) -> Check:
    return lambda value: None if fits(value) else f"expected {expected}, found {show(value)}"


def _one_of(*values: Any) -> Check:
    expected = f"one of {', '.join(map(show, values))}" if len(values) > 1 else show(values[0])
    return _where(expected, lambda x: any(type(x) is type(v) and x == v for v in values))


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value.values())


def _is_eps(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and value >= 0


def check_features(value: Any) -> str | None:
    """Features as LeRobot writes them: {key: {"type": …, "shape": […]}}."""
    if not isinstance(value, Mapping):
        return f"expected an object of features, found {show(value)}"
    for key, feature in value.items():
        kind = feature.get("type") if isinstance(feature, Mapping) else None
        shape = feature.get("shape") if isinstance(feature, Mapping) else None
        if kind not in FEATURE_TYPES or not (isinstance(shape, list) and all(map(is_count, shape))):
            return (
                f"expected {key} to have a type (one of {', '.join(FEATURE_TYPES)}) and a shape, "
                f"found {show(feature)}"
            )
    return None


def _check_norm_map(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return f"expected an object of modes, found {show(value)}"
    for kind, mode in value.items():
        if kind not in FEATURE_TYPES:
            return f"expected feature types ({', '.join(FEATURE_TYPES)}), found {kind}"
        if mode not in MODES:
            return f"expected norm_map {kind} to be one of {', '.join(MODES)}, found {mode}"
    return None


_ANYTHING = Field(None, lambda _: None)
_NOTHING = Field(None, _one_of(None))
_SWITCH = Field(False, _one_of(True, False))
_DEVICE = {
    "device": _ANYTHING,  # the engine has its own
    # Narrower types would round what the model reads.
    "float_dtype": Field(None, _one_of(None, "float32", "float")),
}
_NORMALIZE = {
    "features": Field(None, check_features),
    "norm_map": Field(None, _check_norm_map),
    "eps": Field(EPS, _where("a number that is not negative", _is_eps)),
    "normalize_observation_keys": Field(
        None, _where("a list of keys or null", lambda x: x is None or _is_strings(x))
    ),
    "stats": Field(None, _where("none, for the state_file has them", lambda x: not x)),
    "device": _ANYTHING,
    "dtype": _NOTHING,
}
_TOKENIZE = {
    "tokenizer_name": Field(None, _where("a name", lambda x: x is None or isinstance(x, str))),
    "tokenizer": _NOTHING,
    "max_length": Field(
        512,
        _where(f"1 to {MOST_TOKENS} tokens", lambda x: is_count(x) and x <= MOST_TOKENS),
    ),
    # The only text that LeRobot takes out of an observation.
    "task_key": Field("task", _one_of("task")),
    "padding_side": Field("right", _one_of("right", "left")),
    # Padding is masked and has no effect on actions, so that all of these are the same.
    "padding": Field("max_length", _one_of("max_length", "longest", "do_not_pad", True, False)),
    "truncation": Field(
        True, _one_of(True, False, "longest_first", "only_first", "do_not_truncate")
    ),
}
_RELATIVE = {
    "enabled": _SWITCH,
    "exclude_joints": Field(
        [], _where("a list of names or null", lambda x: x is None or isinstance(x, list))
    ),
    "action_names": Field(
        None, _where("a list of names or null", lambda x: x is None or isinstance(x, list))
    ),
}
_BATCH: dict[str, Mapping[str, Field]] = {"to_batch_processor": {}, "to_batch_processor_action": {}}

# By registered name. A step that is not listed is refused.
PREPROCESSOR_STEPS: dict[str, Mapping[str, Field]] = {
    "rename_observations_processor": {
        "rename_map": Field({}, _where("an object of names", _is_names))
    },
    **_BATCH,
    "to_batch_processor_observation": {},
    "to_batch_processor_complementary_data": {},
    "pi0_new_line_processor": {},
    # Its max_state_dim is declared and not used, in LeRobot too.
    "pi05_prepare_state_tokenizer_processor_step": {
        "max_state_dim": Field(32, _where("a count", is_count)),
        "task_key": Field("task", _one_of("task")),
    },
    "tokenizer_processor": _TOKENIZE,
    "device_processor": _DEVICE,
    "relative_actions_processor": _RELATIVE,
    "normalizer_processor": _NORMALIZE,
}
POSTPROCESSOR_STEPS: dict[str, Mapping[str, Field]] = {
    "unnormalizer_processor": _NORMALIZE,
    "absolute_actions_processor": {"enabled": _SWITCH, "relative_step": _NOTHING},
    **_BATCH,
    "device_processor": _DEVICE,
}
