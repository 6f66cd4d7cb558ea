"""The matrix engine on the host, against integer arithmetic with tt-llk's masks."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pi0.engines.tenstorrent.silicon import CARD, IDEAL, TF32, Fpu, cut, nearest

# Of tt-llk, golden_generators.py: which of 11 bits, the leading one included, each pass takes of
# the operand in SrcA and of that in SrcB.
MASKS = (
    (0b11111000000, 0b11111110000),
    (0b00000111110, 0b11111110000),
    (0b11111000000, 0b00000001111),
    (0b00000111110, 0b00000001111),
)
numbers = st.floats(2.0**-30, 2.0**30, width=32).flatmap(lambda x: st.sampled_from([x, -x]))


def by_masks(x: float, y: float, passes: int) -> float:
    """x in SrcA, y in SrcB, both cut to Tf32; exact."""
    parts = []
    for value in (x, y):
        fraction, exponent = math.frexp(abs(value))  # fraction in [0.5, 1)
        whole = math.floor(fraction * 2**11)
        parts.append((math.copysign(1, value), whole, exponent - 11))
    (sign_a, a, exponent_a), (sign_b, b, exponent_b) = parts
    total = sum((a & mask_a) * (b & mask_b) for mask_a, mask_b in MASKS[:passes])
    return sign_a * sign_b * math.ldexp(total, exponent_a + exponent_b)


@given(numbers, numbers, st.integers(1, 4))
def test_passes_of_a_product(x: float, y: float, passes: int) -> None:
    fpu = Fpu(passes=passes)
    a, b = torch.tensor([x]), torch.tensor([y])
    wanted = by_masks(x, y, passes)
    assert fpu.times(a, b).item() == wanted
    assert fpu.matmul(b[None], a[None]).item() == wanted, "the second operand is in SrcA"


@given(numbers, st.integers(1, 23))
def test_cut(x: float, bits: int) -> None:
    value = torch.tensor([x])
    kept = cut(value, bits)
    assert 0 <= 1 - (kept / value).item() < 2.0**-bits
    assert torch.equal(cut(kept, bits), kept)
    assert math.frexp(kept.item())[0] * 2 ** (bits + 1) % 1 == 0


@given(numbers, st.integers(1, 23))
def test_nearest(x: float, bits: int) -> None:
    value = torch.tensor([x])
    below = cut(value, bits)
    rounded = nearest(value, bits)
    assert torch.equal(cut(rounded, bits), rounded)
    assert (rounded - value).abs() <= (below - value).abs()
    assert abs((rounded / value).item() - 1) <= 2.0 ** -(bits + 1)
    assert torch.equal(nearest(value, 7), value.bfloat16().float()), "as torch rounds bfloat16"


def test_what_is_not_finite_stays_so() -> None:
    value = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert not cut(value, TF32).isfinite().any()
    for passes in (1, 2, 3, 4):
        assert not Fpu(passes=passes).times(value, torch.ones(3)).isfinite().any()


def test_bfloat16_is_exact_in_four_passes() -> None:
    x, w = torch.randn(5, 64).bfloat16().float(), torch.randn(64, 7).bfloat16().float()
    assert torch.equal(Fpu(passes=4).matmul(x, w), x @ w)
    errors = [
        ((Fpu(passes=passes).matmul(x, w) - x @ w).norm() / (x @ w).norm()).item()
        for passes in (1, 2, 3)
    ]
    assert errors[0] > 3 * errors[1] > 30 * errors[2] > 0, "each pass adds what it is there for"
    # HiFi2 cuts an activation to 7 bits: by at most 2^-6, by 2^-8 on average.
    assert 2.0**-10 < errors[1] < 2.0**-7


def test_sums() -> None:
    """A bfloat16 sum of 256 does not feel another 0.5."""
    x, w = torch.ones(1, 4096), torch.full((4096, 1), 2.0**-6)
    x[0, 0] = 2.0**14
    assert Fpu().matmul(x, w).item() == 256 + 4095 / 64
    assert Fpu(float32_sums=False).matmul(x, w).item() == 256
    switched_off = replace(CARD, sums=False)
    assert Fpu(switched_off, float32_sums=False).matmul(x, w).item() == 256 + 4095 / 64


@pytest.mark.parametrize("habit", [field.name for field in fields(CARD)])
def test_habits_are_switched_one_by_one(habit: str) -> None:
    assert getattr(CARD, habit)
    assert not getattr(IDEAL, habit)


def test_switches() -> None:
    x, y = torch.full((2,), 1 + 2.0**-20), torch.full((2,), 1 + 2.0**-10)
    assert torch.equal(Fpu(IDEAL, 1, False).times(x, y), x * y)
    registers = replace(IDEAL, registers=True)
    assert torch.equal(Fpu(registers, 1).times(x, y), y), "x becomes 1 in Tf32"
    assert torch.equal(Fpu(registers, 1).operand(x), torch.ones(2))
    fidelity = replace(IDEAL, fidelity=True)
    assert torch.equal(Fpu(fidelity, 1).times(y, y), torch.ones(2)), "one pass"
