"""Which tokens of a batch take part: masked cameras and padding are not computed at all.

What nobody sees has exactly no effect (tests/model/test_masks.py), so leaving it out changes
nothing but time. With one observation, or several of one length, no attention mask is left either:
the prefix sees all of itself, and the actions see everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.inputs import ModelInputs
from pi0.model.pi0 import prefix_valid, token_positions


@dataclass(frozen=True)
class TokenPlan:
    """The tokens that take part. X' is the longest row's number of them.

    Attributes:
        views: [n] int64, the valid images among all B·V.
        index: [B, X'] int64, the place of each token among the row's X; 0 behind a short row's end.
        valid: [B, X'] bool, or None if all rows are of one length.
        positions: [B, X' + A] int64 of prefix and suffix.
        length: X, tokens of the whole prefix.
        images: B·V.
    """

    views: Tensor
    index: Tensor
    valid: Tensor | None
    positions: Tensor
    length: int
    images: int

    @property
    def tokens(self) -> int:
        """X'."""
        return self.index.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """The tokens that take part, of all: [B, X, ...] → [B, X', ...]."""
        index = self.index.reshape(*self.index.shape, *[1] * (x.ndim - 2))
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))

    def scatter(self, x: Tensor) -> Tensor:
        """The mirror of `gather`; zeros elsewhere: [B, X', ...] → [B, X, ...]."""
        whole = x.new_zeros(len(x), self.length, *x.shape[2:])
        for row in range(len(x)):
            count = self.tokens if self.valid is None else int(self.valid[row].sum())
            whole[row, self.index[row, :count]] = x[row, :count]
        return whole

    def gather_views(self, x: Tensor) -> Tensor:
        """The valid images of all: [B·V, ...] → [n, ...]."""
        return x[self.views]

    def scatter_views(self, x: Tensor) -> Tensor:
        """The mirror of `gather_views`; zeros elsewhere: [n, ...] → [B·V, ...]."""
        return x.new_zeros(self.images, *x.shape[1:]).index_copy_(0, self.views, x)


def make_token_plan(
    inputs: ModelInputs, patches: int, suffix_len: int, bucket: int = 1
) -> TokenPlan:
    """The plan of a batch.

    Args:
        patches: tokens of an image.
        suffix_len: A.
        bucket: X' is rounded up to a multiple of this, as far as there are tokens; with more than
            1 `valid` is always there, so that equal shapes make equal plans.
    """
    seen = prefix_valid(inputs, patches)
    counts = seen.sum(dim=1)
    tokens = min(-(-int(counts.max()) // bucket) * bucket, seen.shape[1])
    # A stable sort brings the tokens that are seen to the front, in their order.
    index = seen.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :tokens]
    valid = torch.arange(tokens) < counts[:, None]
    index = torch.where(valid, index, 0)
    positions = token_positions(F.pad(valid, (0, suffix_len), value=True))
    ragged = bucket > 1 or not bool(valid.all())
    views = inputs.image_mask.flatten().nonzero().flatten()
    kept = valid if ragged else None
    return TokenPlan(views, index, kept, positions, seen.shape[1], inputs.image_mask.numel())


T = TypeVar("T", ModelInputs, TokenPlan)


def copy(record: T, device: torch.device) -> T:
    """Inputs or a plan with all tensors copied to a device."""
    copies: dict[str, Any] = {
        name: value.to(device, copy=True)
        for name, value in vars(record).items()
        if isinstance(value, Tensor)
    }
    return replace(record, **copies)
