"""The prefix with gradients, and what its blocks computed either kept or computed again.

Gradient checkpointing (arXiv 1604.06174): only what goes from block to block is kept, and a block
runs again when its gradient is due. The prefix has 16 times the tokens of the suffix at full size,
so the expert's blocks are kept.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi0.inputs import ModelInputs
from pi0.model import Pi0, PrefixCache
from pi0.model.gemma import GemmaTrunk, TokenStream, run_layers
from pi0.model.pi0 import attention_mask, no_tap, token_blocks, token_positions

VLM = "vlm_transformer"


class _OneBlock:
    """A trunk of one block without a norm at its end, for `run_layers`."""

    def __init__(self, block: nn.Module) -> None:
        self.blocks = [block]
        self.norm = _NoNorm()


class _NoNorm:
    def modulate(self, condition: None) -> None:
        return None

    def __call__(self, x: Tensor, modulation: None) -> Tensor:
        return x


def recompute_vision(model: Pi0) -> None:
    """Makes the blocks of the vision tower recompute themselves from now on."""
    for block in model.vision_tower.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def prefill(model: Pi0, inputs: ModelInputs, recompute: bool) -> tuple[PrefixCache, list[Tensor]]:
    """As `Pi0.prefill`, and the output of each block of the VLM [B, X, E].

    Args:
        recompute: run each block of the VLM again in the backward pass.
    """
    outputs: list[Tensor] = []
    if not recompute:
        names = {f"{VLM}.block.{i}" for i in range(model.config.vlm.depth)}

        def tap(name: str, value: Tensor) -> Tensor:
            if name in names:
                outputs.append(value)
            return value

        return model.prefill(inputs, tap), outputs
    x, valid = model.embed_prefix(inputs, no_tap)
    mask = attention_mask(valid, token_blocks(valid.shape[1], 0, 0).to(valid.device))
    positions = token_positions(valid)
    layers = []
    for block in model.vlm.blocks:
        x, k, v = checkpoint(_run_block, block, x, positions, mask, use_reentrant=False)
        layers.append((k, v))
        outputs.append(x)
    return PrefixCache(layers, valid, inputs.state), outputs


def _run_block(
    block: nn.Module, x: Tensor, positions: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of one block of the VLM, its keys and its values."""
    trunk = cast(GemmaTrunk, _OneBlock(block))
    (out,), ((k, v),) = run_layers([TokenStream(VLM, trunk, x, positions)], mask, no_tap)
    return out, k, v
