"""Camera images of any size and kind to the square float images that the model reads.

The aspect ratio is kept and the rest padded with black, centred. openpi and LeRobot resize
differently (up to 0.7 of the value range on sharp edges), and a policy must see what it was
trained on: both ways are here.

Knows nothing of cameras or models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pi0.errors import ObservationError
from pi0.policy.normalize import Normalizer

Array = NDArray[Any]
SLACK = 1e-3  # beyond [0, 1], which resizing and arithmetic in low precision leave


def to_model(
    name: str, image: Array, size: int, convention: str, stats: Normalizer | None = None
) -> Tensor:
    """One camera image as the model reads it: [3, size, size] float32 in [-1, 1].

    Args:
        name: the camera, for error messages.
        image: uint8, or floating point in [0, 1] (with `SLACK` for rounding); [H, W, 3] or
            [3, H, W].
        size: side in pixels.
        convention: "openpi" (uint8, PIL bilinear with antialiasing) or "lerobot" (float, bilinear
            without).
        stats: normalises the channels of pixels in [0, 1] before "lerobot" resizes them; an image
            that has the model's size already may then leave [-1, 1], as it does in LeRobot.

    Raises:
        ObservationError: another shape, dtype or value range.
    """
    image = channels_last(name, image)
    pixels = (
        RESIZE[convention](image, size) if stats is None else _resize_lerobot(image, size, stats)
    )
    return (pixels * 2 - 1).permute(2, 0, 1).contiguous()


def letterbox(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Height and width after resizing into a square of `size`, and the rows above, columns left."""
    ratio = max(height, width) / size
    new_height, new_width = max(1, int(height / ratio)), max(1, int(width / ratio))
    return new_height, new_width, (size - new_height) // 2, (size - new_width) // 2


def _resize_openpi(image: Array, size: int) -> Tensor:
    """[H, W, 3] → [size, size, 3] float32 in [0, 1]; floats become uint8 by truncation first."""
    image = eight_bit(image)
    height, width, top, left = letterbox(image.shape[0], image.shape[1], size)
    out = np.zeros((size, size, 3), np.uint8)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    out[top : top + height, left : left + width] = np.asarray(resized)
    return torch.from_numpy(out.astype(np.float32) / 255)


def _resize_lerobot(image: Array, size: int, stats: Normalizer | None = None) -> Tensor:
    """[H, W, 3] → [size, size, 3] float32 in [0, 1]."""
    scaled = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
    if stats is not None:
        scaled = stats.normalize(scaled).astype(np.float32)
    pixels = torch.from_numpy(scaled).permute(2, 0, 1)[None]
    return letterbox_lerobot(pixels, size)[0].permute(1, 2, 0)


def letterbox_lerobot(pixels: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] float32 in [0, 1] → [B, 3, size, size], as LeRobot's policies resize.

    What is resized is cut to [0, 1]; what has the size already is left as it is.
    """
    rows, columns = pixels.shape[2:]
    if (rows, columns) == (size, size):
        return pixels
    height, width, top, left = letterbox(rows, columns, size)
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
    edges = (left, size - width - left, top, size - height - top)
    return F.pad(pixels.clamp(0, 1), edges)


RESIZE: dict[str, Callable[[Array, int], Tensor]] = {
    "openpi": _resize_openpi,
    "lerobot": _resize_lerobot,
}


def eight_bit(image: Array) -> Array:
    """An image in uint8; floats in [0, 1] become it by truncation, as in openpi."""
    # In its own dtype: in another, the products of many float16 pixels fall short of the integer.
    return image if image.dtype == np.uint8 else (image * 255).astype(np.uint8)


def channels_last(name: str, image: Array) -> Array:
    """An image as [H, W, 3], floats within [0, 1].

    Raises:
        ObservationError: see `to_model`.
    """
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[-1]):
        raise ObservationError(
            f"image {name}: expected shape [H, W, 3] or [3, H, W], found {list(image.shape)}."
        )
    if image.size == 0:
        raise ObservationError(f"image {name}: expected pixels, found none {list(image.shape)}.")
    if np.issubdtype(image.dtype, np.floating):
        low, high = image.min(), image.max()
        if not (low >= -SLACK and high <= 1 + SLACK):  # false for NaN, too
            raise ObservationError(
                f"image {name}: expected floating-point pixels in [0, 1], found {low} to {high}. "
                "Divide 8-bit values by 255, or pass them as uint8."
            )
        if low < 0 or high > 1:
            image = image.clip(0, 1)
    elif image.dtype != np.uint8:
        raise ObservationError(
            f"image {name}: expected uint8 or floating point in [0, 1], found {image.dtype}. "
            "Convert it; 8-bit values as integers: np.asarray(image, np.uint8)."
        )
    return image if image.shape[-1] == 3 else image.transpose(1, 2, 0)
