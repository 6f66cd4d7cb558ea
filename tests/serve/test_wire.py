"""Messages: openpi's bytes, every value there and back, and what is refused."""

from __future__ import annotations

import contextlib
import pickle
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from pi0.errors import ObservationError, Pi0Error
from pi0.serve.wire import MessageLimits, pack, unpack

LIMITS = MessageLimits()

DTYPES = st.one_of(
    numpy_st.boolean_dtypes(),
    numpy_st.integer_dtypes(endianness="?"),
    numpy_st.unsigned_integer_dtypes(endianness="?"),
    numpy_st.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    numpy_st.unicode_string_dtypes(max_len=5),
    numpy_st.byte_string_dtypes(max_len=5),
)
ARRAYS = numpy_st.arrays(DTYPES, numpy_st.array_shapes(min_dims=0, max_dims=4, min_side=0))
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
)
VALUES = st.recursive(
    st.one_of(PLAIN, ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
MESSAGES = st.dictionaries(st.text(max_size=12), VALUES, max_size=5)


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, NaN equal to itself."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def array(**changes: Any) -> dict[bytes, Any]:
    """The map of an array [2] float32, with changes; None removes."""
    fields = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    fields |= {key.encode(): value for key, value in changes.items()}
    return {key: value for key, value in fields.items() if value is not None}


def test_the_bytes_are_openpis() -> None:
    """As its client 0.1.2 packs {"a": [0, 1, 2] float32}."""
    expected = bytes.fromhex("81a16184c40b") + b"__ndarray__" + bytes.fromhex("c3c404") + b"data"
    expected += bytes.fromhex("c40c") + struct.pack("<3f", 0, 1, 2)
    expected += bytes.fromhex("c405") + b"dtype" + bytes.fromhex("a3") + b"<f4"
    expected += bytes.fromhex("c405") + b"shape" + bytes.fromhex("9103")
    assert pack({"a": np.arange(3, dtype=np.float32)}) == expected


@given(MESSAGES)
def test_values_come_back(value: dict[str, Any]) -> None:
    assert same(unpack(pack(value), LIMITS), value)


@given(DTYPES.filter(lambda dtype: dtype.kind in "biuf"), st.data())
def test_scalars_come_back(dtype: np.dtype[Any], data: st.DataObject) -> None:
    value = data.draw(numpy_st.from_dtype(dtype))
    back = unpack(pack({"a": value}), LIMITS)["a"]
    assert np.asarray(back).tobytes() == np.asarray(value, np.asarray(back).dtype).tobytes()


def test_arrays_are_read_only_views_in_any_order() -> None:
    turned = np.arange(6, dtype=np.int16).reshape(2, 3).T
    back = unpack(pack({"a": turned}), LIMITS)["a"]
    np.testing.assert_array_equal(back, turned)
    assert not back.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        *(np.array([{}], object), np.array([1j]), np.zeros(2, "f4,f4"), np.complex64(1)),
        *({1, 2}, 2**70, np.ma.masked_array([1.0], True), np.ma.masked),
    ],
    ids=repr,
)
def test_what_has_no_form_is_not_packed(value: Any) -> None:
    with pytest.raises(Pi0Error, match="expected plain data and arrays"):
        pack({"a": value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (array(dtype="|O"), "state: expected an array of numbers or text.*found |O"),
        (array(dtype="O"), "found O"),
        (array(dtype="|V8"), "found |V8"),
        (array(dtype="<c8"), "found <c8"),
        (array(dtype="<M8[ns]"), "found <M8"),
        (array(dtype="f4,f4"), "found f4,f4"),
        (array(dtype="<f3"), "found <f3"),
        (array(dtype="<U0"), "found <U0"),
        (array(dtype=None), "found None"),
        (array(dtype=["<f4"]), r"found \['<f4'\]"),
        (array(data=None), "expected an array's bytes, found None"),
        (array(data="12345678"), "expected an array's bytes, found 12345678"),
        (array(shape=None), "expected a shape of at most 8 whole numbers, found None"),
        (array(shape=[-2]), r"found \[-2\]"),
        (array(shape=[True, 2]), r"found \[True, 2\]"),
        (array(shape=[2.0]), r"found \[2.0\]"),
        (array(shape=[1] * 9), "found "),
        (array(shape=[3]), r"expected 12 bytes for shape \[3\] of float32, found 8"),
        (array(shape=[2**31 - 1] * 8), "found 8"),
        (array(shape=[2**31 - 1, 2**31 - 1, 0], data=b""), "shape that an array can have"),
        (array(dtype="<U1", data=b"\xff" * 8), "expected text, found 0xffffffff"),
        ({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}, "that uint8 holds, found 300"),
        ({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}, "expected a number, found x"),
        ({b"__npgeneric__": True, b"data": 1, b"dtype": "|O"}, "found |O"),
    ],
    ids=str,
)
def test_broken_arrays_are_named(fields: dict[bytes, Any], message: str) -> None:
    with pytest.raises(ObservationError, match=message.replace("|O", r"\|O").replace("|V", r"\|V")):
        unpack(msgpack.packb({"state": fields}), LIMITS)


def test_the_key_of_a_broken_array_is_its_path() -> None:
    with pytest.raises(ObservationError, match=r"^images/cam\[1\]: expected"):
        unpack(msgpack.packb({"images": {"cam": [0, array(shape=[3])]}}), LIMITS)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "found one that is cut off"),
        (b"\xc1", "found bytes that are no msgpack|found one that is cut off"),
        (b"\x81\xa1a", "found one that is cut off"),
        (pack({"a": 1}) + b"\x00", "more bytes after its end"),
        (b"\x91" * 600 + b"\x00", "levels of maps|inside each other"),
        (b"\x91" * 100_000, "inside each other|cut off"),
        (b"\x81\x01\x01", "found a key of type int, which must be text"),
        (b"\x82\xa1a\x01\xa1a\x02", "each key once, found 'a' twice"),
        (b"\x81\xa1a\xa1\xff", r"found text that is not UTF-8 \(byte 0xff\)"),
        (b"\xdd\xff\xff\xff\xff", "found a list of 4294967295 values, which may have 1024"),
        (b"\xdf\xff\xff\xff\xff", "found a map of 4294967295 keys, which may have 1024"),
        (b"\xc6\xff\xff\xff\xff", "found"),
        (b"\xdb\xff\xff\xff\xff", "found"),
        (b"\x81\xa1a\xd4\x01\x00", "found an extension type"),
        (b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", "found an extension type|found a Timestamp"),
        (pickle.dumps({"a": 1}), "found"),
        (b"GET / HTTP/1.1\r\n\r\n", "more bytes after its end"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_broken_messages_are_one_sentence(frame: bytes, message: str) -> None:
    with pytest.raises(ObservationError, match=message) as raised:
        unpack(frame, LIMITS)
    assert str(raised.value).count("\n") == 0


def test_limits() -> None:
    small = MessageLimits(message_bytes=200, array_bytes=64, depth=3, values=20)
    unpack(pack({"a": {"b": np.zeros(8)}}), small)
    unpack(pack({"a": [0] * 18}), small)
    for value, message in (
        ({"a": bytes(300)}, "expected a message of at most 200 B, found 306 B"),
        ({"a": {"b": np.zeros(9)}}, "a/b: expected an array of at most 64 B, found 72 B"),
        ({"a": [0] * 19}, "too many lists. Send arrays instead"),
        ({"a": {"b": {"c": {}}}}, "a/b/c: expected at most 3 levels"),
    ):
        with pytest.raises(ObservationError, match=message):
            unpack(pack(value), small)


def test_a_small_message_stays_small() -> None:
    """Lists of lists, each within its own limit, are counted together."""
    with pytest.raises(ObservationError, match="Send arrays instead"):
        unpack(msgpack.packb({"a": [[0] * 1000] * 1000}), LIMITS)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_or_an_observation_error(frame: bytes) -> None:
    with contextlib.suppress(ObservationError):
        unpack(frame, LIMITS)


@given(MESSAGES, st.data())
def test_a_damaged_message_is_a_value_or_an_observation_error(
    value: dict[str, Any], data: st.DataObject
) -> None:
    frame = bytearray(pack(value))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for damaged in (bytes(frame), bytes(frame[:cut])):
        with contextlib.suppress(ObservationError):
            unpack(damaged, LIMITS)
