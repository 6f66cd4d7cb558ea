"""π0 and π0.5: images, a prompt and a state in, the velocity of a chunk of actions out.

The model is eleven stages, named in `STAGES`. Two ways lead through them and agree: `prefill` and
`velocity` (the prefix once, the expert at every denoising step; what inference uses) and `forward`
(the whole sequence at once; what training uses).

π0.5 differs in the expert alone: its state is part of the prompt, so the suffix has no token of it,
and the timestep is not mixed into the tokens but conditions the norms.

Axes: B batch, V views, P patches, L prompt tokens, X prefix tokens (V·P + L), A suffix tokens
(state and actions), T queries, S keys, E width of the trunk at hand.

Knows nothing of files, cameras, robots or devices; dtypes are in `precision.py`.

Source: openpi `pi0.py`; arXiv 2410.24164, 2504.16054.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0.config import Pi0Config
from pi0.inputs import ModelInputs
from pi0.model.flow import embed_time, integrate
from pi0.model.gemma import GemmaTrunk, KeyValue, Tap, TokenStream, run_layers
from pi0.model.precision import Float32Linear
from pi0.model.siglip import SiglipTower

STAGES = (
    "vision_tower",
    "projector",
    "token_embedding",
    "prefix",
    "vlm_transformer",
    "suffix",
    "sequence",
    "expert_transformer",
    "action_tokens",
    "action_projection",
    "velocity",
)


@dataclass(frozen=True)
class PrefixCache:
    """What denoising needs of an observation: keys and values of each layer, which tokens of the
    prefix are valid, and the state."""

    layers: list[KeyValue]  # each [B, X, K, D]
    valid: Tensor  # [B, X] bool
    state: Tensor  # [B, state_dim]


def no_tap(name: str, value: Tensor) -> Tensor:
    """The tap that does nothing."""
    return value


def attention_mask(valid: Tensor, blocks: Tensor) -> Tensor:
    """[B, S, S] bool: whether token i (row) may see token j (column).

    Args:
        valid: [B, S] bool; padding is seen by nobody and sees nothing.
        blocks: [S], ascending; a token sees all of its own and of earlier blocks.
    """
    visible = blocks[None, :] <= blocks[:, None]
    return visible & valid[:, None, :] & valid[:, :, None]


def token_blocks(prefix: int, state: int, actions: int) -> Tensor:
    """Blocks of the attention mask: of the prefix's tokens, the state's, then the actions'."""
    return torch.cat([torch.full((n,), i) for i, n in enumerate((prefix, state, actions))])


def prefix_valid(inputs: ModelInputs, patches: int) -> Tensor:
    """Which tokens of the prefix are valid, given the number of patches per image: [B, X] bool."""
    views = inputs.image_mask.repeat_interleave(patches, dim=1)
    return torch.cat([views, inputs.token_mask], dim=1)


def token_positions(valid: Tensor) -> Tensor:
    """[B, S]: the place of each token among the valid ones; padding takes no place."""
    return valid.cumsum(dim=1) - 1


class Pi0(nn.Module):
    """The π0 model. Parameters are created uninitialised: a checkpoint fills them."""

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.config = config
        width = config.expert.width
        self.vision_tower = SiglipTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.vlm.width)
        # Not initialised: on torch's meta device that alone would import all of torch's compiler.
        table = torch.empty(config.vocab_size, config.vlm.width)
        self.token_embedding = nn.Embedding(config.vocab_size, config.vlm.width, _weight=table)
        self.vlm = GemmaTrunk(config.vlm)
        self.expert = GemmaTrunk(config.expert, config.adaptive_norm)
        self.action_in_proj = Float32Linear(config.action_dim, width)
        if config.adaptive_norm:
            self.time_mlp_in = Float32Linear(width, width)
            self.time_mlp_out = Float32Linear(width, width)
        else:
            self.state_proj = Float32Linear(config.state_dim, width)
            self.action_time_mlp_in = Float32Linear(2 * width, width)
            self.action_time_mlp_out = Float32Linear(width, width)
        self.action_out_proj = Float32Linear(width, config.action_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trunks; inputs, Euler state and actions are float32."""
        return self.projector.weight.dtype

    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> PrefixCache:
        """Runs the prefix through the VLM, once for all denoising steps."""
        prefix, valid = self.embed_prefix(inputs, tap)
        blocks = token_blocks(valid.shape[1], 0, 0).to(valid.device)
        stream = TokenStream("vlm_transformer", self.vlm, prefix, token_positions(valid))
        (hidden,), layers = run_layers([stream], attention_mask(valid, blocks), tap)
        tap("vlm_transformer", hidden)
        return PrefixCache(layers, valid, inputs.state.clone())

    def velocity(self, x_t: Tensor, t: Tensor, cache: PrefixCache, tap: Tap = no_tap) -> Tensor:
        """dx/dt of noisy actions: x_t [B, horizon, 32], t [B] → [B, horizon, 32].

        All float32. The expert's queries see the keys of the whole prefix and of the suffix: the
        mask is cut to the suffix in its rows, not in its columns.
        """
        suffix, condition = self.embed_suffix(x_t, t, cache.state, tap)
        mask, positions = self.mask_and_positions(cache.valid, tap)
        x_len = cache.valid.shape[1]
        positions = positions[:, x_len:]
        stream = TokenStream("expert_transformer", self.expert, suffix, positions, condition)
        (hidden,), _ = run_layers([stream], mask[:, x_len:], tap, past=cache.layers)
        return self.project_actions(hidden, tap)

    def forward(self, inputs: ModelInputs, x_t: Tensor, t: Tensor, tap: Tap = no_tap) -> Tensor:
        """The velocity in one pass over the joined sequence [X + A]; arguments as `velocity`'s."""
        prefix, valid = self.embed_prefix(inputs, tap)
        suffix, condition = self.embed_suffix(x_t, t, inputs.state, tap)
        mask, positions = self.mask_and_positions(valid, tap)
        x_len = valid.shape[1]
        first, last = positions[:, :x_len], positions[:, x_len:]
        vlm = TokenStream("vlm_transformer", self.vlm, prefix, first)
        expert = TokenStream("expert_transformer", self.expert, suffix, last, condition)
        (vlm_hidden, expert_hidden), _ = run_layers([vlm, expert], mask, tap)
        tap("vlm_transformer", vlm_hidden)
        return self.project_actions(expert_hidden, tap)

    @torch.no_grad()
    def sample_actions(self, inputs: ModelInputs, noise: Tensor, steps: int = 10) -> Tensor:
        """Actions [B, horizon, 32] float32 from noise of that shape."""
        cache = self.prefill(inputs)
        return integrate(lambda x, t: self.velocity(x, t, cache), noise, steps)

    def embed_prefix(self, inputs: ModelInputs, tap: Tap) -> tuple[Tensor, Tensor]:
        """Image patches, then text: [B, X, E], and which tokens are valid [B, X].

        Text embeddings are scaled by √E, image features are not (openpi, `embed_prefix`).
        """
        batch, views = inputs.image_mask.shape
        images = inputs.images.flatten(0, 1)  # [B·V, 3, S, S]
        features = tap("vision_tower", self.vision_tower(images, self.dtype, tap))
        patches = tap("projector", self.projector(features))
        patches = patches.view(batch, views, *patches.shape[1:])  # [B, V, P, E]
        scale = self.config.vlm.width**0.5
        text = tap("token_embedding", self.token_embedding(inputs.tokens) * scale)
        prefix = tap("prefix", torch.cat([patches.flatten(1, 2), text], dim=1))
        return prefix, prefix_valid(inputs, patches.shape[2])

    def embed_suffix(
        self, x_t: Tensor, t: Tensor, state: Tensor, tap: Tap
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens of the suffix [B, A, E], and what conditions the expert's norms [B, E].

        π0: the state's token, then one for each action, mixed with the timestep; no condition.
        π0.5: one for each action; the condition is the timestep.
        """
        actions = self.action_in_proj(x_t)
        time = embed_time(t, actions.shape[-1])
        if self.config.adaptive_norm:
            condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))
            return tap("suffix", actions.to(self.dtype)), tap("suffix.condition", condition)
        mixed = torch.cat([actions, time[:, None].expand_as(actions)], dim=-1)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(mixed)))
        tokens = torch.cat([self.state_proj(state)[:, None], actions], dim=1)
        return tap("suffix", tokens.to(self.dtype)), None

    def mask_and_positions(self, prefix_valid: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """Mask [B, X + A, X + A] and positions [B, X + A] of prefix and suffix together."""
        batch, x_len = prefix_valid.shape
        blocks = token_blocks(x_len, self.config.state_tokens, self.config.horizon)
        suffix_valid = prefix_valid.new_ones(batch, self.config.suffix_len)
        valid = torch.cat([prefix_valid, suffix_valid], dim=1)
        mask = tap("sequence", attention_mask(valid, blocks.to(valid.device)))
        return mask, token_positions(valid)

    def project_actions(self, hidden: Tensor, tap: Tap) -> Tensor:
        """Velocity [B, horizon, 32] float32 from the expert's output [B, A, E]."""
        hidden = tap("expert_transformer", hidden)
        actions = tap("action_tokens", hidden[:, -self.config.horizon :].float())
        return tap("velocity", tap("action_projection", self.action_out_proj(actions)))
