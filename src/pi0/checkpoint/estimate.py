"""Bytes that inference needs: the estimate that `pi0 inspect` shows, and a lower bound of it.

Weights are exact, the rest follows from the largest tensors that are alive together in a block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from pi0.checkpoint.load import empty_model
from pi0.config import Pi0Config

ITEM_SIZE = {"float32": 4, "bfloat16": 2}  # bytes of a weight by precision; others: at least 1
# What may stay as it is stored, in bfloat16 at least: the token embedding and, in π0.5, the linear
# layers of adaptive norms.
STORED = re.compile(r"token_embedding\.|.*norm\d?\.dense\.")
STORED_ITEM_SIZE = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of the reference engine's parameters, of the prefix cache, and within a block."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


def estimate(config: Pi0Config, dtype: torch.dtype, cameras: int, tokens: int) -> Memory:
    """What the reference engine needs at batch 1."""
    size, vlm, vision = dtype.itemsize, config.vlm, config.vision
    prefix = config.prefix_len(cameras, tokens)
    patches = cameras * vision.num_patches
    # A block's MLP holds gate, its GELU, up and their product; attention holds the logits in the
    # trunk's dtype and, for the softmax, twice in float32.
    working = max(
        4 * prefix * vlm.mlp_dim * size,
        2 * patches * vision.mlp_dim * size,
        _logits(config, cameras, tokens) * (size + 8),
    )
    return Memory(
        weights=sum(p.nbytes for p in empty_model(config, dtype).parameters()),
        cache=2 * vlm.depth * prefix * vlm.num_kv_heads * vlm.head_dim * size,
        working=working,
    )


def required_bytes(
    config: Pi0Config,
    precision: str,
    cameras: int,
    tokens: int,
    batch: int = 1,
    loaded: bool = False,
    whole_logits: bool = False,
) -> int:
    """A lower bound of the memory that an engine on the CPU needs, before its weights are loaded.

    Left out is what an engine can do without: the last layer of the VLM but for keys and values,
    activations that can share memory, and, unless it is known to hold them, attention logits.

    Args:
        precision: one of the engine's, by its full name.
        loaded: its weights are in memory already.
        whole_logits: see `Capabilities`.
    """
    size = ITEM_SIZE.get(precision, 1)
    last = f"vlm.blocks.{config.vlm.depth - 1}."
    weights = sum(
        p.numel() * (STORED_ITEM_SIZE if STORED.match(name) else size)
        for name, p in empty_model(config, torch.float32).named_parameters()
        if not name.startswith(last)
    )
    images = cameras * 3 * config.vision.image_size**2 * torch.float32.itemsize
    vlm, expert = config.vlm, config.expert
    prefix, suffix = config.prefix_len(cameras, tokens), config.suffix_len
    vision, first, step = 0, prefix * vlm.width * size, suffix * expert.width * size
    if whole_logits:
        # The logits, and in float32 their softmax; in a step the mask of the whole sequence, too.
        logits = vlm.num_heads * (size + 4)
        patches = config.vision.num_patches
        vision = config.vision.num_heads * cameras * patches**2 * (size + 4)
        first = max(first, logits * prefix**2)
        step = max(step, (prefix + suffix) * (logits * suffix + prefix + suffix))
    cache = 2 * vlm.depth * prefix * vlm.num_kv_heads * vlm.head_dim * size
    working = max(vision, cache + first, cache + step)
    return (0 if loaded else weights) + batch * (images + working)


def _logits(config: Pi0Config, cameras: int, tokens: int) -> int:
    """Attention logits of the block that has the most."""
    patches = config.vision.num_patches
    return max(
        config.vlm.num_heads * config.prefix_len(cameras, tokens) ** 2,
        config.vision.num_heads * cameras * patches**2,
    )
