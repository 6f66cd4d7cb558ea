"""π0 and π0.5 in TTNN operations: the eleven stages of `pi0.model`, on padded tensors.

Written for one observation. Nothing here moves data to or from the host except through a tap.

Axes as in `pi0.model.pi0`, but rows are those of `layout.TileLayout`, and every tensor has four
axes: [1, 1, rows, width], heads [1, H, rows, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pi0.config import GemmaConfig, Pi0Config
from pi0.engines.tenstorrent.backend import Handle
from pi0.engines.tenstorrent.layout import TileLayout
from pi0.engines.tenstorrent.ops import Ops
from pi0.engines.tenstorrent.precision import F32
from pi0.engines.tenstorrent.timestep import Timestep
from pi0.engines.tenstorrent.weights import (
    RmsNorm,
    StateAndTime,
    TtnnGemmaBlock,
    TtnnVisionBlock,
    TtnnWeights,
)
from pi0.model import gemma, siglip

# Sees a handle by its name in `pi0.model` and the kind of its rows (`TileLayout.view`); its
# return value replaces the handle.
HandleTap = Callable[[str, Handle, str], Handle]
KeyValue = tuple[Handle, Handle]


def no_handle_tap(name: str, handle: Handle, kind: str) -> Handle:
    """The tap that does nothing."""
    return handle


@dataclass(frozen=True)
class Constants:
    """What depends on the layout only: uploaded once.

    Attributes:
        vision_mask: [1, 1, patches, patches], or None if a view has no padding.
        action_rows: [1, 1, suffix, 1] float32, 1 in the rows of actions, else 0.
        state_row: the same for the row of the state token, or None if there is none.
    """

    layout: TileLayout
    vision_mask: Handle | None
    action_rows: Handle
    state_row: Handle | None


class TtnnNetwork:
    """The stages, over one set of weights."""

    def __init__(self, config: Pi0Config, weights: TtnnWeights, ops: Ops) -> None:
        self.config, self.weights, self.ops = config, weights, ops

    def prefill(
        self,
        on: Constants,
        given: dict[str, Handle],
        tap: HandleTap = no_handle_tap,
        whole: bool = True,
    ) -> list[KeyValue]:
        """Keys and values [1, K, prefix, D] of every layer.

        Args:
            given: what `TileLayout.uploads` names.
            whole: also compute what nobody reads: the last block's output.
        """
        ops, config = self.ops, self.config
        x = self._vision(on, given["pixels"], tap)
        ops.backend.stage = "projector"
        x = tap("projector", ops.linear(x, self.weights.projector, self._residual), "patches")
        ops.backend.stage = "token_embedding"
        text = ops.embed(given["tokens"], self.weights.embedding)
        text = tap("token_embedding", ops.multiply(text, config.vlm.width**0.5), "text")
        ops.backend.stage = "prefix"
        x = tap("prefix", ops.concat([x, text], dim=2), "prefix")
        ops.backend.stage = "vlm_transformer"
        tables = given["prefix_cos"], given["prefix_sin"]
        cache = []
        norms = self.weights.vlm_norms
        for i, (block, (first, second)) in enumerate(
            zip(self.weights.vlm, norms.blocks, strict=True)
        ):
            name = f"vlm_transformer.block.{i}"
            q, *kv = self._qkv(block, first, config.vlm, x, tables)
            k, v = self._tap_cache(name, kv, "prefix", tap)
            cache.append((k, v))
            if whole or i + 1 < config.vlm.depth:
                attended = self._attend(config.vlm, q, k, v, given["prefix_mask"])
                x = tap(name, self._post_attention(block, first, second, x, attended), "prefix")
        if whole:
            tap("vlm_transformer", ops.rms_norm(x, norms.final, gemma.EPS), "prefix")
        return cache

    def embed_state(self, on: Constants, given: dict[str, Handle]) -> Handle | None:
        """The state token in its row of an empty suffix, the same in all denoising steps; None in
        π0.5, which has none."""
        time = self.weights.time
        if not isinstance(time, StateAndTime):
            return None
        self.ops.backend.stage = "suffix"
        return self.ops.multiply(self.ops.linear(given["state"], time.state, F32), on.state_row)

    def velocity(
        self,
        on: Constants,
        given: dict[str, Handle],
        cache: list[KeyValue],
        state: Handle | None,
        x_t: Handle,
        timestep: Timestep,
        tap: HandleTap = no_handle_tap,
    ) -> Handle:
        """dx/dt of noisy actions in the rows of the suffix: [1, 1, suffix, action_dim] float32.

        Args:
            state: what `embed_state` made.
        """
        ops = self.ops
        x = tap("suffix", self._embed_suffix(on, x_t, state, timestep), "suffix")
        ops.backend.stage = "expert_transformer"
        expert, tables = self.config.expert, (given["suffix_cos"], given["suffix_sin"])
        layers = zip(self.weights.expert, timestep.norms.blocks, cache, strict=True)
        for i, (block, (first, second), past) in enumerate(layers):
            name = f"expert_transformer.block.{i}"
            q, *kv = self._qkv(block, first, expert, x, tables)
            own = self._tap_cache(name, kv, "suffix", tap)
            k, v = (ops.concat([a, b], dim=2) for a, b in zip(past, own, strict=True))
            attended = self._attend(expert, q, k, v, given["suffix_mask"])
            x = tap(name, self._post_attention(block, first, second, x, attended), "suffix")
        x = ops.rms_norm(x, timestep.norms.final, gemma.EPS)
        x = tap("expert_transformer", x, "suffix")
        ops.backend.stage = "action_tokens"
        x = tap("action_tokens", ops.cast(x, F32), "actions")
        ops.backend.stage = "action_projection"
        v = tap("action_projection", ops.linear(x, self.weights.velocity, F32), "actions")
        ops.backend.stage = "velocity"
        return tap("velocity", v, "actions")

    def sample(
        self,
        on: Constants,
        given: dict[str, Handle],
        timesteps: list[Timestep],
        on_step: Callable[[], None] = lambda: None,
    ) -> Handle:
        """Actions [1, 1, horizon, action_dim] float32: the prefix once, then Euler's method.

        Args:
            given: what `TileLayout.uploads` names, and `x_t`.
        """
        ops = self.ops
        cache = self.prefill(on, given, whole=False)
        state, x = self.embed_state(on, given), given["x_t"]
        for timestep in timesteps:
            v = self.velocity(on, given, cache, state, x, timestep)
            # Only the rows of actions move: what the others would gather never meets them.
            x = ops.add(x, ops.multiply(ops.multiply(v, on.action_rows), -1 / len(timesteps)))
            on_step()
        return ops.rows(x, self.config.state_tokens, self.config.suffix_len)

    @property
    def _residual(self) -> str:
        return self.ops.precision.residual

    def _embed_suffix(
        self, on: Constants, x_t: Handle, state: Handle | None, timestep: Timestep
    ) -> Handle:
        """[1, 1, suffix, width]; see `Pi0.embed_suffix`."""
        ops, time = self.ops, self.weights.time
        ops.backend.stage = "suffix"
        h = ops.linear(x_t, self.weights.actions, F32)
        if isinstance(time, StateAndTime):
            h = ops.silu(ops.add(h, timestep.bias))
            h = ops.multiply(ops.linear(h, time.mixed, F32), on.action_rows)
            h = ops.add(h, state)
        return ops.cast(h, self._residual)

    def _vision(self, on: Constants, pixels: Handle, tap: HandleTap) -> Handle:
        """[V, S, S, 3] → features [1, 1, V·patches, E]."""
        ops, config, weights = self.ops, self.config.vision, self.weights
        ops.backend.stage = "vision_tower"
        views, rows = on.layout.views, on.layout.patches
        x = ops.cut_patches(pixels, config.patch_size, rows)
        x = ops.reshape(x, (1, 1, views * rows, x.shape[3]))
        x = ops.linear(x, weights.patch, ops.precision.pixels)
        x = ops.add(ops.reshape(x, (views, 1, rows, config.width)), weights.position)
        x = ops.cast(ops.reshape(x, (1, 1, views * rows, config.width)), self._residual)
        for i, block in enumerate(weights.vision):
            x = tap(f"vision_tower.block.{i}", self._vision_block(on, block, x), "patches")
        x = ops.layer_norm(x, weights.vision_norm, siglip.EPS)
        return tap("vision_tower", x, "patches")

    def _vision_block(self, on: Constants, block: TtnnVisionBlock, x: Handle) -> Handle:
        ops, config = self.ops, self.config.vision
        views, rows = on.layout.views, on.layout.patches
        h = ops.layer_norm(x, block.norm1, siglip.EPS)
        qkv = ops.linear(h, block.qkv, self._residual)
        qkv = ops.reshape(qkv, (views, 1, rows, qkv.shape[3]))
        q, k, v = ops.heads(qkv, config.num_heads, config.num_heads)
        attended = ops.attention(q, k, v, on.vision_mask, config.head_dim**-0.5)
        attended = ops.reshape(attended, (1, 1, views * rows, attended.shape[3]))
        x = ops.add(x, ops.linear(attended, block.out, self._residual))
        h = ops.layer_norm(x, block.norm2, siglip.EPS)
        h = ops.gelu(ops.linear(h, block.fc1, ops.precision.hidden))
        return ops.add(x, ops.linear(h, block.fc2, self._residual))

    def _qkv(
        self,
        block: TtnnGemmaBlock,
        norm: RmsNorm,
        config: GemmaConfig,
        x: Handle,
        tables: KeyValue,
    ) -> tuple[Handle, ...]:
        h = self.ops.rms_norm(x, norm, gemma.EPS)
        qkv = self.ops.linear(h, block.qkv, self._residual)
        q, k, v = self.ops.heads(qkv, config.num_heads, config.num_kv_heads)
        k, cache = self.ops.rope(k, *tables), self.ops.precision.cache
        if cache != self._residual:
            k, v = self.ops.cast(k, cache), self.ops.cast(v, cache)
        return self.ops.rope(q, *tables), k, v

    def _tap_cache(self, name: str, kv: list[Handle], part: str, tap: HandleTap) -> KeyValue:
        k, v = kv
        kind = f"{part}_heads"
        return tap(f"{name}.keys", k, kind), tap(f"{name}.values", v, kind)

    def _attend(self, config: GemmaConfig, q: Handle, k: Handle, v: Handle, mask: Handle) -> Handle:
        return self.ops.attention(q, k, v, mask, config.head_dim**-0.5)

    def _post_attention(
        self, block: TtnnGemmaBlock, first: RmsNorm, second: RmsNorm, x: Handle, attended: Handle
    ) -> Handle:
        ops, hidden = self.ops, self.ops.precision.hidden
        x = ops.add_branch(x, ops.linear(attended, block.out, self._residual), first)
        h = ops.rms_norm(x, second, gemma.EPS)
        gate = ops.gelu(ops.linear(h, block.gate, hidden))
        h = ops.multiply(gate, ops.linear(h, block.up, hidden))
        return ops.add_branch(x, ops.linear(h, block.down, self._residual), second)
