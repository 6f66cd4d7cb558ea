"""What a core's matrix engine (FPU) makes of its operands, on torch tensors in float32.

- **Registers.** An operand has at most the 10 explicit bits of mantissa of Tf32; what float32 has
  beyond them is cut off (tt-llk, tests/python_tests/helpers/golden_generators.py, `_fp32_to_tf32`;
  chlkc_descriptors.h of a dry run: `unpack_src_format` 0, Float32, becomes `unpack_dst_format` 4).
- **Fidelity.** A product is made in up to four passes over parts of the mantissas: of the first
  register (SrcA) 5 bits with the leading one, then the next 5; of the second (SrcB) 7 bits, then
  the last 4. LoFi makes the first pass; HiFi2 adds the rest of SrcA, HiFi3 the rest of SrcB, HiFi4
  the product of both rests (the same file, `FidelityMasking`). A matrix product has its first
  operand in SrcB and its second in SrcA (tt-llk, llk_math_matmul.h).
- **Sums** are float32, or bfloat16 after every tile of 32 of the inner dimension.

tt-llk is in the wheel of TTNN 0.81.1, at ttnn/tt_metal/tt-llk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MANTISSA = 23  # explicit bits of float32
TF32 = 10
SRC_A, SRC_A_HIGH = 9, 4  # explicit bits of which the passes make use, and of the first pass
SRC_B_HIGH = 6
TILE = 32


@dataclass(frozen=True)
class Silicon:
    """What of a card is followed.

    Attributes:
        registers: operands in Tf32.
        fidelity: products in the passes of a fidelity.
        sums: sums in bfloat16 where they are so configured.
        buffers: what lies between the steps of one operation in the format that it has there.
        rounding: results in the dtype that they have on a card.
    """

    registers: bool = True
    fidelity: bool = True
    sums: bool = True
    buffers: bool = True
    rounding: bool = True


CARD = Silicon()
IDEAL = Silicon(registers=False, fidelity=False, sums=False, buffers=False, rounding=False)


@dataclass(frozen=True)
class Fpu:
    """The matrix engine as one operation has configured it.

    Attributes:
        passes: of a product: 1 (LoFi) to 4 (HiFi4).
        float32_sums: sums in float32 rather than bfloat16.
    """

    silicon: Silicon = CARD
    passes: int = 4
    float32_sums: bool = True

    def operand(self, x: Tensor) -> Tensor:
        """x as it is in a register."""
        return cut(x, TF32) if self.silicon.registers else x.float()

    def matmul(self, x: Tensor, w: Tensor) -> Tensor:
        """[..., M, K] · [..., K, N]."""
        return self._passes(w, x, lambda a, b: self._sums(b, a))

    def times(self, x: Tensor, y: Tensor) -> Tensor:
        """Product of elements; x is in SrcA."""
        return self._passes(x, y, torch.mul)

    def _passes(self, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        a, b = self.operand(a), self.operand(b)
        if not self.silicon.fidelity:
            return product(a, b)
        a, a_high, b_high = cut(a, SRC_A), cut(a, SRC_A_HIGH), cut(b, SRC_B_HIGH)
        if self.passes == 4:
            return product(a, b)
        if self.passes == 3:
            return product(a, b_high) + product(a_high, b - b_high)
        return product(a if self.passes == 2 else a_high, b_high)

    def _sums(self, x: Tensor, w: Tensor) -> Tensor:
        if self.float32_sums or not self.silicon.sums:
            return x @ w
        total = torch.zeros(())
        for start in range(0, x.shape[-1], TILE):
            part = slice(start, start + TILE)
            total = (total + x[..., part] @ w[..., part, :]).bfloat16().float()
        return total


def cut(x: Tensor, bits: int) -> Tensor:
    """x cut to a number of explicit bits of mantissa; float32."""
    kept = -1 << (MANTISSA - bits)
    return (x.float().contiguous().view(torch.int32) & kept).view(torch.float32)


def nearest(x: Tensor, bits: int) -> Tensor:
    """x rounded to a number of explicit bits of mantissa, halves to even; float32."""
    dropped = MANTISSA - bits
    if not dropped:
        return x.float()
    whole = x.float().contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((whole >> dropped) & 1)
    return ((whole + half) & (-1 << dropped)).view(torch.float32)
