"""π0's arithmetic without what has no effect, for every fast engine.

Against `pi0.model`, which it has to equal: masked cameras and padding are left out (`plan.py`);
query, key and value are one matrix, and so are gate and up; prefix keys and values are written
once, into buffers with room for the suffix; of the VLM's last layer only keys and values are
computed; the state token, which sees neither actions nor time, is computed in the first step and
stays; the two linear layers on the actions are one. What depends on time alone, in π0.5 scale,
shift and gate of the expert's norms, comes from outside, for all steps at once (`Network.times`).

Axes as in `pi0.model`; X' is what the plan leaves of X. Tokens of all rows lie one after the other:
x is [B·X', E] or [B·A, E].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.engines.fast.kernels import Kernels, Norm, Rotation, rms_norm
from pi0.engines.fast.plan import TokenPlan
from pi0.engines.fast.weights import EMBEDDING, EQUALISER, PackedWeights
from pi0.inputs import ModelInputs
from pi0.model import Tap
from pi0.model.flow import embed_time, integrate, schedule
from pi0.model.gemma import rotary_angles
from pi0.model.pi0 import no_tap
from pi0.model.precision import refuse_overflow
from pi0.model.siglip import EPS as LAYER_EPS

PATCHES = "vision_tower.patch_embedding"
VLM_OUTPUT = (
    "of the last layer only keys and values are computed, because nothing reads its output; they "
    "are compared instead"
)


@dataclass
class Cache:
    """Keys and values of prefix and suffix, for each layer [B, X' + A, K, D], and the state.

    Attributes:
        valid: [B, X' + A] bool, or None if every key is seen.
        rotation: of the suffix.
        state: [B, state_dim] float32.
        has_state_token: whether keys and values are there of the state's token, too. They are
            computed in the first step.
    """

    plan: TokenPlan
    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor | None
    rotation: Rotation
    state: Tensor
    has_state_token: bool = False

    def with_state(self, state: Tensor) -> Cache:
        """The same prefix with another state; this one must not be used any more."""
        return replace(self, state=state.clone(), has_state_token=False)


class Network:
    """π0 with packed weights, on one device."""

    def __init__(self, weights: PackedWeights, kernels: Kernels) -> None:
        self.config = weights.config
        self.weights = weights
        self.kernels = kernels
        self._step_times: Tensor | None = None

    def prefill(self, inputs: ModelInputs, plan: TokenPlan, tap: Tap = no_tap) -> Cache:
        """Runs the prefix. Inputs and plan are on the device."""
        config = self.config.vlm
        x = self._embed_prefix(inputs, plan, tap)
        batch, tokens = plan.index.shape
        rotation = make_rotation(plan.positions, config.head_dim)
        valid = plan.valid
        if valid is not None:
            valid = F.pad(valid, (0, self.config.suffix_len), value=True)
        suffix_rotation = slice_rotation(rotation, slice(tokens, None))
        cache = Cache(plan, [], [], valid, suffix_rotation, inputs.state.clone())
        rotation = slice_rotation(rotation, slice(0, tokens))
        shape = (batch, plan.positions.shape[1], config.num_kv_heads, config.head_dim)
        for i in range(config.depth):
            name, block = f"vlm_transformer.block.{i}", f"vlm.blocks.{i}"
            cache.keys.append(x.new_empty(shape))
            cache.values.append(x.new_empty(shape))
            k, v = cache.keys[i][:, :tokens], cache.values[i][:, :tokens]
            last = i == config.depth - 1
            if last:
                x = refuse_overflow(x)
            matrix = self.weights.matrix(f"{block}.{'kv' if last else 'qkv'}")
            first, second = (Norm(self.weights[f"{block}.norm{j}.weight"]) for j in (1, 2))
            a = self.kernels.rms_norm(x, first, matrix)
            q = self.kernels.project_heads(a, matrix, rotation, k, v)
            self._show_cache(tap, name, k, v, plan.scatter, plan.gather)
            if not last:
                attended = self.kernels.attend(q, k, v, plan.valid)
                x = self._post_attention(block, x, attended, first, second)
                tokens_of = x.view(batch, tokens, -1)
                x = self._show(tap, name, tokens_of, plan.scatter, plan.gather).flatten(0, 1)
        return cache

    def velocity(self, x_t: Tensor, time: Tensor, cache: Cache, tap: Tap = no_tap) -> Tensor:
        """dx/dt [B, horizon, action_dim] float32; see `Pi0.velocity`. Tensors are on the device.

        Args:
            time: of `times`, with or without the axis B.
            cache: keys and values of the state token are computed if they are not there; with a
                tap they are computed in any case, to be shown.
        """
        with_state = self.config.state_tokens > 0 and (
            tap is not no_tap or not cache.has_state_token
        )
        x = tap("suffix", self._embed_suffix(x_t, time, cache.state if with_state else None))
        batch, tokens = x.shape[:2]
        x = x.flatten(0, 1)
        skipped = self.config.suffix_len - tokens  # the state token, or nothing
        at = cache.plan.tokens + skipped
        rotation = slice_rotation(cache.rotation, slice(skipped, None))
        *norms, last = self._expert_norms(time)
        for i, (first, second) in enumerate(zip(norms[::2], norms[1::2], strict=True)):
            name, block = f"expert_transformer.block.{i}", f"expert.blocks.{i}"
            matrix = self.weights.matrix(f"{block}.qkv")
            a = self.kernels.rms_norm(x, first, matrix)
            k, v = cache.keys[i][:, at:], cache.values[i][:, at:]
            q = self.kernels.project_heads(a, matrix, rotation, k, v)
            self._show_cache(tap, name, k, v)
            attended = self._attend_suffix(q, cache, i, with_state)
            x = self._post_attention(block, x, attended, first, second)
            x = self._show(tap, name, x.view(batch, tokens, -1)).flatten(0, 1)
        cache.has_state_token = True
        hidden = rms_norm(refuse_overflow(x), last)
        hidden = tap("expert_transformer", hidden.view(batch, tokens, -1))
        actions = tap("action_tokens", hidden[:, -self.config.horizon :].float())
        out = self.weights["action_out_proj.weight"], self.weights["action_out_proj.bias"]
        return tap("velocity", tap("action_projection", F.linear(actions, *out)))

    def denoise(
        self,
        noise: Tensor,
        times: Tensor,
        cache: Cache,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Actions from noise, both [B, horizon, action_dim] float32, on the device.

        Args:
            times: of `step_times`.
            on_step: called once per step.
        """
        remaining = iter(times)

        def velocity(x: Tensor, _: Tensor) -> Tensor:
            v = self.velocity(x, next(remaining), cache)
            on_step()
            return v

        return integrate(velocity, noise, len(times))

    def step_times(self, steps: int) -> Tensor:
        """`times` of all steps at once; kept for the next call of as many."""
        if self._step_times is None or len(self._step_times) != steps:
            self._step_times = self.times(torch.tensor(schedule(steps)))
        return self._step_times

    def times(self, t: Tensor) -> Tensor:
        """All that depends on times [B] alone, float32.

        π0: what they add to the actions before the activation, [B, E]. π0.5: 1 + scale, shift and
        gate of the expert's norms in their order, [B, 2 · depth + 1, 3, E].
        """
        if self.config.adaptive_norm:
            return modulations(self.weights, t)
        weight = self.weights["time.weight"]
        time = embed_time(t, self.config.expert.width).to(weight.device)
        return F.linear(time, weight, self.weights["time.bias"])

    def _expert_norms(self, time: Tensor) -> list[Norm]:
        """Of the expert, in their order; `time` as `velocity` gets it."""
        names = expert_norms(self.config.expert.depth)
        if not self.config.adaptive_norm:
            return [Norm(self.weights[f"{name}.weight"]) for name in names]
        if time.ndim == 4:  # with the axis B: one time for all rows, or one for each row
            time = time[0] if len(time) == 1 else time.repeat_interleave(self.config.horizon, 0)
        return [Norm(*norm.unbind(-2)) for norm in time.unbind(-3)]

    def _embed_prefix(self, inputs: ModelInputs, plan: TokenPlan, tap: Tap) -> Tensor:
        """The prefix tokens that take part, [B·X', E]."""
        patches = self.embed_images(inputs, plan, tap)
        scale = self.config.vlm.width**0.5
        text = F.embedding(inputs.tokens, self.weights[EMBEDDING]).to(patches.dtype) * scale
        text = tap("token_embedding", text)
        prefix = torch.cat([patches.view(len(text), -1, patches.shape[-1]), text], dim=1)
        return plan.gather(tap("prefix", prefix)).flatten(0, 1)

    def embed_images(self, inputs: ModelInputs, plan: TokenPlan, tap: Tap = no_tap) -> Tensor:
        """The vision part of `prefill`: tokens of all images, [B·V, P, E], zeros where masked."""
        features = self._vision_tower(inputs.images.flatten(0, 1)[plan.views], plan, tap)
        projector = self.weights.matrix("projector")
        a = self.kernels.operand(features.flatten(0, 1), projector)
        patches = self.kernels.project(a, projector)
        shape = (*features.shape[:2], self.config.vlm.width)
        return tap("projector", plan.scatter_views(patches.view(shape)))

    def _vision_tower(self, images: Tensor, plan: TokenPlan, tap: Tap) -> Tensor:
        """Features [n, P, E] of images [n, 3, S, S]."""
        config, weights, kernels = self.config.vision, self.weights, self.kernels
        patches = F.linear(
            cut_patches(images, config.patch_size),
            weights[f"{PATCHES}.conv.weight"].flatten(1),
            weights[f"{PATCHES}.conv.bias"],
        )
        shape = patches.shape
        x = (patches + weights[f"{PATCHES}.position"]).to(weights.scheme.dtype).flatten(0, 1)
        for i in range(config.depth):
            block = f"vision_tower.blocks.{i}"
            qkv, out, fc1, fc2 = (
                weights.matrix(f"{block}.{kind}") for kind in ("qkv", "out_proj", "fc1", "fc2")
            )
            a = kernels.layer_norm(x, *self._affine(f"{block}.norm1"), qkv)
            heads = kernels.project(a, qkv).view(*shape[:2], 3, config.num_heads, config.head_dim)
            attended = kernels.attend(*heads.unbind(2))
            x = kernels.project(kernels.operand(attended, out), out, x)
            a = kernels.layer_norm(x, *self._affine(f"{block}.norm2"), fc1)
            x = kernels.project(kernels.gelu(a, fc1, fc2), fc2, x)
            x = self._show(
                tap, f"vision_tower.block.{i}", x.view(shape), plan.scatter_views, plan.gather_views
            ).flatten(0, 1)
        norm = self._affine("vision_tower.norm")
        x = refuse_overflow(x)
        features = F.layer_norm(x.float(), shape[-1:], *norm, LAYER_EPS).to(x.dtype).view(shape)
        return self._show(tap, "vision_tower", features, plan.scatter_views, plan.gather_views)

    def _embed_suffix(self, x_t: Tensor, time: Tensor, state: Tensor | None) -> Tensor:
        """The state token, if there is a state, then one token for each action."""
        weights = self.weights
        if self.config.adaptive_norm:
            first = weights["action_in_proj.weight"], weights["action_in_proj.bias"]
            return F.linear(x_t, *first).to(weights.scheme.dtype)
        hidden = F.linear(x_t, weights["actions.weight"]) + time.unsqueeze(-2)
        last = weights["action_time_mlp_out.weight"], weights["action_time_mlp_out.bias"]
        suffix = F.linear(F.silu(hidden), *last)
        if state is not None:
            token = F.linear(state, weights["state_proj.weight"], weights["state_proj.bias"])
            suffix = torch.cat([token[:, None], suffix], dim=1)
        return suffix.to(weights.scheme.dtype)

    def _attend_suffix(self, q: Tensor, cache: Cache, layer: int, with_state: bool) -> Tensor:
        """The actions see everything; the state, whose query comes first if it is there, sees the
        prefix and itself."""
        k, v, valid = cache.keys[layer], cache.values[layer], cache.valid
        batch, actions = len(q), self.config.horizon
        attended = self.kernels.attend(q[:, -actions:], k, v, valid)
        if not with_state:
            return attended
        seen = cache.plan.tokens + self.config.state_tokens
        known = None if valid is None else valid[:, :seen]
        state = self.kernels.attend(q[:, :-actions], k[:, :seen], v[:, :seen], known)
        rows = state.view(batch, 1, -1), attended.view(batch, actions, -1)
        return torch.cat(rows, dim=1).flatten(0, 1)

    def _post_attention(
        self, block: str, x: Tensor, attended: Tensor, first: Norm, second: Norm
    ) -> Tensor:
        """What follows attention in a block of Gemma: [R, E]."""
        weights, kernels = self.weights, self.kernels
        out = weights.matrix(f"{block}.o_proj")
        x = kernels.project(kernels.operand(attended, out), out, x, first.gate)
        gate_up, down = weights.mlp_chunks(f"{block}.gate_up"), weights.mlp_chunks(f"{block}.down")
        a = kernels.rms_norm(x, second, gate_up[0])
        for up, into in zip(gate_up, down, strict=True):
            x = kernels.project(kernels.geglu(a, up, into), into, x, second.gate)
        return x

    def _affine(self, norm: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{norm}.weight"], self.weights[f"{norm}.bias"]

    def _show_cache(
        self,
        tap: Tap,
        name: str,
        k: Tensor,
        v: Tensor,
        scatter: Callable[[Tensor], Tensor] = lambda x: x,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """Shows keys and values, and keeps what the tap returns."""
        if tap is not no_tap:
            k.copy_(self._show(tap, f"{name}.keys", k, scatter, gather))
            v.copy_(self._show(tap, f"{name}.values", v, scatter, gather))

    @staticmethod
    def _show(
        tap: Tap,
        name: str,
        x: Tensor,
        scatter: Callable[[Tensor], Tensor] = lambda x: x,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """Shows a tap what the model has there, and goes on with what it returns."""
        return x if tap is no_tap else gather(tap(name, scatter(x)))


def modulations(weights: PackedWeights, t: Tensor) -> Tensor:
    """`Network.times` of π0.5. Scales and shifts are divided by the norm's equaliser, if it has one
    (`equalise.py`)."""
    width, norms = weights.config.expert.width, expert_norms(weights.config.expert.depth)
    time = embed_time(t, width).to(weights["time_mlp_in.weight"].device)
    for name in ("time_mlp_in", "time_mlp_out"):
        time = F.silu(
            F.linear(time, *(weights[f"{name}.{kind}"].float() for kind in ("weight", "bias")))
        )
    found = torch.stack(
        [
            F.linear(
                time, *(weights[f"{norm}.dense.{kind}"].float() for kind in ("weight", "bias"))
            )
            for norm in norms
        ],
        dim=1,
    ).view(len(t), len(norms), 3, width)
    found[:, :, 0] += 1
    for i, norm in enumerate(norms):
        if f"{norm}.{EQUALISER}" in weights.tensors:
            found[:, i, :2] /= weights[f"{norm}.{EQUALISER}"]
    return found


def expert_norms(depth: int) -> list[str]:
    """The names of the expert's norms in the order of their use."""
    return [f"expert.blocks.{i}.norm{j}" for i in range(depth) for j in (1, 2)] + ["expert.norm"]


def cut_patches(images: Tensor, size: int) -> Tensor:
    """Whole patches of images [n, 3, S, S]: [n, P, 3·size²], ordered as convolution weights.

    Multiplied as a matrix they need no convolution, which on a GPU would round to TF32 unless flags
    of the whole process forbid it.
    """
    grid = images.shape[-1] // size
    whole = images[..., : grid * size, : grid * size]
    cells = whole.reshape(len(images), 3, grid, size, grid, size)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def make_rotation(positions: Tensor, head_dim: int) -> Rotation:
    """Cosines and sines of rotary embedding at positions [B, T]; see `pi0.model.gemma.Rope`."""
    angle = rotary_angles(positions, head_dim)[:, :, None]
    return angle.cos(), angle.sin()


def slice_rotation(rotation: Rotation, tokens: slice) -> Rotation:
    """The rotation of some of the tokens."""
    cos, sin = rotation
    return cos[:, tokens], sin[:, tokens]
