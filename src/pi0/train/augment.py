"""Random changes of training images, all images of a batch at once.

A crop of 95 % of the side at a random place, resized back, then a rotation by up to 5°: one
bilinear resampling; not for wrist cameras, whose gripper is always at the same place. Then
brightness, contrast and saturation by random factors. Sizes are those of openpi's `model.py`
(`preprocess_observation`), the definitions of the three factors are PIL's (`ImageEnhance`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.errors import ConfigError

NUMBERS = 6  # random numbers of an image: place (2), angle, brightness, contrast, saturation
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL
SPREAD = (0.3, 0.4, 0.5)  # of brightness, contrast and saturation around 1


@dataclass(frozen=True)
class Augmentation:
    """How much images change.

    Attributes:
        crop: side of the crop, as a part of the image's; 1: no crop.
        degrees: largest rotation; 0: none.
        colour: factor of openpi's changes of colour; 0: none.

    Raises:
        ConfigError: a value that has no meaning.
    """

    crop: float = 0.95
    degrees: float = 5.0
    colour: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (("crop", 0.1, 1.0), ("degrees", 0.0, 180.0), ("colour", 0.0, 2.0)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"augmentation: {name}: expected {low:g} to {high:g}, found "
                    f"{getattr(self, name):g}."
                )

    def __call__(self, images: Tensor, uniform: Tensor, wrist: bool) -> Tensor:
        """Changed images.

        Args:
            images: [B, 3, S, S] float32 in [0, 1].
            uniform: [B, `NUMBERS`] in [0, 1): what is random.
            wrist: whether the camera is on a wrist, so that nothing moves.
        """
        symmetric = uniform * 2 - 1
        if not wrist and (self.crop < 1 or self.degrees > 0):
            images = self._move(images, symmetric[:, :3])
        if self.colour > 0:
            spread = uniform.new_tensor(SPREAD) * self.colour
            images = _recolour(images, (1 + symmetric[:, 3:] * spread).clamp_min(0))
        return images

    def _move(self, images: Tensor, random: Tensor) -> Tensor:
        """Crop, resize, rotate; black comes in from outside."""
        angle = random[:, 2] * math.radians(self.degrees)
        cos, sin = angle.cos() * self.crop, angle.sin() * self.crop
        x, y = (random[:, :2] * (1 - self.crop)).unbind(1)
        theta = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


def _recolour(images: Tensor, factors: Tensor) -> Tensor:
    """images [B, 3, S, S], factors [B, 3] of brightness, contrast and saturation."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    weights = images.new_tensor(GREY)[:, None, None]
    images = (images * brightness).clamp(0, 1)
    mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 1)
    grey = (images * weights).sum(1, keepdim=True)
    return (grey + (images - grey) * saturation).clamp(0, 1)
