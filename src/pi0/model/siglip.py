"""The SigLIP vision tower of π0: images in, one feature vector per patch out.

Notable: patches are cut without padding, so pixels beyond the last whole patch are not read; the
position embedding is learned, for one grid of patches; every linear layer has a bias; no pooling
head. Knows nothing of masks or cameras.

Source: openpi `siglip.py` (So400m/14), after arXiv 2303.15343.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0.config import SiglipConfig
from pi0.model.gemma import Tap, attend
from pi0.model.precision import Float32, refuse_overflow

EPS = 1e-6


class LayerNorm(Float32, nn.LayerNorm):
    """Layer normalisation in float32."""


class PatchEmbedding(Float32):
    """Pixels [N, 3, S, S] to patches [N, P, E], with their position added."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position = nn.Parameter(torch.empty(config.num_patches, config.width))

    def forward(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self.conv(pixels)  # [N, E, grid, grid]
        return patches.flatten(2).transpose(1, 2) + self.position


class SiglipBlock(nn.Module):
    """Pre-norm transformer block with unmasked attention."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = LayerNorm(config.width, eps=EPS)
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)
        self.norm2 = LayerNorm(config.width, eps=EPS)
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        heads = (*x.shape[:-1], self.num_heads, -1)
        q, k, v = (proj(h).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(attend(q, k, v))
        mlp: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return x + mlp


class SiglipTower(nn.Module):
    """Images [N, 3, S, S] float32 in [-1, 1] to features [N, P, E] of the dtype of the blocks."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(SiglipBlock(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, eps=EPS)

    def forward(self, images: Tensor, dtype: torch.dtype, tap: Tap) -> Tensor:
        x = self.patch_embedding(images).to(dtype)
        for i, block in enumerate(self.blocks):
            x = tap(f"vision_tower.block.{i}", block(x))
        out: Tensor = self.norm(refuse_overflow(x))
        return out
