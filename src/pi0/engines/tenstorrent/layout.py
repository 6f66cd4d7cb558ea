"""How a sequence lies on the device: everything is cut and padded to tiles of 32, and masked.

Every camera's patches are padded to whole tiles (729 → 736), so are the text and the suffix
(51 → 64). The padding stays in the sequence, where masks hide it and rotary positions skip it, so
that no operation on the device cuts across a tile. A `View` says where the model's tokens are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pi0.config import GemmaConfig, Pi0Config
from pi0.engines.tenstorrent.backend import Upload
from pi0.engines.tenstorrent.precision import BF16, F32, U32, Precision
from pi0.inputs import ModelInputs
from pi0.model.gemma import rotary_angles
from pi0.model.pi0 import attention_mask, prefix_valid, token_blocks, token_positions

TILE = 32
# The axis on which inputs of several observations are joined.
JOINED = {
    "patches": 2,
    "tokens": 0,
    "prefix_mask": 0,
    "suffix_mask": 0,
    "state": 2,
    "prefix_cos": 1,
    "prefix_sin": 1,
    "suffix_cos": 1,
    "suffix_sin": 1,
}
# Added to logits that the mask excludes: exp() of it is 0, and bfloat16 holds it. Not lower: a row
# may see nothing of the keys that attention takes at a time (a masked camera's), whose maximum is
# rounded to bfloat16, here by at most 32; exp() of what it is too low by has to be finite.
MASKED = -8192.0


def tiled(n: int) -> int:
    """n rounded up to whole tiles."""
    return -(-n // TILE) * TILE


def padded_head(head_dim: int) -> Tensor:
    """Where the elements of a rotated head are once it is padded: element i beside element
    i + D/2, with which it is rotated."""
    first = 2 * torch.arange(head_dim // 2)
    return torch.cat([first, first + 1])


@dataclass(frozen=True)
class View:
    """A part of a padded tensor [1, K, rows, columns], and its shape in the model."""

    rows: Tensor
    shape: tuple[int, ...]
    columns: Tensor | None = None

    def cut(self, padded: Tensor) -> Tensor:
        """The model's tensor: [1, K, rows, columns] → [*shape, columns]."""
        x = padded[0][:, self.rows]
        if self.columns is not None:
            x = x[..., self.columns]
        return x.transpose(0, 1).reshape(self.shape + x.shape[-1:])

    def fill(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `cut`: zeros where the model has nothing."""
        padded = torch.zeros(shape)
        columns = torch.arange(value.shape[-1]) if self.columns is None else self.columns
        x = value.float().reshape(len(self.rows), shape[1], value.shape[-1]).transpose(0, 1)
        padded[0, :, self.rows[:, None], columns] = x
        return padded


@dataclass(frozen=True)
class TileLayout:
    """The layout of observations with these numbers of views and text tokens each.

    Attributes:
        batch: observations, B: rows of one after those of another.
    """

    config: Pi0Config
    views: int
    tokens: int
    batch: int = 1

    @property
    def patches(self) -> int:
        """Rows of one view."""
        return tiled(self.config.vision.num_patches)

    @property
    def text(self) -> int:
        return tiled(self.tokens)

    @property
    def prefix(self) -> int:
        return self.views * self.patches + self.text

    @property
    def suffix(self) -> int:
        return tiled(self.config.suffix_len)

    @property
    def head(self) -> int:
        """Columns of a head of the trunks."""
        return tiled(self.config.vlm.head_dim)

    @cached_property
    def patch_rows(self) -> Tensor:
        first = torch.arange(self.views)[:, None] * self.patches
        return (first + torch.arange(self.config.vision.num_patches)).flatten()

    @cached_property
    def view(self) -> dict[str, View]:
        """The views of the network's tensors of one observation, by the name that taps give."""
        config = self.config
        text_rows = torch.arange(self.tokens)
        prefix_rows = torch.cat([self.patch_rows, self.views * self.patches + text_rows])
        suffix_rows = torch.arange(config.suffix_len)
        head, kv = padded_head(config.vlm.head_dim), (config.vlm.num_kv_heads,)
        x, a = len(prefix_rows), config.suffix_len
        return {
            "patches": View(self.patch_rows, (self.views, config.vision.num_patches)),
            "text": View(text_rows, (1, self.tokens)),
            "prefix": View(prefix_rows, (1, x)),
            "prefix_heads": View(prefix_rows, (1, x, *kv), head),
            "suffix": View(suffix_rows, (1, a)),
            "suffix_heads": View(suffix_rows, (1, a, *kv), head),
            "actions": View(suffix_rows[config.state_tokens :], (1, config.horizon)),
        }

    def uploads(self, inputs: ModelInputs, precision: Precision) -> dict[str, Upload]:
        """What B observations need on the device."""
        each = [self._one(inputs.rows(slice(i, i + 1)), precision) for i in range(self.batch)]
        return {
            name: replace(first, value=torch.cat([one[name].value for one in each], JOINED[name]))
            for name, first in each[0].items()
        }

    def _one(self, inputs: ModelInputs, precision: Precision) -> dict[str, Upload]:
        mask, positions = self._sequence(inputs)
        x = self.prefix
        tokens = torch.nn.functional.pad(inputs.tokens, (0, self.text - self.tokens))
        own_first = torch.cat([mask[:, x:, x:], mask[:, x:, :x]], dim=2)  # as in the cache
        uploads = {
            "patches": Upload(self._cut_patches(inputs.images[0]), precision.pixels),
            "tokens": Upload(tokens.int(), U32, tiled=False),
            "prefix_mask": Upload(additive(mask[:, :x, :x]), BF16),
            "suffix_mask": Upload(additive(own_first), BF16),
        }
        if self.config.state_tokens:
            uploads["state"] = self.state(inputs.state)
        for part, where, trunk in (
            ("prefix", positions[:x], self.config.vlm),
            ("suffix", positions[x:], self.config.expert),
        ):
            cos, sin = self._head_tables(where, trunk)
            uploads[f"{part}_cos"] = Upload(cos, precision.rope)
            uploads[f"{part}_sin"] = Upload(sin, precision.rope)
        return uploads

    def actions(self, x_t: Tensor) -> Upload:
        """Noisy actions [B, horizon, action_dim] in the rows of the suffix."""
        view, shape = self.view["actions"], (1, 1, self.suffix, x_t.shape[-1])
        return Upload(
            torch.cat([view.fill(one, shape) for one in x_t.chunk(self.batch)], dim=2), F32
        )

    def chunks(self, padded: Tensor) -> Tensor:
        """The inverse of `actions`: [1, 1, B·suffix, action_dim] → [B, horizon, action_dim]."""
        view = self.view["actions"]
        return torch.cat([view.cut(one) for one in padded.chunk(self.batch, dim=2)])

    def state(self, state: Tensor) -> Upload:
        """A state [1, state_dim] in the row of the suffix's state token."""
        rows = torch.zeros(1, 1, self.suffix, state.shape[-1])
        rows[0, 0, : self.config.state_tokens] = state
        return Upload(rows, F32)

    def vision_mask(self) -> Upload | None:
        """What hides a view's padding from its patches; None where there is none."""
        n = self.config.vision.num_patches
        if n == self.patches:
            return None
        visible = torch.arange(self.patches) < n
        return Upload(additive(visible.expand(1, self.patches, self.patches)), BF16)

    def _cut_patches(self, images: Tensor) -> Tensor:
        """Images [V, 3, H, W] → [1, 1, V · patches, tiled 3·14²]: whole patches, in rows."""
        patch, grid = self.config.vision.patch_size, self.config.vision.grid
        side, width = grid * patch, 3 * patch**2
        whole = images[:, :, :side, :side]
        cells = whole.reshape(len(images), 3, grid, patch, grid, patch)
        flat = cells.permute(0, 2, 4, 3, 5, 1).reshape(len(images), grid**2, width)
        padded = (0, tiled(width) - width, 0, self.patches - grid**2)
        return torch.nn.functional.pad(flat, padded).flatten(0, 1)[None, None]

    def _head_tables(self, positions: Tensor, trunk: GemmaConfig) -> tuple[Tensor, Tensor]:
        """Tables for queries, keys and values [1, 1, S, (H + 2K)·D] taken tile by tile as
        [1, S/32·(H + 2K), 32, D]: values stay as they are."""
        rotated = trunk.num_heads + trunk.num_kv_heads
        heads = rotated + trunk.num_kv_heads
        cos, sin = (
            table.view(-1, 1, TILE, table.shape[-1]).repeat(1, heads, 1, 1)
            for table in rope_tables(positions, trunk.head_dim)
        )
        cos[:, rotated:], sin[:, rotated:] = 1, 0
        return cos.flatten(0, 1)[None], sin.flatten(0, 1)[None]

    def _sequence(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Mask [1, S, S] and positions [S] of the padded sequence: the model's own, spread out."""
        config, x = self.config, self.prefix
        valid = torch.zeros(1, x + self.suffix, dtype=torch.bool)
        valid[:, self.view["prefix"].rows] = prefix_valid(inputs, config.vision.num_patches)
        valid[:, x : x + config.suffix_len] = True
        blocks = token_blocks(x, config.state_tokens, self.suffix - config.state_tokens)
        return attention_mask(valid, blocks), token_positions(valid)[0]


def additive(mask: Tensor) -> Tensor:
    """A mask [1, T, S] bool as what is added to logits, [1, 1, T, S]."""
    return torch.zeros(mask.shape).masked_fill(~mask, MASKED)[:, None]


def rope_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [S, tiled head_dim] at positions [S], laid out by `padded_head`."""
    angle, columns = rotary_angles(positions, head_dim), padded_head(head_dim)
    cos, sin = torch.zeros(2, len(positions), tiled(head_dim))
    cos[:, columns] = angle.cos().repeat(1, 2)
    sin[:, columns] = angle.sin().repeat(1, 2)
    return cos, sin


def neighbours() -> Tensor:
    """[1, 1, 32, 32] that a row is multiplied by to be turned by 90 degrees, each even column with
    the next one: (a, b) → (-b, a)."""
    turn = torch.zeros(TILE, TILE)
    even = torch.arange(0, TILE, 2)
    turn[even + 1, even], turn[even, even + 1] = -1, 1
    return turn[None, None]
