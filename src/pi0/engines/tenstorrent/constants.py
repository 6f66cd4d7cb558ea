"""What the network is given beside weights and observations: it depends on the layout only, and is
uploaded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pi0.engines.tenstorrent.backend import Backend, Handle, Upload
from pi0.engines.tenstorrent.layout import TileLayout, neighbours
from pi0.engines.tenstorrent.precision import BF16, F32, I32, Precision
from pi0.engines.tenstorrent.weights import StateAndTime, TtnnWeights


@dataclass(frozen=True)
class Constants:
    """Of B observations.

    Attributes:
        vision_mask: [1, 1, patches, patches], or None if a view has no padding.
        unwritten: [B, K, suffix, D] zeros: the suffix's keys or values before a step.
        suffix_places: [1, B·suffix], where the suffix's keys and values are in the cache: rows of
            one observation after those of another.
        turn: `layout.neighbours`.
        action_rows: [1, 1, B·suffix, 1] float32, 1 in the rows of actions, else 0.
        action_tokens: the same [1, 1, B·suffix, E]; None in π0.5.
        state_bias: [1, 1, B·suffix, E], the bias of the state's layer in the row of the state, else
            0; None in π0.5.
    """

    layout: TileLayout
    vision_mask: Handle | None
    unwritten: Handle
    suffix_places: Handle
    turn: Handle
    action_rows: Handle
    action_tokens: Handle | None
    state_bias: Handle | None


def upload_constants(
    layout: TileLayout, weights: TtnnWeights, precision: Precision, backend: Backend
) -> Constants:
    """Uploads them."""
    config, suffix, batch = layout.config, layout.suffix, layout.batch
    actions = torch.zeros(suffix, 1)
    actions[layout.view["actions"].rows] = 1
    action_tokens = state_bias = None
    if isinstance(weights.time, StateAndTime):
        dtype, bias = precision.weights["action"], weights.time.state_bias
        state = (torch.arange(suffix) < config.state_tokens)[:, None] * bias
        spread = actions.expand_as(state)
        action_tokens, state_bias = (
            backend.put(Upload(rows.repeat(1, 1, batch, 1), dtype)) for rows in (spread, state)
        )
    trunk = config.expert
    zeros = torch.zeros(batch, trunk.num_kv_heads, suffix, layout.head)
    first = torch.arange(batch)[:, None] * (suffix + layout.prefix)
    places = (first + torch.arange(suffix)).flatten()[None]
    mask = layout.vision_mask()
    return Constants(
        layout,
        None if mask is None else backend.put(mask),
        unwritten=backend.put(Upload(zeros, precision.heads)),
        suffix_places=backend.put(Upload(places.int(), I32, tiled=False)),
        turn=backend.put(Upload(neighbours(), BF16)),
        action_rows=backend.put(Upload(actions.repeat(1, 1, batch, 1), F32)),
        action_tokens=action_tokens,
        state_bias=state_bias,
    )
