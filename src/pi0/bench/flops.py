"""Floating point operations of π0 and π0.5: of the published model, and the least that is needed.

A multiplication and an addition are two operations. Only matrix products are counted (projections
and attention), not norms, activations or softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

from pi0.config import GemmaConfig, Pi0Config


@dataclass(frozen=True)
class Work:
    """Operations in linear layers and in attention, and the parameters of the linear layers."""

    linears: int
    attention: int
    weights: int

    @property
    def flop(self) -> int:
        return self.linears + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linears + other.linears,
            self.attention + other.attention,
            self.weights + other.weights,
        )

    def __mul__(self, times: int) -> Work:
        return Work(self.linears * times, self.attention * times, self.weights * times)


@dataclass(frozen=True)
class Count:
    """Work of the parts of one action chunk.

    Attributes:
        vision: tower and projector, all cameras.
        language: the rest of prefill.
        step: one denoising step.
    """

    vision: Work
    language: Work
    step: Work

    @property
    def prefill(self) -> Work:
        return self.vision + self.language

    def total(self, steps: int) -> Work:
        return self.prefill + self.step * steps


def published(config: Pi0Config, cameras: int, tokens: int, batch: int = 1) -> Count:
    """Everything that the model as published computes: all cameras, all text tokens, every layer
    to its end, the state token or what time makes of the norms anew in every step."""
    prefix = config.prefix_len(cameras, tokens)
    suffix = config.suffix_len
    return Count(
        vision=vision(config, cameras * batch),
        language=trunk(config.vlm, prefix, prefix, batch),
        step=trunk(config.expert, suffix, prefix + suffix, batch)
        + heads(config, config.horizon * batch)
        + (condition(config, batch) if config.adaptive_norm else state_projection(config, batch)),
    )


def needed(config: Pi0Config, cameras: int, tokens: int, batch: int = 1) -> Count:
    """The least work that gives the same actions; `cameras` and `tokens` are the valid ones.

    Only the actions' output of the last layer is read; of the prefix and the state token, the last
    layer needs keys and values only. The state token attends to nothing that changes between steps,
    so it is computed once. What π0.5's norms are at a time is the same in every call.
    """
    prefix = config.prefix_len(cameras, tokens)
    suffix = config.suffix_len
    language = trunk(config.vlm, prefix, prefix, batch, last_output=False)
    if config.state_tokens:
        language += trunk(config.expert, 1, prefix + 1, batch, last_output=False)
        language += state_projection(config, batch)
    return Count(
        vision=vision(config, cameras * batch),
        language=language,
        step=trunk(config.expert, config.horizon, prefix + suffix, batch)
        + heads(config, config.horizon * batch),
    )


def linear(inner: int, outer: int, rows: int) -> Work:
    """A linear layer [outer, inner] on [rows, inner]."""
    return Work(2 * inner * outer * rows, 0, inner * outer)


def attention(heads_width: int, queries: int, keys: int, batch: int) -> Work:
    """Logits and the weighted sum of values; `heads_width` is that of all heads together."""
    return Work(0, 4 * heads_width * queries * keys * batch, 0)


def vision(config: Pi0Config, images: int) -> Work:
    """The vision tower and the projector."""
    tower = config.vision
    patches = tower.num_patches
    rows = patches * images
    block = (
        linear(tower.width, 4 * tower.width, rows)
        + linear(tower.width, 2 * tower.mlp_dim, rows)
        + attention(tower.width, patches, patches, images)
    )
    return (
        linear(3 * tower.patch_size**2, tower.width, rows)
        + block * tower.depth
        + linear(tower.width, config.vlm.width, rows)
    )


def trunk(
    gemma: GemmaConfig, queries: int, keys: int, batch: int, last_output: bool = True
) -> Work:
    """A transformer; `queries` and `keys` are those of one row of the batch.

    Args:
        last_output: if False, the last layer computes keys and values only.
    """
    rows = queries * batch
    q_width, kv_width = gemma.num_heads * gemma.head_dim, gemma.num_kv_heads * gemma.head_dim
    keys_values = linear(gemma.width, 2 * kv_width, rows)
    rest = (
        linear(gemma.width, 2 * q_width, rows)  # query and output
        + attention(q_width, queries, keys, batch)
        + linear(gemma.width, 3 * gemma.mlp_dim, rows)  # gate, up and down
    )
    return keys_values * gemma.depth + rest * (gemma.depth if last_output else gemma.depth - 1)


def heads(config: Pi0Config, rows: int) -> Work:
    """The projections of actions, in π0 of actions with time, and of the velocity."""
    width = config.expert.width
    both = linear(config.action_dim, width, rows) + linear(width, config.action_dim, rows)
    if config.adaptive_norm:
        return both
    return both + linear(2 * width, width, rows) + linear(width, width, rows)


def state_projection(config: Pi0Config, batch: int) -> Work:
    """What makes π0's state token."""
    return linear(config.state_dim, config.expert.width, batch)


def condition(config: Pi0Config, batch: int) -> Work:
    """What time makes of π0.5's adaptive norms: two of each layer and the final one."""
    width = config.expert.width
    norms = 2 * config.expert.depth + 1
    return linear(width, width, batch) * 2 + linear(width, 3 * width, batch) * norms
