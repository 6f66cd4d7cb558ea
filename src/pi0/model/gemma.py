"""The Gemma trunk of π0: one class serves the VLM and the action expert.

Notable: RMSNorm multiplies by 1 + w; all query heads share one key/value head; GELU is the tanh
form; no biases. Two trunks of equal depth can run in lockstep: `run_layers` lets the queries of
every stream see the keys and values of all streams. In π0.5 the expert's norms are adaptive: a
condition, which depends on the timestep, scales and shifts what they hand on and gates the branch
that follows.

Knows nothing of images, prompts or time.

Source: openpi `gemma.py`, after arXiv 2403.08295. Axes: B batch, T query, S key, H heads,
K key/value heads, D head dimension, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0.config import GemmaConfig
from pi0.model.precision import Float32, Float32Linear

EPS = 1e-6
ROPE_BASE = 10_000.0
# What openpi gives to logits that the mask excludes; exp() of it is exactly 0.
MASKED = -2.3819763e38

# Called with every named intermediate; its return value replaces the tensor: the same one, from a
# recorder or a clock; another one, to feed a stage with somebody else's input.
Tap = Callable[[str, Tensor], Tensor]
KeyValue = tuple[Tensor, Tensor]  # each [B, S, K, D]


class Modulation(NamedTuple):
    """What an adaptive norm makes of a condition: each [B, 1, E] float32."""

    scale: Tensor
    shift: Tensor
    gate: Tensor


class RMSNorm(Float32):
    """x / rms(x) · (1 + scale) + shift; NaN, rather than 0, where the squares of x leave float32.

    The scale is a weight, without a shift; if adaptive, both come from `modulate`.
    """

    def __init__(self, width: int, adaptive: bool = False) -> None:
        super().__init__()
        if adaptive:
            self.dense = Float32Linear(width, 3 * width)
        else:
            self.weight = nn.Parameter(torch.empty(width))

    def modulate(self, condition: Tensor | None) -> Modulation | None:
        """Scale, shift and gate for a condition [B, E]; None without one."""
        if condition is None:
            return None
        return Modulation(*self.dense(condition)[:, None].chunk(3, dim=-1))

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Tensor:
        square = x.square().mean(-1, keepdim=True)
        square = square.masked_fill(square.isinf(), torch.nan)
        x = x * torch.rsqrt(square + EPS)
        if modulation is None:
            return x * (1 + self.weight)
        return x * (1 + modulation.scale) + modulation.shift


def add_branch(x: Tensor, branch: Tensor, modulation: Modulation | None) -> Tensor:
    """The residual sum, the branch gated if the norm before it is adaptive."""
    if modulation is None:
        return x + branch
    return (x + modulation.gate * branch).to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Angles of rotary embedding at positions [...]: [..., D/2] float32 (arXiv 2104.09864)."""
    half = head_dim // 2
    return positions[..., None] * ROPE_BASE ** (-torch.arange(half, device=positions.device) / half)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., D], whose pairs are one of each half, given cos and sin [..., D/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Rope(Float32):
    """Rotary position embedding."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, H, D], positions [B, T] → [B, T, H, D]."""
        angle = rotary_angles(positions, x.shape[-1])[:, :, None]  # [B, T, 1, D/2]
        return rotate(x, angle.cos(), angle.sin())


class MaskedSoftmax(Float32):
    """Softmax over the keys that the mask allows."""

    def forward(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        return (logits if mask is None else logits.masked_fill(~mask, MASKED)).softmax(dim=-1)


_softmax = MaskedSoftmax()


def logit_bound(q: Tensor, k: Tensor) -> Tensor:
    """A bound of the logits of queries and keys [..., D], float32: infinite or NaN where they may
    leave float32. PyTorch's softmax may turn such a logit into a weight of 0."""
    return q.shape[-1] * q.abs().amax().float() * k.abs().amax()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention: q [B, T, H, D], k and v [B, S, K, D], mask [B, T, S] bool → [B, T, H·D].

    Every K-th part of the heads shares one key/value head. Written out rather than handed to
    `scaled_dot_product_attention`, which returns NaN for a padding row that may see nothing. NaN
    throughout where logits may leave float32.
    """
    b, t, h, d = q.shape
    check = 0 * logit_bound(q, k)
    s, kv_heads = k.shape[1:3]
    q = q.view(b, t, kv_heads, h // kv_heads, d).permute(0, 2, 3, 1, 4)  # [B, K, H/K, T, D]
    q = q.reshape(b, kv_heads, -1, d)  # [B, K, H/K·T, D]
    logits = q @ k.permute(0, 2, 3, 1) * d**-0.5  # [B, K, H/K·T, S]
    logits = logits.view(b, kv_heads, -1, t, s)
    weights = _softmax(logits, None if mask is None else mask[:, None, None])
    out = weights.view(b, kv_heads, -1, s) @ v.transpose(1, 2)  # [B, K, H/K·T, D]
    return out.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d) + check


class GemmaBlock(nn.Module):
    """One layer, in two halves, so that attention between them can span several streams."""

    def __init__(self, config: GemmaConfig, adaptive: bool) -> None:
        super().__init__()
        width, head_dim = config.width, config.head_dim
        self.head_dim = head_dim
        self.norm1 = RMSNorm(width, adaptive)
        self.q_proj = nn.Linear(width, config.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * head_dim, width, bias=False)
        self.norm2 = RMSNorm(width, adaptive)
        self.gate_proj = nn.Linear(width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, width, bias=False)
        self.rope = Rope()

    def qkv(
        self, x: Tensor, positions: Tensor, modulation: Modulation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, E] → q [B, T, H, D], k and v [B, T, K, D]; q and k rotated."""
        h = self.norm1(x, modulation)
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(h).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.rope(q, positions), self.rope(k, positions), v

    def post_attention(
        self, x: Tensor, attended: Tensor, first: Modulation | None, second: Modulation | None
    ) -> Tensor:
        """x [B, T, E] and what its queries attended to [B, T, H·D] → [B, T, E], with the
        modulations of both norms."""
        x = add_branch(x, self.o_proj(attended), first)
        h = self.norm2(x, second)
        gate = F.gelu(self.gate_proj(h), approximate="tanh")
        return add_branch(x, self.down_proj(gate * self.up_proj(h)), second)


class GemmaTrunk(nn.Module):
    """The blocks of a trunk and its final norm."""

    def __init__(self, config: GemmaConfig, adaptive: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GemmaBlock(config, adaptive) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, adaptive)


@dataclass(frozen=True)
class TokenStream:
    """Tokens on their way through a trunk: x [B, T, E] at positions [B, T].

    `name` is what its blocks are called in taps, `condition` [B, E] what adaptive norms get.
    """

    name: str
    trunk: GemmaTrunk
    x: Tensor
    positions: Tensor
    condition: Tensor | None = None


def run_layers(
    streams: list[TokenStream], mask: Tensor, tap: Tap, past: list[KeyValue] | None = None
) -> tuple[list[Tensor], list[KeyValue]]:
    """Runs streams through all layers of their trunks, in lockstep.

    Args:
        streams: one or more, of equal depth; their tokens follow each other on the sequence axis.
        mask: [B, T, S] bool: which of the T tokens of all streams sees which of the S keys
            (those of `past`, then their own).
        tap: sees keys, values and output of every block.
        past: keys and values of each layer that come before the streams' own.

    Returns:
        The normed output of each stream [B, T_i, E_i], and of each layer keys and values
        [B, T, K, D].
    """
    xs = [stream.x for stream in streams]
    lengths = [x.shape[1] for x in xs]
    cache: list[KeyValue] = []
    for i, blocks in enumerate(zip(*(s.trunk.blocks for s in streams), strict=True)):
        parts, modulations = [], []
        for stream, block, x in zip(streams, blocks, xs, strict=True):
            first, second = (n.modulate(stream.condition) for n in (block.norm1, block.norm2))
            modulations.append((first, second))
            q, k, v = block.qkv(x, stream.positions, first)
            name = f"{stream.name}.block.{i}"
            parts.append((q, tap(f"{name}.keys", k), tap(f"{name}.values", v)))
        q, k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        cache.append((k, v))
        if past is not None:
            k, v = torch.cat([past[i][0], k], dim=1), torch.cat([past[i][1], v], dim=1)
        attended = torch.split(attend(q, k, v, mask), lengths, dim=1)
        xs = [
            tap(f"{s.name}.block.{i}", b.post_attention(x, a, *m))
            for s, b, x, a, m in zip(streams, blocks, xs, attended, modulations, strict=True)
        ]
    norms = [s.trunk.norm for s in streams]
    hidden = [
        norm(x, norm.modulate(s.condition)) for s, norm, x in zip(streams, norms, xs, strict=True)
    ]
    return hidden, cache
