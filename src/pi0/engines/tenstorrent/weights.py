"""The model's parameters as the network wants them: fused, padded to tiles, in the preset's dtypes.

Matrices are stored [in, out]. Heads that are no whole tiles are padded with zeros, which changes no
product. Folded: RMSNorm's 1 + w; the scale of the trunks' logits into the queries' weights and that
of the text into the token table, where the published sizes make both powers of two or one rounding;
in π0 the first of the two linear layers on the actions into the second, between which there is
nothing. What reads only the timestep stays on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pi0.engines.folded_actions import fold_actions
from pi0.engines.tenstorrent.backend import Handle, Upload
from pi0.engines.tenstorrent.layout import padded_head, tiled
from pi0.engines.tenstorrent.precision import BF16, BFP8, Precision
from pi0.model import Pi0
from pi0.model.gemma import GemmaTrunk, RMSNorm
from pi0.model.siglip import SiglipTower

Put = Callable[[Upload], Handle]
HostLinear = tuple[Tensor, Tensor]  # weight [out, in] and bias [out]


@dataclass(frozen=True)
class Linear:
    """A matrix [in, out] and a bias [1, 1, 1, out] or None."""

    weight: Handle
    bias: Handle | None = None


@dataclass(frozen=True)
class RmsNorm:
    """Rows [1, 1, 1, E].

    Attributes:
        weight: 1 + scale.
        gate: multiplied with the branch after the norm: ones, unless the norm is adaptive.
        shift: of an adaptive norm: added to the result.
    """

    weight: Handle
    gate: Handle
    shift: Handle | None = None


@dataclass(frozen=True)
class TrunkNorms:
    """Both norms of each block, and the final one."""

    blocks: list[tuple[RmsNorm, RmsNorm]]
    final: RmsNorm


@dataclass(frozen=True)
class TtnnVisionBlock:
    norm1: Linear  # scale and offset of a LayerNorm
    qkv: Linear
    out: Linear
    norm2: Linear
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class TtnnGemmaBlock:
    qkv: Linear
    out: Linear
    gate_up: Linear  # one beside the other
    down: Linear


@dataclass(frozen=True)
class StateAndTime:
    """What makes π0's suffix, beside the layer on its actions.

    Attributes:
        state: makes the state's token; without its bias.
        state_bias: [E] float32, on the host.
        ones: [1, 1, 1, E].
        mixed: follows the activation of actions with time.
        time: [E, E] and [E] float32, on the host: embedded time → what is added to the actions.
        norms: the expert's, the same at any time.
    """

    state: Linear
    state_bias: Tensor
    ones: Handle
    mixed: Linear
    time: HostLinear
    norms: TrunkNorms


@dataclass(frozen=True)
class AdaptiveNorms:
    """What makes the norms of π0.5's expert, all of it float32 on the host.

    Attributes:
        mlp: both layers from the embedded time to the condition.
        dense: for each norm, in order, the layer from the condition to scale, shift and gate.
    """

    mlp: tuple[HostLinear, HostLinear]
    dense: list[HostLinear]


@dataclass(frozen=True)
class TtnnWeights:
    patch: Linear
    position: Handle
    vision: list[TtnnVisionBlock]
    vision_norm: Linear
    vision_gate: Handle  # ones
    projector: Linear
    embedding: Handle
    vlm: list[TtnnGemmaBlock]
    vlm_norms: TrunkNorms
    expert: list[TtnnGemmaBlock]
    actions: Linear
    time: StateAndTime | AdaptiveNorms
    velocity: Linear


class Packer:
    """Packs a model, which is empty afterwards: what has been packed is freed."""

    def __init__(self, precision: Precision, put: Put) -> None:
        self.precision, self._put = precision, put

    def pack(self, model: Pi0) -> TtnnWeights:
        vision, norm = self._tower(model.vision_tower)
        scaled = model.token_embedding.weight.detach() * model.config.vlm.width**0.5
        actions, time = self._suffix(model)  # first: the trunk's norms are freed
        conv = model.vision_tower.patch_embedding.conv
        patch = conv.weight.permute(0, 2, 3, 1).flatten(1)  # [E, 14·14·3], channels last
        weights = TtnnWeights(
            patch=self._linear("patch", pad_columns(patch, tiled(patch.shape[1])), conv.bias),
            position=self._position(model.vision_tower.patch_embedding.position),
            vision=vision,
            vision_norm=norm,
            vision_gate=self._ones(model.config.vision.width),
            projector=self._layer("projector", model.projector),
            embedding=self._put(Upload(scaled, self.precision.embedding, tiled=False)),
            vlm_norms=self._norms(model.vlm),
            vlm=self._blocks("vlm", model.vlm),
            expert=self._blocks("expert", model.expert),
            actions=actions,
            time=time,
            velocity=self._layer("action", model.action_out_proj),
        )
        free(model)
        return weights

    def _suffix(self, model: Pi0) -> tuple[Linear, StateAndTime | AdaptiveNorms]:
        """The layer on the actions; what makes the rest of the suffix and the expert's norms."""
        first = model.action_in_proj
        if model.config.adaptive_norm:
            time = AdaptiveNorms(
                (host_linear(model.time_mlp_in), host_linear(model.time_mlp_out)),
                [host_linear(norm.dense) for norm in norms_of(model.expert)],
            )
            return self._layer("action", first), time
        second, mixed = model.action_time_mlp_in, model.action_time_mlp_out
        folded = fold_actions((first.weight, first.bias), (second.weight, second.bias))
        ones = torch.ones(1, 1, 1, len(mixed.bias))
        return self._linear("action", folded.actions), StateAndTime(
            state=self._linear("action", model.state_proj.weight),
            state_bias=model.state_proj.bias.detach().float(),
            ones=self._put(Upload(ones, self.precision.weights["action"])),
            mixed=self._layer("action", mixed),
            time=(folded.time, folded.bias),
            norms=self._norms(model.expert),
        )

    def _linear(self, kind: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """weight [out, in], as torch has it."""
        dtype = self.precision.weights[kind]
        matrix = self._put(Upload(self.precision.rounded(weight.t(), dtype), dtype))
        if bias is None:
            return Linear(matrix)
        bias_dtype = BF16 if dtype == BFP8 else dtype
        return Linear(matrix, self._put(Upload(bias[None, None, None], bias_dtype)))

    def _layer(self, kind: str, layer: nn.Linear) -> Linear:
        return self._linear(kind, layer.weight, layer.bias)

    def _norm(self, weight: Tensor) -> Handle:
        rounded = self.precision.rounded(weight[None, None, None], self.precision.norm)
        return self._put(Upload(rounded, self.precision.norm))

    def _ones(self, width: int) -> Handle:
        """A gate that lets a branch through."""
        return self._put(Upload(torch.ones(1, 1, 1, width), self.precision.residual))

    def _layer_norm(self, norm: nn.LayerNorm) -> Linear:
        return Linear(self._norm(norm.weight), self._norm(norm.bias))

    def _position(self, table: Tensor) -> Handle:
        """[1, 1, tiled patches, E]."""
        rows = pad_rows(table, tiled(len(table)))
        return self._put(Upload(rows[None, None], self.precision.pixels))

    def _tower(self, tower: SiglipTower) -> tuple[list[TtnnVisionBlock], Linear]:
        blocks = []
        modules: Any = tower.blocks
        for block in modules:
            d = block.q_proj.out_features // block.num_heads
            head, hidden = torch.arange(d), tiled(block.fc1.out_features)
            projections = (block.q_proj, block.k_proj, block.v_proj)
            qkv = torch.cat([pad_heads(p.weight, d, head) for p in projections])
            bias = torch.cat([pad_heads(p.bias[:, None], d, head)[:, 0] for p in projections])
            out = pad_heads(block.out_proj.weight.t(), d, head).t()
            packed = TtnnVisionBlock(
                norm1=self._layer_norm(block.norm1),
                qkv=self._linear("vision_in", qkv, bias),
                out=self._linear("vision_out", out, block.out_proj.bias),
                norm2=self._layer_norm(block.norm2),
                fc1=self._linear(
                    "vision_in",
                    pad_rows(block.fc1.weight, hidden),
                    pad_rows(block.fc1.bias[:, None], hidden)[:, 0],
                ),
                fc2=self._linear(
                    "vision_out", pad_columns(block.fc2.weight, hidden), block.fc2.bias
                ),
            )
            blocks.append(packed)
            free(block)
        return blocks, self._layer_norm(tower.norm)

    def _norms(self, trunk: GemmaTrunk) -> TrunkNorms:
        gate = self._ones(len(trunk.norm.weight))
        *norms, final = (
            RmsNorm(self._norm(1 + norm.weight.float()), gate) for norm in norms_of(trunk)
        )
        return TrunkNorms(pairs_of(norms), final)

    def _blocks(self, name: str, trunk: GemmaTrunk) -> list[TtnnGemmaBlock]:
        blocks = []
        modules: Any = trunk.blocks
        for block in modules:
            d, head = block.head_dim, padded_head(block.head_dim)
            weights = (block.q_proj.weight * d**-0.5, block.k_proj.weight, block.v_proj.weight)
            qkv = torch.cat([pad_heads(weight, d, head) for weight in weights])
            out = pad_heads(block.o_proj.weight.t(), d, head).t()
            gate_up = torch.cat([block.gate_proj.weight, block.up_proj.weight])
            packed = TtnnGemmaBlock(
                qkv=self._linear(f"{name}_in", qkv),
                out=self._linear(f"{name}_out", out),
                gate_up=self._linear(f"{name}_in", gate_up),
                down=self._linear(f"{name}_down", block.down_proj.weight),
            )
            blocks.append(packed)
            free(block)
        return blocks


def norms_of(trunk: GemmaTrunk) -> list[RMSNorm]:
    """Both of each block, then the final one."""
    modules: Any = trunk.blocks
    return [*(norm for block in modules for norm in (block.norm1, block.norm2)), trunk.norm]


def pairs_of(norms: list[RmsNorm]) -> list[tuple[RmsNorm, RmsNorm]]:
    return list(zip(norms[::2], norms[1::2], strict=True))


def host_linear(layer: nn.Linear) -> HostLinear:
    return layer.weight.detach(), layer.bias.detach()


def pad_heads(weight: Tensor, head_dim: int, places: Tensor) -> Tensor:
    """Rows [heads · head_dim, in] of heads, padded to [heads · tiled head_dim, in]."""
    heads = weight.view(-1, head_dim, weight.shape[1])
    padded = heads.new_zeros(len(heads), tiled(head_dim), weight.shape[1])
    padded[:, places] = heads
    return padded.flatten(0, 1)


def pad_rows(weight: Tensor, rows: int) -> Tensor:
    return nn.functional.pad(weight, (0, 0, 0, rows - len(weight)))


def pad_columns(weight: Tensor, columns: int) -> Tensor:
    return nn.functional.pad(weight, (0, columns - weight.shape[1]))


def free(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
