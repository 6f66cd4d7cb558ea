"""Observations in the forms that people have them, and what is refused."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.masked import masked_tensor

from pi0.errors import ObservationError
from pi0.policy import ROBOTS, Camera, Robot
from pi0.policy.images import to_model
from pi0.policy.observation import (
    BOOKKEEPING,
    check_observation,
    lookup,
    read_image,
    read_prompt,
    read_state,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
STATE = [0.25, -0.5, 1.0]
ROBOT = ROBOTS["generic"]


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that masked tensors are a prototype
        return masked_tensor(values, mask)


class Task(str, Enum):
    FORWARD = "go"


class Table:
    """As tables of data frames are: it iterates over its labels, and is an array of its values."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.values.shape[-1]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values


def image(value: Any) -> torch.Tensor:
    return to_model("base", read_image("base", value), 28, "openpi")


@pytest.mark.parametrize(
    "value",
    [
        PIXELS.transpose(2, 0, 1),
        PIXELS[None],
        Image.fromarray(PIXELS),
        PIXELS.tolist() and torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1)[None],
        [Image.fromarray(PIXELS)],
        [Image.fromarray(PIXELS).convert("RGBA")],
    ],
    ids=["CHW", "batch", "PIL", "torch", "torch batch CHW", "list of PIL", "list of RGBA"],
)
def test_forms_of_an_image(value: Any) -> None:
    assert torch.equal(image(value), image(PIXELS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_images(dtype: torch.dtype) -> None:
    """As the pixels that they came from; eight bits of mantissa lose up to three of 256 levels."""
    value = (torch.from_numpy(PIXELS).double() / 255).to(dtype)
    expected = image(PIXELS)
    got = image(value.requires_grad_())
    assert (got - expected).abs().max() <= (3.01 * 2 / 255 if dtype == torch.bfloat16 else 0)
    if dtype != torch.bfloat16:
        assert torch.equal(image(value.detach().numpy()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lists_of_tensors(dtype: torch.dtype) -> None:
    """As a tensor alone, whatever it carries along, at any depth."""
    value = (torch.from_numpy(PIXELS).float() / 255).to(dtype).requires_grad_()
    for form in ([value], list(value), [list(value)]):
        assert torch.equal(image(form), image(value))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "YCbCr"])
def test_a_list_of_one_picture_is_the_picture(mode: str) -> None:
    picture = Image.fromarray(PIXELS).convert(mode)
    assert torch.equal(image([picture]), image(picture))


def test_rounding_beyond_the_range_is_clipped() -> None:
    """Both ends, where a cast without clipping would wrap round."""
    value = np.zeros((4, 4, 3), np.float32)
    value[0] = -1e-7
    value[1] = 1.0000001
    pixels = image(value)
    assert pixels.min() == -1
    assert pixels.max() == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((4, 4, 3), 1.1), r"floating-point pixels in \[0, 1\], found 1.1 to 1.1"),
        (np.full((4, 4, 3), np.nan), "found nan to nan"),
        (torch.empty(4, 4, 3, device="meta"), "found a tensor on the meta device"),
        ([torch.empty(4, 4, 3, device="meta")], "found a tensor on the meta device"),
        (np.zeros((4, 4, 3), np.int64), "expected uint8 or floating point"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"expected shape .* found \[2, 4, 4, 3\]"),
        (Image.new("HSV", (4, 4)), "8 bits a channel, found mode HSV"),
        ([Image.new("HSV", (4, 4))], "8 bits a channel, found mode HSV"),
        (np.ma.masked_array(PIXELS, PIXELS > 9), "found a MaskedArray"),
        ([np.ma.masked_array(PIXELS, PIXELS > 9)], "found a MaskedArray"),
        (torch.nested.nested_tensor([PIXELS[0] + 0.0], layout=torch.jagged), "a nested tensor"),
        (masked(torch.tensor(PIXELS / 255), torch.tensor(PIXELS > 9)), "found a masked tensor"),
        ([[np.ma.masked_array(row, row > 9) for row in PIXELS]], "found a MaskedArray"),
        ("photo.png", "expected an array of pixels, found 'photo.png'"),
        ({"a": 1}, "expected an array of pixels, found a dict"),
        (np.array(["a"]), r"expected an array of pixels, found an array of <U1 \[1\]"),
        ([[1, 2], [3]], "expected an array of pixels"),
    ],
)
def test_what_is_no_image(value: Any, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        image(value)


def test_pictures_in_lists_are_not_read_number_by_number() -> None:
    picture = np.zeros((40, 30, 3), np.uint8)
    calls = []
    numbers = picture.tolist()
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event == "call" else None)
    try:
        read_image("cam", numbers)
    finally:
        sys.setprofile(None)
    assert len(calls) < picture.size


@pytest.mark.parametrize(
    "value",
    [
        STATE,
        tuple(STATE),
        np.array(STATE),
        np.array([STATE], np.float32),
        torch.tensor(STATE, requires_grad=True),
        torch.tensor([STATE], dtype=torch.bfloat16),
        [torch.tensor(x) for x in STATE],
        [np.float32(x) for x in STATE],
        [[torch.tensor(x, dtype=torch.bfloat16, requires_grad=True) for x in STATE]],
        np.fromiter((torch.tensor(x, requires_grad=True) for x in STATE), object),
        Table(STATE),
        Table([STATE]),
        deque(STATE),
    ],
)
def test_forms_of_a_state(value: Any) -> None:
    np.testing.assert_array_equal(read_state({"state": value}, ROBOT, range(3, 4)), STATE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.1,0.2,0.3", "state: expected numbers, found '0.1,0.2,0.3'"),
        (["a", "b", "c"], "state: expected numbers, found the text 'a'"),
        (["0.5"] * 3, "state: expected numbers, found the text '0.5'"),
        (np.array([b"0.5"] * 3), "state: expected numbers, found the text"),
        ([0.5, "0.5", np.float32(1)], "state: expected numbers, found the text"),
        (np.array([0.5, "0.5", 1], object), "state: expected numbers, found the text '0.5'"),
        ({"joint": 1}, "state: expected numbers, found a dict"),
        ([[1, 2], [3]], "state: expected numbers"),
        (torch.empty(3, device="meta"), "meta device"),
        ([[torch.empty((), device="meta")] * 3], "meta device"),
        (np.zeros((2, 3)), r"expected 3 values .* found shape \[2, 3\]"),
        ([1, 2, float("inf")], "expected finite values, found inf at index 2"),
        ([1 + 2j, 0, 0], "state: expected real numbers"),
        (torch.zeros(3, dtype=torch.complex64), "expected real numbers"),
        (np.ones(3) * 1j, "expected real numbers, found complex128"),
        ({1.0, 2.0, 3.0}, "expected numbers, found a set"),
        (np.ma.masked_array([1, 2, 3], [0, 1, 0]), "found a MaskedArray"),
        ([np.ma.masked_array([1, 2, 3], [0, 1, 0])], "found a MaskedArray"),
        ([[np.ma.masked_array([1, 2, 3], [0, 1, 0])]], "found a MaskedArray"),
        (masked(torch.ones(3), torch.ones(3) > 0), "found a masked tensor"),
        ([10**400, 0, 0], "state: expected numbers"),
    ],
)
def test_what_is_no_state(value: Any, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        read_state({"state": value}, ROBOT, range(3, 4))


@pytest.mark.parametrize(
    "value",
    ["go", np.str_("go"), np.array("go"), ["go"], np.array(["go"]), ("go",), b"go", Task.FORWARD],
)
@pytest.mark.parametrize("key", ["prompt", "task"])
def test_forms_of_a_prompt(key: str, value: Any) -> None:
    assert read_prompt({key: value}, None) == "go"


def test_default_prompt() -> None:
    assert read_prompt({}, "wait") == "wait"
    assert read_prompt({"prompt": None}, "wait") == "wait"
    assert read_prompt({"task": "go"}, "wait") == "go"
    assert read_prompt({"task": "go", "prompt": "go"}, None) == "go"


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({}, "expected a sentence under prompt or task, .* found none"),
        ({"prompt": ""}, "expected a sentence under prompt or task, .* found ''"),
        ({"prompt": "  \n"}, "expected a sentence"),
        ({"prompt": 3}, "prompt: expected a sentence, found an int"),
        ({"prompt": ["a", "b"]}, "found a list of 2"),
        ({"prompt": np.array(["a", "b"])}, r"found an array of <U1 \[2\]"),
        ({"prompt": "go", "task": "stop"}, "one sentence, found 'go' under prompt and 'stop'"),
        ({"prompt": "caf\ud83d"}, r"expected text in UTF-8, found '\\ud83d' at position 3"),
        ({"prompt": "caf\udce9"}, "expected text in UTF-8, found the byte 0xe9 at position 3"),
        ({"prompt": b"caf\xe9"}, "expected text in UTF-8, found the byte 0xe9 at position 3"),
    ],
)
def test_what_is_no_prompt(observation: dict, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        read_prompt(observation, None)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ([1, 2], "expected a mapping of names to values, found a list"),
        (None, "found a NoneType"),
        ({0: PIXELS}, "expected keys that are text, found 0"),
        ({"images": {"top": PIXELS}}, "found also images/top"),
        ({"images/base": PIXELS, "depth": PIXELS}, "found also depth"),
        (
            {"images/base": PIXELS, "images": {"base": PIXELS}},
            "expected one value for images/base, found one under this key and one in nested",
        ),
        ({"images/base": None, "images": {"base": PIXELS}}, "expected one value for images/base"),
        ({"images": {"base": {"rgb": PIXELS}}}, "found also images/base/rgb"),
        ({"images": {}, "state": STATE}, "expected values in images, found it empty. Robot"),
    ],
)
def test_what_is_no_observation(observation: Any, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        check_observation(observation, ROBOT, {})


@given(
    st.sets(st.sampled_from([*sorted(BOOKKEEPING), "next.reward", "action_is_pad", "action.raw"]))
)
def test_bookkeeping_is_ignored(keys: set[str]) -> None:
    observation = {"state": STATE, "prompt": "go", "images": {"base": PIXELS}}
    seen = check_observation({**observation, **dict.fromkeys(keys, 1)}, ROBOT, {})
    assert read_state(seen, ROBOT, range(3, 4)).tolist() == STATE


def test_an_absent_value_beside_the_one_that_is_renamed_to_it() -> None:
    for observation in ({"front": None, "top": PIXELS}, {"top": None, "front": PIXELS}):
        robot = Robot("arm", (Camera("top"),), (("state", 3),), 3)
        assert check_observation(observation, robot, {"front": "top"})["top"] is PIXELS
    with pytest.raises(ObservationError, match="for top, found two, under top and front"):
        check_observation({"top": PIXELS, "front": PIXELS}, robot, {"front": "top"})


def test_keys_of_any_depth() -> None:
    robot = Robot("arm", (Camera("images/left/rgb"),), (("state", 3),), 3)
    for observation in (
        {"images/left/rgb": PIXELS},
        {"images": {"left/rgb": PIXELS}},
        {"images": {"left": {"rgb": PIXELS}}},
    ):
        assert lookup(check_observation(observation, robot, {}), "images/left/rgb") is PIXELS


def test_lookup() -> None:
    assert lookup({"a/b": 1, "a": {"b": 2}}, "a/b") == 1
    assert lookup({"a": {"b": {"c": 3}}}, "a/b/c") == 3
    assert lookup({"a": 1}, "a/b") is None
