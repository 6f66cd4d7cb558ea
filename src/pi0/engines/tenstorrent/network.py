"""π0 and π0.5 in TTNN operations: the eleven stages of `pi0.model`, on padded tensors.

Nothing here moves data to or from the host except through a tap.

Axes as in `pi0.model.pi0`, but rows are those of `layout.TileLayout`, and every tensor has four
axes: [1, 1, rows, width], heads [B, H, rows of one, D]. Rows of several observations follow each
other; only attention and the cache tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable

from pi0.config import GemmaConfig, Pi0Config
from pi0.engines.tenstorrent.backend import Handle
from pi0.engines.tenstorrent.constants import Constants
from pi0.engines.tenstorrent.ops import Ops
from pi0.engines.tenstorrent.precision import F32
from pi0.engines.tenstorrent.timestep import Timestep
from pi0.engines.tenstorrent.weights import (
    Linear,
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

SCALED = 1.0  # of logits in the trunks: the queries' weights are scaled already


def no_handle_tap(name: str, handle: Handle, kind: str) -> Handle:
    """The tap that does nothing."""
    return handle


class TtnnNetwork:
    """The stages, over one set of weights."""

    def __init__(self, config: Pi0Config, weights: TtnnWeights, ops: Ops) -> None:
        self.config, self.weights, self.ops = config, weights, ops
        self.loop = Ops(ops.backend, ops.precision, in_loop=True)

    def prefill(
        self,
        on: Constants,
        given: dict[str, Handle],
        tap: HandleTap = no_handle_tap,
        whole: bool = True,
    ) -> list[KeyValue]:
        """Keys and values [B, K, suffix + prefix, D] of every layer; `velocity` writes those of
        the suffix, which come first.

        Args:
            given: what `TileLayout.uploads` names.
            whole: also compute what nobody reads: the last block's output.
        """
        ops, config = self.ops, self.config
        x = self._vision(on, given["patches"], tap)
        ops.backend.stage = "projector"
        x = tap("projector", ops.linear(x, self.weights.projector, self._residual), "patches")
        ops.backend.stage = "token_embedding"
        text = ops.embed(given["tokens"], self.weights.embedding)
        text = tap("token_embedding", text, "text")
        ops.backend.stage = "prefix"
        x = tap("prefix", self._join_prefix(on.layout.batch, x, text), "prefix")
        ops.backend.stage = "vlm_transformer"
        tables = given["prefix_cos"], given["prefix_sin"], on.turn
        cache = []
        norms = self.weights.vlm_norms
        for i, (block, (first, second)) in enumerate(
            zip(self.weights.vlm, norms.blocks, strict=True)
        ):
            name = f"vlm_transformer.block.{i}"
            q, *kv = self._qkv(ops, block, first, config.vlm, x, tables, on.layout.batch)
            k, v = self._tap_cache(name, kv, "prefix", tap)
            cache.append(
                (ops.concat([on.unwritten, k], dim=2), ops.concat([on.unwritten, v], dim=2))
            )
            if whole or i + 1 < config.vlm.depth:
                attended = ops.attention(q, k, v, given["prefix_mask"], SCALED)
                x = self._post_attention(ops, block, first, second, x, attended)
                x = tap(name, x, "prefix")
        if whole:
            tap("vlm_transformer", ops.rms_norm(x, norms.final, gemma.EPS), "prefix")
        return cache

    def embed_state(self, on: Constants, given: dict[str, Handle]) -> Handle | None:
        """The state token in its row of the suffix, else 0: float32, the same in all steps. None in
        π0.5, which has none."""
        ops, time = self.loop, self.weights.time
        if not isinstance(time, StateAndTime):
            return None
        ops.backend.stage = "suffix"
        fidelity = ops.precision.rest
        return ops.add_linear(on.state_bias, given["state"], time.state, time.ones, F32, fidelity)

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
        """dx/dt of noisy actions in the rows of the suffix: [1, 1, B·suffix, action_dim] float32.

        Args:
            cache: what `prefill` made; the suffix's part of it is overwritten.
            state: what `embed_state` made.
            x_t: zeros in the rows that are no actions.
        """
        ops = self.loop
        x = self._embed_suffix(on, x_t, state, timestep)
        x = self._tap_stream("suffix", x, "suffix", tap)
        ops.backend.stage = "expert_transformer"
        expert, tables = self.config.expert, (given["suffix_cos"], given["suffix_sin"], on.turn)
        layers = zip(self.weights.expert, timestep.norms.blocks, cache, strict=True)
        for i, (block, (first, second), (keys, values)) in enumerate(layers):
            name = f"expert_transformer.block.{i}"
            q, *kv = self._qkv(ops, block, first, expert, x, tables, on.layout.batch)
            k, v = self._tap_cache(name, kv, "suffix", tap)
            ops.write_rows(keys, k, values, v, on.suffix_places)
            attended = ops.attention(q, keys, values, given["suffix_mask"], SCALED)
            x = self._post_attention(ops, block, first, second, x, attended)
            x = self._tap_stream(name, x, "suffix", tap)
        x = ops.rms_norm(x, timestep.norms.final, gemma.EPS)
        x = self._tap_stream("expert_transformer", x, "suffix", tap)
        x = self._tap_stream("action_tokens", x, "actions", tap)
        ops.backend.stage = "action_projection"
        v = ops.action_linear(x, self.weights.velocity, F32)
        v = tap("action_projection", v, "actions")
        ops.backend.stage = "velocity"
        return tap("velocity", v, "actions")

    def sample(
        self,
        on: Constants,
        given: dict[str, Handle],
        timesteps: list[Timestep],
        on_step: Callable[[], None] = lambda: None,
    ) -> Handle:
        """Actions in the rows of the suffix, [1, 1, B·suffix, action_dim] float32: the prefix once,
        then Euler's method.

        Args:
            given: what `TileLayout.uploads` names, and `x_t`.
        """
        cache = self.prefill(on, given, whole=False)
        state, x = self.embed_state(on, given), given["x_t"]
        for timestep in timesteps:
            v = self.velocity(on, given, cache, state, x, timestep)
            # Only the rows of actions move: what the others would gather never meets them.
            x = self.loop.addcmul(x, v, on.action_rows, -1 / len(timesteps))
            on_step()
        return x

    @property
    def _residual(self) -> str:
        return self.ops.precision.residual

    def _join_prefix(self, batch: int, features: Handle, text: Handle) -> Handle:
        """Features [1, 1, B·V·patches, E] and text [B, 1, L, E] → [1, 1, B·prefix, E]."""
        ops, (_, _, rows, width) = self.ops, features.shape
        joined = ops.concat([ops.reshape(features, (batch, 1, rows // batch, width)), text], dim=2)
        return ops.reshape(joined, (1, 1, batch * joined.shape[2], width))

    def _embed_suffix(
        self, on: Constants, x_t: Handle, state: Handle | None, timestep: Timestep
    ) -> Handle:
        """[1, 1, B·suffix, width]; see `Pi0.embed_suffix`."""
        ops, time, weights = self.loop, self.weights.time, self.weights.actions
        ops.backend.stage = "suffix"
        if not isinstance(time, StateAndTime):
            return ops.action_linear(x_t, weights, self._residual)
        h = ops.action_linear(x_t, Linear(weights.weight, timestep.bias), F32, "SILU")
        fidelity = ops.precision.rest
        return ops.add_linear(state, h, time.mixed, on.action_tokens, self._residual, fidelity)

    def _vision(self, on: Constants, patches: Handle, tap: HandleTap) -> Handle:
        """[1, 1, B·V·patches, 3·14²] → features [1, 1, B·V·patches, E]."""
        ops, config, weights = self.ops, self.config.vision, self.weights
        ops.backend.stage = "vision_tower"
        views, rows = on.layout.batch * on.layout.views, on.layout.patches
        x = ops.linear(patches, weights.patch, ops.precision.pixels)
        x = ops.reshape(x, (views, 1, rows, config.width))
        x = ops.add(x, weights.position, self._residual)
        x = ops.reshape(x, (1, 1, views * rows, config.width))
        for i, block in enumerate(weights.vision):
            x = tap(f"vision_tower.block.{i}", self._vision_block(on, block, x), "patches")
        x = ops.layer_norm(x, weights.vision_norm, siglip.EPS)
        return tap("vision_tower", x, "patches")

    def _vision_block(self, on: Constants, block: TtnnVisionBlock, x: Handle) -> Handle:
        ops, config = self.ops, self.config.vision
        views, rows = on.layout.batch * on.layout.views, on.layout.patches
        h = ops.layer_norm(x, block.norm1, siglip.EPS)
        qkv = ops.linear(h, block.qkv, ops.precision.heads)
        qkv = ops.reshape(qkv, (views, 1, rows, qkv.shape[3]))
        q, k, v = ops.heads(qkv, config.num_heads, config.num_heads)
        attended = ops.attention(q, k, v, on.vision_mask, config.head_dim**-0.5)
        attended = ops.reshape(attended, (1, 1, views * rows, attended.shape[3]))
        x = ops.add_branch(x, attended, block.out, self.weights.vision_gate)
        h = ops.layer_norm(x, block.norm2, siglip.EPS)
        # The tanh form, which SigLIP was trained with.
        h = ops.linear(h, block.fc1, ops.precision.hidden, "GELU_TANH")
        return ops.add_branch(x, h, block.fc2, self.weights.vision_gate)

    def _qkv(
        self,
        ops: Ops,
        block: TtnnGemmaBlock,
        norm: RmsNorm,
        config: GemmaConfig,
        x: Handle,
        tables: tuple[Handle, Handle, Handle],
        batch: int,
    ) -> tuple[Handle, ...]:
        """Heads of queries and keys, which are rotated, and of values."""
        h = ops.rms_norm(x, norm, gemma.EPS)
        qkv = ops.rope(ops.linear(h, block.qkv, ops.precision.heads), *tables)
        _, _, rows, width = qkv.shape
        each = ops.reshape(qkv, (batch, 1, rows // batch, width))
        return ops.heads(each, config.num_heads, config.num_kv_heads)

    def _tap_stream(self, name: str, x: Handle, kind: str, tap: HandleTap) -> Handle:
        """What a tap returns instead is brought to where the loop has its stream."""
        seen = tap(name, x, kind)
        return x if seen is x else self.loop.to_stream(seen)

    def _tap_cache(self, name: str, kv: list[Handle], part: str, tap: HandleTap) -> KeyValue:
        k, v = kv
        kind = f"{part}_heads"
        return tap(f"{name}.keys", k, kind), tap(f"{name}.values", v, kind)

    def _post_attention(
        self,
        ops: Ops,
        block: TtnnGemmaBlock,
        first: RmsNorm,
        second: RmsNorm,
        x: Handle,
        attended: Handle,
    ) -> Handle:
        attended = ops.reshape(attended, (1, 1, x.shape[2], attended.shape[3]))
        x = ops.add_branch(x, attended, block.out, first.gate)
        h = ops.rms_norm(x, second, gemma.EPS)
        gate, up = ops.split_linear(h, block.gate_up, 2, ops.precision.hidden)
        return ops.add_branch(x, ops.gelu_product(gate, up), block.down, second.gate)
