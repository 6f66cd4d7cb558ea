"""Which dtype and math fidelity every kind of tensor and operation has: one table a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from pi0.engines.tenstorrent.silicon import MANTISSA, SRC_A, nearest

BF16, BFP8, F32 = "bfloat16", "bfloat8_b", "float32"  # TTNN's names
U32, I32 = "uint32", "int32"

# Of each tower: the matrices that read the normed stream, and those that add to it, of which the
# trunks' MLPs have the second one by itself.
MATRICES = (
    "patch",
    "vision_in",
    "vision_out",
    "projector",
    "vlm_in",
    "vlm_out",
    "vlm_down",
    "expert_in",
    "expert_out",
    "expert_down",
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
        residual: of the residual streams.
        heads: of queries, keys and values, and of what is not named here.
        hidden: of the inside of the MLPs.
        rope: of the tables of sine and cosine.
        linear, attention, rest: math fidelity of the towers' matrices, of attention, and of norms
            and action layers (HiFi4 multiplies with all mantissa bits; see `silicon.py`).
        float32_sums: whether sums are kept in float32 rather than bfloat16.
        loaded: what the checkpoint is read as before it is packed.
        mantissa: explicit bits to which weights in float32 are rounded, since the matrix engine
            would cut them off.
    """

    weights: Mapping[str, str]
    embedding: str
    norm: str
    pixels: str
    residual: str
    heads: str
    hidden: str
    rope: str
    linear: str
    attention: str
    rest: str
    float32_sums: bool
    loaded: str = BF16
    mantissa: int = SRC_A

    def rounded(self, weight: Tensor, dtype: str) -> Tensor:
        """A weight that the matrix engine takes as it is, if it is uploaded in this dtype."""
        return nearest(weight, self.mantissa) if dtype == F32 else weight


# Of a card and of the host.
PRESETS = {
    "accurate": Precision(
        weights={**dict.fromkeys(MATRICES, BF16), "patch": F32, "action": F32},
        embedding=BF16,
        norm=F32,
        pixels=F32,
        residual=F32,
        heads=BF16,
        hidden=BF16,
        rope=BF16,
        linear="HiFi4",
        attention="HiFi4",
        rest="HiFi4",
        float32_sums=True,
    ),
    "fast": Precision(
        # A program that multiplies and adds to the residual stream takes one dtype for both. Two
        # programs also write and read the branch, which is hardly less, but for the VLM's MLP: its
        # second matrix is much larger than its branch.
        weights={
            **dict.fromkeys(MATRICES, BF16),
            **dict.fromkeys(("vision_in", "projector", "vlm_in", "vlm_down", "expert_in"), BFP8),
            "action": F32,
        },
        embedding=BF16,
        norm=BF16,
        pixels=BF16,
        residual=BF16,
        heads=BF16,
        hidden=BFP8,
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
    heads=F32,
    hidden=F32,
    rope=F32,
    linear="HiFi4",
    attention="HiFi4",
    rest="HiFi4",
    float32_sums=True,
    loaded=F32,
    mantissa=MANTISSA,
)
HOST_PRESETS = {**PRESETS, "exact": EXACT}


def for_arch(precision: Precision, arch: str) -> Precision:
    """The preset as an architecture can have it: "WORMHOLE_B0" or "BLACKHOLE".

    Wormhole multiplies wrongly now and then with HiFi4 where sums are float32, off by powers of two
    (tt-metal issue 38306; none seen with HiFi3: pull request 52327). TTNN's own defaults there are
    HiFi3, too (pull request 40089).
    """
    if arch != "WORMHOLE_B0" or not precision.float32_sums:
        return precision

    def sound(fidelity: str) -> str:
        return "HiFi3" if fidelity == "HiFi4" else fidelity

    return replace(
        precision,
        linear=sound(precision.linear),
        attention=sound(precision.attention),
        rest=sound(precision.rest),
    )
