"""openpi's messages: msgpack with NumPy arrays, written byte for byte and read within limits.

An array is a map whose keys are bytes: `__ndarray__` (True), `data` (C order), `dtype` (NumPy's
text, such as "<f4") and `shape`; a NumPy scalar has `__npgeneric__`, `data` and `dtype`. Source:
`msgpack_numpy.py` of openpi-client 0.1.2.

Nothing is unpickled, and arrays of objects are refused in both directions. What is read is bounded
before it is built: the size of a message, its lists, its values and its arrays.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from pi0.errors import ObservationError, Pi0Error, human_bytes, kind_of

ARRAY, SCALAR, DATA, DTYPE, SHAPE = b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"
UNPACKED_KINDS = "VOc"  # of NumPy: structures, objects and complex numbers
READABLE_DTYPE = re.compile(r"[<>|=]?[biufSU]\d{1,4}", re.ASCII)
READABLE_SCALAR = re.compile(r"[<>|=]?[biuf]\d{1,2}", re.ASCII)
MAX_DIMENSIONS = 8
MAX_LIST = 1024  # values in one list or map
LAST_CODE_POINT = 0x10FFFF
# What msgpack says, and what that means to whoever sent it.
MEANINGS = {
    r".*incomplete input.*": "one that is cut off",
    r"\d+ exceeds max_ext_len.*": "an extension type",
    r"(\d+) exceeds max_array_len\((\d+)\)": r"a list of \1 values, which may have \2",
    r"(\w+) is not allowed for map key.*": r"a key of type \1, which must be text",
    r"'utf-8' codec can't decode (byte \w+) .*": r"text that is not UTF-8 (\1)",
    r"(\d+) exceeds max_map_len\((\d+)\)": r"a map of \1 keys, which may have \2",
}


@dataclass(frozen=True)
class MessageLimits:
    """What a message may hold.

    Attributes:
        message_bytes: the whole of it.
        array_bytes: one array.
        depth: maps and lists inside each other.
        values: numbers, texts, arrays, lists and keys together.
    """

    message_bytes: int = 32 << 20
    array_bytes: int = 16 << 20
    depth: int = 8
    values: int = 16384


def pack(value: Any) -> bytes:
    """A value as openpi's client reads it: plain data, NumPy arrays and scalars.

    Raises:
        Pi0Error: something in it has no form in a message.
    """
    try:
        packed: bytes = msgpack.packb(value, default=_pack_numpy)
    except (TypeError, ValueError, OverflowError) as error:
        raise Pi0Error(f"message: expected plain data and arrays, found {error}.") from error
    return packed


def unpack(frame: bytes, limits: MessageLimits) -> Any:
    """The value of a frame; arrays are read-only views of it.

    Raises:
        ObservationError: it is no such message, or beyond the limits.
    """
    if len(frame) > limits.message_bytes:
        raise ObservationError(
            f"observation: expected a message of at most {human_bytes(limits.message_bytes)}, "
            f"found {human_bytes(len(frame))}. Send smaller images, as uint8."
        )
    counter = _Counter(limits.values)
    try:
        value = msgpack.unpackb(
            frame,
            object_pairs_hook=counter.map,
            list_hook=counter.list,
            max_array_len=MAX_LIST,
            max_map_len=MAX_LIST,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise ObservationError(
            "observation: expected a msgpack message as openpi's client packs it, found "
            f"{_reason(error)}."
        ) from error
    return _restored("observation", value, limits, depth=0)


class _Counter:
    """Counts values while a message is read, so that a small message cannot become a large one."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def map(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        self._count(2 * len(pairs))
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ObservationError(f"observation: expected each key once, found {twice!r} twice.")
        return made

    def list(self, values: list[Any]) -> list[Any]:
        self._count(len(values))
        return values

    def _count(self, more: int) -> None:
        self.left -= more
        if self.left < 0:
            raise ObservationError(
                "observation: expected fewer values, found too many lists. Send arrays instead."
            )


def _restored(path: str, value: Any, limits: MessageLimits, depth: int) -> Any:
    """A value with its arrays and scalars; `path` names it in errors."""
    if isinstance(value, (dict, list)) and depth >= limits.depth:
        raise ObservationError(
            f"{path}: expected at most {limits.depth} levels of maps and lists, found more."
        )
    if isinstance(value, list):
        return [
            _restored(f"{path}[{i}]", inner, limits, depth + 1) for i, inner in enumerate(value)
        ]
    if isinstance(value, dict):
        if ARRAY in value:
            return _array(path, value, limits.array_bytes)
        if SCALAR in value:
            return _scalar(path, value)
        inside = "" if path == "observation" else f"{path}/"
        return {
            key: _restored(f"{inside}{_name(key)}", inner, limits, depth + 1)
            for key, inner in value.items()
        }
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise ObservationError(f"{path}: expected plain data, found {kind_of(value)}.")


def _array(path: str, fields: dict[Any, Any], limit: int) -> NDArray[Any]:
    dtype = _dtype(path, fields.get(DTYPE), READABLE_DTYPE)
    data, shape = fields.get(DATA), fields.get(SHAPE)
    if not isinstance(data, bytes):
        raise ObservationError(f"{path}: expected an array's bytes, found {_name(data)}.")
    if len(data) > limit:
        raise ObservationError(
            f"{path}: expected an array of at most {human_bytes(limit)}, found "
            f"{human_bytes(len(data))}. Send a smaller image, as uint8."
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(side) is int and 0 <= side < 2**31 for side in shape)
    ):
        raise ObservationError(
            f"{path}: expected a shape of at most {MAX_DIMENSIONS} whole numbers, found "
            f"{_name(shape)}."
        )
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ObservationError(
            f"{path}: expected {math.prod(shape) * dtype.itemsize} bytes for shape {shape} of "
            f"{dtype.name}, found {len(data)}."
        )
    if dtype.kind == "U":
        _check_text(path, data, dtype)
    try:
        return np.ndarray(tuple(shape), dtype, data)
    except ValueError as error:  # NumPy multiplies the sides without those that are 0
        raise ObservationError(
            f"{path}: expected a shape that an array can have, found {shape}."
        ) from error


def _scalar(path: str, fields: dict[Any, Any]) -> Any:
    dtype = _dtype(path, fields.get(DTYPE), READABLE_SCALAR)
    value = fields.get(DATA)
    if not isinstance(value, (bool, int, float)):
        raise ObservationError(f"{path}: expected a number, found {_name(value)}.")
    try:
        with np.errstate(over="ignore"):
            return dtype.type(value)
    except (OverflowError, ValueError) as error:
        raise ObservationError(
            f"{path}: expected a number that {dtype.name} holds, found {value}."
        ) from error


def _dtype(path: str, name: Any, readable: re.Pattern[str]) -> np.dtype[Any]:
    try:
        if isinstance(name, str) and readable.fullmatch(name):
            dtype = np.dtype(name)
            if dtype.itemsize:
                return dtype
    except TypeError:  # "f3", which has the form of a dtype and is none
        pass
    raise ObservationError(
        f"{path}: expected an array of numbers or text, such as dtype '<f4', found {_name(name)}."
    )


def _check_text(path: str, data: bytes, dtype: np.dtype[Any]) -> None:
    """Raises ObservationError for what is no text: NumPy would fail when somebody reads it."""
    points = np.frombuffer(data, np.dtype(np.uint32).newbyteorder(dtype.byteorder))
    if points.size and points.max() > LAST_CODE_POINT:
        raise ObservationError(f"{path}: expected text, found {int(points.max()):#x} in it.")


def _name(value: Any) -> str:
    """A value in an error message: a text as it is, others short."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _reason(error: Exception) -> str:
    """Why msgpack did not read something, as a phrase."""
    if isinstance(error, msgpack.exceptions.StackError):
        return "too many lists inside each other"
    if isinstance(error, msgpack.exceptions.ExtraData):
        return "more bytes after its end"
    if isinstance(error, msgpack.exceptions.FormatError):
        return "bytes that are no msgpack"
    for said, meaning in MEANINGS.items():
        if found := re.fullmatch(said, str(error)):
            return found.expand(meaning)
    return (str(error) or type(error).__name__).rstrip(".").lower()


def _pack_numpy(value: Any) -> Any:
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError("a MaskedArray")  # whose bytes are those under the mask
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind in UNPACKED_KINDS:
            raise ValueError(f"an array of {value.dtype}")
        if isinstance(value, np.ndarray):
            data = value.tobytes()
            return {ARRAY: True, DATA: data, DTYPE: value.dtype.str, SHAPE: value.shape}
        return {SCALAR: True, DATA: value.item(), DTYPE: value.dtype.str}
    raise TypeError(kind_of(value))
