"""Changes of images: their sizes, what is left alone."""

from __future__ import annotations

import pytest
import torch

from pi0.errors import ConfigError
from pi0.train.augment import NUMBERS, Augmentation

IMAGES = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
MIDDLE = torch.full((4, NUMBERS), 0.5)  # no change but the crop, which is in the middle
RANDOM = torch.rand(4, NUMBERS, generator=torch.Generator().manual_seed(1))


def test_middle_changes_nothing() -> None:
    out = Augmentation(crop=1.0)(IMAGES, MIDDLE, wrist=False)
    torch.testing.assert_close(out, IMAGES, atol=1e-5, rtol=0)


def test_wrist_cameras_do_not_move() -> None:
    moved = Augmentation(colour=0)
    assert torch.equal(moved(IMAGES, RANDOM, wrist=True), IMAGES)
    assert not torch.allclose(moved(IMAGES, RANDOM, wrist=False), IMAGES, atol=0.05)


def test_stays_in_range_and_differs_by_image() -> None:
    out = Augmentation()(IMAGES[:1].expand(4, -1, -1, -1), RANDOM, wrist=False)
    assert out.min() >= 0
    assert out.max() <= 1
    assert not torch.allclose(out[0], out[1], atol=0.01)


def test_crop_of_a_corner() -> None:
    """A crop of half the side at the top left shows what is there, twice as large."""
    image = torch.zeros(1, 3, 40, 40)
    image[..., :20, :20] = 1
    corner = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.5, 0.5]])
    out = Augmentation(crop=0.5, degrees=0, colour=0)(image, corner, wrist=False)
    assert out[..., 1:38, 1:38].min() == 1
    assert out[..., -1, -1].max() < 1  # the pixel at the edge is mixed with the next


def test_rotation_by_a_quarter() -> None:
    turned = Augmentation(crop=1, degrees=90, colour=0)
    quarter = MIDDLE.clone()
    quarter[:, 2] = 1
    out = turned(IMAGES, quarter, wrist=False)
    torch.testing.assert_close(out, IMAGES.rot90(1, (2, 3)), atol=1e-4, rtol=0)


def test_colours_as_defined() -> None:
    numbers = MIDDLE.clone()
    numbers[:, 3] = 1  # brightness 1.3
    bright = Augmentation(1, 0, 1)(IMAGES * 0.5, numbers, wrist=True)
    torch.testing.assert_close(bright, IMAGES * 0.65, atol=1e-5, rtol=0)
    numbers = MIDDLE.clone()
    numbers[:, 5] = -0.5  # saturation 0: grey
    grey = Augmentation(1, 0, 1)(IMAGES, numbers, wrist=True)
    torch.testing.assert_close(grey[:, 0], grey[:, 2], atol=1e-5, rtol=0)


def test_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="crop: expected 0.1 to 1"):
        Augmentation(crop=2)
