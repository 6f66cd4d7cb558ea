"""Resizing as openpi and as LeRobot do it, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pi0.errors import ObservationError
from pi0.policy.images import letterbox, to_model

MODES = ("openpi", "lerobot")


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [  # rows, columns, top, left: measured with openpi's resize_with_pad
        (480, 640, (168, 224, 28, 0)),
        (101, 200, (113, 224, 55, 0)),
        (224, 224, (224, 224, 0, 0)),
        (200, 100, (224, 112, 0, 56)),
    ],
)
def test_letterbox(height: int, width: int, expected: tuple[int, ...]) -> None:
    assert letterbox(height, width, 224) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(14, 400))
def test_letterbox_fits(height: int, width: int, size: int) -> None:
    rows, columns, top, left = letterbox(height, width, size)
    assert 1 <= rows <= size
    assert 1 <= columns <= size
    assert max(rows, columns) >= size - 1
    assert 0 <= size - rows - 2 * top <= 1
    assert 0 <= size - columns - 2 * left <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(4, 90), st.sampled_from(MODES), st.booleans(), st.booleans())
def test_any_kind_of_image(height: int, width: int, mode: str, floats: bool, first: bool) -> None:
    """uint8 or float, channels first or last: the same picture gives the same tensor."""
    image = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    expected = to_model("base", image, 28, mode)
    # As float64, 255 comes back exactly where openpi truncates.
    other = (image.astype(np.float32) + np.float32(0.25)) / 255 if floats else image
    other = np.minimum(other, 1) if floats else other
    got = to_model("base", other.transpose(2, 0, 1) if first and height != 3 else other, 28, mode)
    assert expected.shape == (3, 28, 28)
    assert expected.dtype == torch.float32
    assert expected.min() >= -1
    assert expected.max() <= 1
    torch.testing.assert_close(got, expected, atol=0.003 if floats else 0, rtol=0)


def test_openpi_is_pillow_on_uint8() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    inner = np.asarray(Image.fromarray(image).resize((28, 21), Image.Resampling.BILINEAR))
    got = to_model("base", image, 28, "openpi")
    expected = torch.from_numpy(inner.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)
    torch.testing.assert_close(got[:, 3:24], expected, atol=1e-6, rtol=0)
    assert (got[:, :3] == -1).all()
    assert (got[:, 24:] == -1).all()


def test_lerobot_is_interpolate_without_antialias() -> None:
    image = np.random.default_rng(0).random((60, 80, 3), np.float32)
    got = to_model("base", image, 28, "lerobot")
    inner = F.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], (21, 28), mode="bilinear"
    )[0]
    torch.testing.assert_close(got[:, 3:24], inner * 2 - 1, atol=1e-6, rtol=0)
    assert (got[:, :3] == -1).all()


@pytest.mark.parametrize("mode", MODES)
def test_right_size_is_untouched(mode: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    expected = torch.from_numpy(image.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)
    torch.testing.assert_close(to_model("base", image, 28, mode), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"expected shape \[H, W, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"found \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "expected pixels, found none"),
        (np.zeros((4, 4, 3), np.int32), "found int32"),
        (np.full((4, 4, 3), 255.0), "found 255.0 to 255.0. Divide"),
        (np.full((4, 4, 3), -0.1), "Divide 8-bit"),
        (np.full((4, 4, 3), np.nan, np.float32), "found nan"),
    ],
)
def test_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(ObservationError, match=f"image wrist: .*{message}"):
        to_model("wrist", image, 28, "openpi")
