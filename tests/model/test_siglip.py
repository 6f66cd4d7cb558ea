"""Position embeddings at other sizes, and which pixels are read."""

from __future__ import annotations

from pathlib import Path

import torch

from pi0.checkpoint.load import load_model, open_checkpoint, resize_positions
from pi0.inputs import random_inputs
from pi0.model import Pi0


def test_same_grid_is_untouched() -> None:
    table = torch.randn(256, 8)
    assert torch.equal(resize_positions(table, 16), table)


def test_256_to_729() -> None:
    """A plane stays one away from the edges, within the ripple of torch's cubic (a = -0.75)."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    table = torch.stack([rows, columns], -1).view(256, 2)
    resized = resize_positions(table, 27).view(27, 27, 2)
    centres = (torch.arange(27) + 0.5) * 16 / 27 - 0.5  # align_corners=False
    inner = slice(4, 23)
    torch.testing.assert_close(
        resized[inner, inner, 0], centres[inner, None].expand(19, 19), atol=0.06, rtol=0
    )
    torch.testing.assert_close(
        resized[inner, inner, 1], centres[None, inner].expand(19, 19), atol=0.06, rtol=0
    )


def test_any_square_size(tiny_path: Path) -> None:
    """Rows and columns beyond the last whole patch are not read, as at 384 px."""
    model = load_model(open_checkpoint(tiny_path), image_size=44)
    assert model.vision_tower.patch_embedding.position.shape == (9, 48)
    inputs, noise = random_inputs(model.config, cameras=2, tokens=8, seed=0)
    actions = model.sample_actions(inputs, noise, steps=2)
    assert actions.shape == (1, 50, 32)
    inputs.images[..., 42:] = 0.5
    inputs.images[..., 42:, :] = 0.5
    assert torch.equal(actions, model.sample_actions(inputs, noise, steps=2))
    inputs.images[..., 41] = 0.5
    assert not torch.equal(actions, model.sample_actions(inputs, noise, steps=2))


def test_cameras_share_the_tower(tiny: Pi0) -> None:
    """Views are encoded alike, in a batch: swapping them swaps the features."""
    inputs, _ = random_inputs(tiny.config, cameras=2, tokens=4, seed=0)
    both = tiny.vision_tower(inputs.images[0], torch.float32, lambda name, value: value)
    swapped = tiny.vision_tower(inputs.images[0].flip(0), torch.float32, lambda n, v: v)
    torch.testing.assert_close(both, swapped.flip(0), atol=1e-6, rtol=0)
