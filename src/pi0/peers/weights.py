"""Fills another implementation's model with the tensors that our reader reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pi0.checkpoint.layouts import OPENPI, their_names
from pi0.checkpoint.load import Checkpoint, check
from pi0.errors import CheckpointError

EMBEDDING_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


@torch.no_grad()
def fill(
    places: dict[str, Tensor],
    checkpoint: Checkpoint,
    places_of: Callable[[str], tuple[str, ...]],
) -> None:
    """Copies a checkpoint of any layout into the tensors of a model.

    Args:
        places: the model's tensors by its names, each of which has to be filled.
        places_of: the places that a tensor fills, by its name in the layout of openpi.

    Raises:
        CheckpointError: the checkpoint does not fit, or leaves a place empty.
    """
    check(checkpoint)
    left = set(places)
    for ours, rows, values in checkpoint.stream():
        (openpi,) = their_names(OPENPI, ours)
        for place in places_of(openpi):
            places[place][rows].copy_(values)
            left.discard(place)
    if left:
        raise CheckpointError(
            f"{checkpoint.path}: expected tensors for {', '.join(sorted(left))}, found none."
        )
