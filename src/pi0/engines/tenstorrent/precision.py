"""Which dtype and math fidelity every kind of tensor and operation has: one table a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BF16, BFP8, F32, U32 = "bfloat16", "bfloat8_b", "float32", "uint32"  # TTNN's names

MATRICES = (
    "patch",
    "vision_attention",
    "vision_mlp",
    "projector",
    "vlm_attention",
    "vlm_mlp",
    "expert_attention",
    "expert_mlp",
    "action",  # state, actions and time in; velocity out
)


@dataclass(frozen=True)
class Precision:
    """A precision preset.

    Attributes:
        weights: dtype of each kind of matrix. Its bias has the kind's dtype or, where that is a
            block format, bfloat16.
        embedding: of the token table, whose rows are looked up: no block format.
        norm: of the weights of the norms.
        pixels: of images and patches until their position is added.
        residual: of the residual stream and everything else that is not named here.
        hidden: of the inside of the MLPs.
        cache: of keys and values.
        rope: of the tables of sine and cosine.
        linear, attention, rest: math fidelity (HiFi4 multiplies with all mantissa bits, HiFi2 drops
            the low ones of one operand).
        float32_sums: whether sums are kept in float32 rather than bfloat16.
        loaded: what the checkpoint is read as before it is packed.
    """

    weights: Mapping[str, str]
    embedding: str
    norm: str
    pixels: str
    residual: str
    hidden: str
    cache: str
    rope: str
    linear: str
    attention: str
    rest: str
    float32_sums: bool
    loaded: str = BF16


# Of a card and of the host.
PRESETS = {
    "accurate": Precision(
        weights={**dict.fromkeys(MATRICES, BF16), "patch": F32, "action": F32},
        embedding=BF16,
        norm=F32,
        pixels=F32,
        residual=BF16,
        hidden=BF16,
        cache=BF16,
        rope=BF16,
        linear="HiFi4",
        attention="HiFi4",
        rest="HiFi4",
        float32_sums=True,
    ),
    "fast": Precision(
        weights={**dict.fromkeys(MATRICES, BFP8), "patch": BF16, "action": BF16},
        embedding=BF16,
        norm=BF16,
        pixels=BF16,
        residual=BF16,
        hidden=BFP8,
        cache=BFP8,
        rope=BF16,
        linear="HiFi2",
        attention="HiFi2",
        rest="HiFi4",
        float32_sums=True,
    ),
}

# Of the host alone, where nothing is rounded: the network as it stands on a card, in float32, so
# that a mistake in it is not hidden behind rounding.
EXACT = Precision(
    weights=dict.fromkeys(MATRICES, F32),
    embedding=F32,
    norm=F32,
    pixels=F32,
    residual=F32,
    hidden=F32,
    cache=F32,
    rope=F32,
    linear="HiFi4",
    attention="HiFi4",
    rest="HiFi4",
    float32_sums=True,
    loaded=F32,
)
HOST_PRESETS = {**PRESETS, "exact": EXACT}
