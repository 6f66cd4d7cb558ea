"""Reading a robot's observation: images, state and prompt, in the forms that people have them.

Accepted are numpy arrays, torch tensors of any dtype and device, PIL images and lists, each with or
without a batch axis of 1. What cannot be read is an `ObservationError` that names the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pi0.errors import ObservationError, kind_of
from pi0.inputs import without_values
from pi0.policy.robot import Robot

Floats = NDArray[np.float64]
Observation = Mapping[str, Any]

EIGHT_BIT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # others PIL would clip
NO_VECTORS = (Mapping, str, bytes, bytearray, set, frozenset, np.ma.MaskedArray)
MAX_DEPTH = 4  # of lists: an image in a batch
PROMPT_KEYS = ("prompt", "task")  # openpi's and LeRobot's
# What openpi's and LeRobot's own loops put beside an observation, and no policy reads.
BOOKKEEPING = {
    *("action", "actions", "timestamp", "index", "frame_index", "episode_index", "task_index"),
    *("dataset_index", "robot_type", "info", "reward", "done", "truncated", "success", "subtask"),
    *("policy_timing", "server_timing", "step", "episode_id"),
}
BOOKKEEPING_PREFIXES = ("next.", "action.", "complementary_data.")
BOOKKEEPING_SUFFIX = "_is_pad"


def check_observation(observation: Any, robot: Robot, rename: Mapping[str, str]) -> Observation:
    """An observation with keys renamed as a LeRobot checkpoint asks, without bookkeeping.

    Raises:
        ObservationError: no mapping, a key that is no text, two keys for one thing, or a key that
            the robot does not know.
    """
    if not isinstance(observation, Mapping):
        raise ObservationError(
            f"observation: expected a mapping of names to values, found {_kind(observation)}."
        )
    odd = [key for key in observation if not isinstance(key, str)]
    if odd:
        raise ObservationError(f"observation: expected keys that are text, found {odd[0]!r}.")
    renamed: dict[str, Any] = {}
    for key, value in observation.items():
        target = rename.get(key, key)
        if value is None:  # as if it were not there
            renamed.setdefault(target, None)
            continue
        if renamed.get(target) is not None:
            both = " and ".join(k for k in observation if rename.get(k, k) == target)
            raise ObservationError(
                f"observation: expected one value for {target}, found two, under {both}, which the "
                "checkpoint's renames make one."
            )
        renamed[target] = value
    _refuse_unknown(renamed, robot, {new: old for old, new in rename.items() if old in observation})
    return renamed


def without_tensors(key: str, value: Any) -> Any:
    """An observation, or a value of it, with arrays for tensors and pictures, as messages hold
    them.

    Raises:
        ObservationError: a tensor or a picture that is no array of numbers.
    """
    if isinstance(value, Mapping):
        return {inner: without_tensors(str(inner), item) for inner, item in value.items()}
    if isinstance(value, Image.Image):
        return read_image(key, value)
    return _without_tensors(key, value, MAX_DEPTH)


def lookup(observation: Observation, key: str) -> Any:
    """The value of a literal key, or of "a/b" inside nested mappings; None if there is none."""
    if key in observation:
        return observation[key]
    head, _, rest = key.partition("/")
    inner = observation.get(head)
    return lookup(inner, rest) if rest and isinstance(inner, Mapping) else None


def read_prompt(observation: Observation, default: str | None) -> str:
    """The prompt, under `prompt` or `task`: text, numpy's text, or a list or array of one.

    Raises:
        ObservationError: none and no default, two that differ, or no readable text.
    """
    found = {
        key: _text(key, observation[key]) for key in PROMPT_KEYS if observation.get(key) is not None
    }
    if len(set(found.values())) > 1:
        raise ObservationError(
            f"prompt: expected one sentence, found {found['prompt']!r} under prompt and "
            f"{found['task']!r} under task."
        )
    text = next(iter(found.values()), default)
    if text is None or not text.strip():
        raise ObservationError(
            f"prompt: expected a sentence under {' or '.join(PROMPT_KEYS)}, or a default prompt, "
            f"found {repr(text) if text is not None else 'none'}."
        )
    return text


def check_default_prompt(prompt: Any) -> None:
    """Raises ObservationError if a prompt for observations without one is no sentence."""
    if not isinstance(prompt, str) or not _text("default_prompt", prompt).strip():
        raise ObservationError(f"default_prompt: expected a sentence, found {_kind(prompt)}.")


def read_state(observation: Observation, robot: Robot, widths: range) -> Floats:
    """The robot's state [D] float64, its parts joined in the table's order.

    Args:
        widths: allowed lengths of a state whose length the table leaves to the statistics.

    Raises:
        ObservationError: a part is missing, of another length, or not finite numbers.
    """
    parts = []
    for key, length in robot.state:
        value = lookup(observation, key)
        if value is None:
            present = [repr(name) for name, value in observation.items() if value is not None]
            raise ObservationError(
                f"observation of robot {robot.name}: expected {key!r}, found "
                f"{', '.join(present) or 'nothing'}."
            )
        part = _vector(key, value)
        allowed = range(length, length + 1) if length else widths
        if part.ndim != 1 or len(part) not in allowed:
            low, high = allowed[0], allowed[-1]
            raise ObservationError(
                f"{key}: expected {low if low == high else f'{low} to {high}'} values for robot "
                f"{robot.name}, found shape {list(part.shape)}."
            )
        if not np.isfinite(part).all():
            raise ObservationError(
                f"{key}: expected finite values, found {part[~np.isfinite(part)][0]} at index "
                f"{int(np.flatnonzero(~np.isfinite(part))[0])}."
            )
        parts.append(part)
    return np.concatenate(parts)


def read_image(key: str, image: Any) -> NDArray[np.generic]:
    """An image as an array [H, W, 3] or [3, H, W] of its own dtype (bfloat16 becomes float32).

    Raises:
        ObservationError: no array of numbers.
    """
    if isinstance(image, (list, tuple)) and len(image) == 1 and isinstance(image[0], Image.Image):
        image = image[0]
    if isinstance(image, Image.Image) and image.mode != "RGB":
        if image.mode not in EIGHT_BIT_MODES:
            raise ObservationError(
                f"image {key}: expected a picture of 8 bits a channel, found mode {image.mode}."
            )
        image = image.convert("RGB")
    try:
        array = _array(key, image)
    except (TypeError, ValueError) as error:
        raise ObservationError(
            f"image {key}: expected an array of pixels, found {error}."
        ) from error
    if array.dtype == object or array.dtype.kind not in "uifb":
        raise ObservationError(f"image {key}: expected an array of pixels, found {_kind(image)}.")
    return array[0] if array.ndim == 4 and len(array) == 1 else array


def _refuse_unknown(observation: Observation, robot: Robot, origins: Mapping[str, str]) -> None:
    """Raises ObservationError for keys that the robot does not know; `origins` has what they were
    called before the checkpoint's renames."""
    keys = list(_paths(observation))
    known = {camera.key for camera in robot.cameras} | {key for key, _ in robot.state}
    known |= {*PROMPT_KEYS, *robot.ignored}
    unknown = sorted(key for key in {*keys} - known if not _is_bookkeeping(key))
    empty = [key for key in unknown if isinstance(lookup(observation, key), Mapping)]
    if empty:
        raise ObservationError(
            f"observation: expected values in {empty[0]}, found it empty. Robot {robot.name} has "
            f"the cameras {camera_keys(robot)}."
        )
    if unknown:
        found = [f"{k} (renamed from {origins[k]})" if k in origins else k for k in unknown]
        raise ObservationError(
            f"observation: expected for robot {robot.name} the cameras {camera_keys(robot)}, "
            f"the state {', '.join(key for key, _ in robot.state)} and prompt, found also "
            f"{', '.join(found)}. Rename or remove the extra keys."
        )
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ObservationError(
            f"observation: expected one value for {twice[0]}, found one under this key and one in "
            "nested mappings."
        )


def _paths(observation: Observation) -> Iterator[str]:
    """The keys of all values, those in nested mappings as "a/b"."""
    for key, value in observation.items():
        if isinstance(value, Mapping) and value and not _is_bookkeeping(key):
            yield from (f"{key}/{inner}" for inner in _paths(value))
        else:
            yield key


def camera_keys(robot: Robot) -> str:
    return ", ".join(camera.key for camera in robot.cameras)


def _is_bookkeeping(key: str) -> bool:
    return (
        key in BOOKKEEPING
        or key.startswith(BOOKKEEPING_PREFIXES)
        or key.endswith(BOOKKEEPING_SUFFIX)
    )


def _text(key: str, value: Any) -> str:
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if not isinstance(value, str):
        raise ObservationError(f"{key}: expected a sentence, found {_kind(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = ord(value[error.start])
        # Bytes that are no UTF-8 stand as U+DC80 to U+DCFF, here and in arguments of a command.
        found = f"the byte {bad - 0xDC00:#x}" if 0xDC80 <= bad <= 0xDCFF else f"{chr(bad)!r}"
        raise ObservationError(
            f"{key}: expected text in UTF-8, found {found} at position {error.start}."
        ) from error
    return str.__str__(value)  # of an enumeration's member, too: its text, not its name


def _vector(key: str, value: Any) -> Floats:
    if isinstance(value, NO_VECTORS):
        raise ObservationError(f"{key}: expected numbers, found {_kind(value)}.")
    # What can say itself which numbers it holds may iterate over others: a table over its labels.
    if isinstance(value, Iterable) and not hasattr(value, "__array__"):
        value = list(value)
    try:
        given = _array(key, value)
        if given.dtype.kind in "cmMV":
            raise ObservationError(f"{key}: expected real numbers, found {given.dtype}.")
        for item in given.flat if given.dtype.kind in "OSTU" else ():
            if isinstance(item, (str, bytes)):  # which numpy would read as a number
                raise ObservationError(f"{key}: expected numbers, found the text {str(item)!r}.")
        array = np.atleast_1d(given.astype(np.float64))
    except (TypeError, ValueError, OverflowError) as error:
        raise ObservationError(f"{key}: expected numbers, found {error}.") from error
    return array[0] if array.ndim == 2 and len(array) == 1 else array


def _array(key: str, value: Any) -> NDArray[np.generic]:
    """A value as an array, with tensors of any kind at any depth of lists."""
    if _is_masked(value):
        raise TypeError("a MaskedArray")  # numpy would take what is under the mask
    try:
        return np.asarray(_without_tensors(key, value, 0))
    except (TypeError, RuntimeError):  # a tensor that numpy does not read, inside a list
        return np.asarray(_without_tensors(key, value, MAX_DEPTH))


def _is_masked(value: Any) -> bool:
    """Whether a masked array lies in lists, level by level: a picture may be a million numbers."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        kinds = set(map(type, level))
        if any(issubclass(kind, np.ma.MaskedArray) for kind in kinds):
            return True
        if not any(issubclass(kind, (list, tuple)) for kind in kinds):
            break
        level = list(chain.from_iterable(x for x in level if isinstance(x, (list, tuple))))
    return False


def _without_tensors(key: str, value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        return _from_torch(key, value)
    if depth and isinstance(value, (list, tuple)):
        return [_without_tensors(key, item, depth - 1) for item in value]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return _without_tensors(key, value.tolist(), depth)
    return value


def _from_torch(key: str, tensor: Tensor) -> NDArray[np.generic]:
    found = without_values(tensor) or (f"a tensor of {tensor.dtype}" if tensor.is_complex() else "")
    if found:
        raise ObservationError(f"{key}: expected real numbers, found {found}.")
    tensor = tensor.detach().to("cpu").resolve_neg()
    # numpy has no bfloat16 and no eight-bit floats.
    known = (torch.float16, torch.float32, torch.float64)
    plain = tensor.is_floating_point() and tensor.dtype not in known
    array: NDArray[np.generic] = (tensor.float() if plain else tensor).numpy()
    return array


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    if type(value) is np.ndarray:
        return f"an array of {value.dtype} {list(value.shape)}"
    of = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
    return f"{kind_of(value)}{of}"
