"""Eight-bit matrices: native code computes what plain PyTorch does.

Products of integers are exact, so native and plain differ by rounding only: of a value, or of a
quantised one by one unit where its float lies on the border between two.
"""

from __future__ import annotations

import shutil
from copy import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import make_engine
from pi0.engines.fast.cpu import engine as cpu
from pi0.engines.fast.cpu import native
from pi0.engines.fast.cpu.int8 import Int8Kernels, Quantised
from pi0.engines.fast.cpu.native import Native, NativeUnavailable
from pi0.engines.fast.cpu.native_kernels import NativeKernels, is_packed
from pi0.engines.fast.kernels import Norm
from pi0.engines.fast.matrix import Matrix, quantise_rows
from pi0.errors import EngineError, Pi0Error
from pi0.inputs import random_inputs
from pi0.verify.compare import compare

try:
    NATIVE: Native | None = Native()
    WHY = ""
except NativeUnavailable as why:
    NATIVE, WHY = None, str(why)
needs_native = pytest.mark.skipif(NATIVE is None, reason=f"no native code: {WHY}")

CONFIG = PRESETS["tiny"]
ROWS = st.integers(1, 20)
BLOCKS = st.integers(1, 9)


def matrices(n: int, k: int, bias: bool = False, int8: bool = True) -> tuple[Matrix, Matrix]:
    """The same random matrix as plain kernels and as native ones want it."""
    return plain_and_packed(torch.randn(n, k), torch.randn(n) if bias else None, int8)


def plain_and_packed(
    values: Tensor, bias: Tensor | None = None, int8: bool = False
) -> tuple[Matrix, Matrix]:
    """Both of the same values: quantised by PyTorch, some would differ by a unit."""
    packed = native_kernels().lay_out(empty(*values.shape, int8))
    assert is_packed(packed)
    packed.bias = bias
    packed.write_rows(0, values)
    rows = packed.weight.transpose(1, 2).reshape(values.shape)
    return Matrix(rows, bias, packed.scale), packed


def empty(n: int, k: int, int8: bool) -> Matrix:
    if int8:
        return Matrix(torch.empty(n, k, dtype=torch.int8), scale=torch.empty(n))
    return Matrix(torch.empty(n, k))


def native_kernels() -> NativeKernels:
    assert NATIVE is not None
    return NativeKernels(NATIVE)


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-3))


@given(st.integers(1, 40), st.integers(1, 70), st.floats(1e-6, 1e6))
def test_quantised_rows_are_within_half_a_unit(rows: int, width: int, size: float) -> None:
    x = torch.randn(rows, width) * size
    values, scale = quantise_rows(x, torch.int8)
    assert values.abs().amax(dim=1).eq(127).all()
    error = (values * scale[:, None] - x).abs()
    assert (error <= 0.5001 * scale[:, None]).all()


def test_a_row_of_zeros() -> None:
    values, _ = quantise_rows(torch.zeros(2, 8), torch.int8)
    assert not values.any()


@needs_native
@given(BLOCKS, st.integers(1, 80), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_rows_come_in_any_pieces(n: int, k: int, stored: torch.dtype, data: st.DataObject) -> None:
    """Columns of longer rows, as those of a matrix that is split, in slabs of any height."""
    values = torch.randn(16 * n, 4 * k + 5).to(stored)[:, 3 : 4 * k + 3]
    values[0] = 0
    cuts = sorted(data.draw(st.sets(st.integers(1, 16 * n - 1), max_size=4)))
    for int8 in (False, True):
        _, packed = plain_and_packed(values * 2, int8=int8)
        for start, stop in pairwise([0, *cuts, 16 * n]):
            packed.write_rows(start, values[start:stop])
        found = native_kernels().plain(packed).weight
        if packed.scale is None:
            assert torch.equal(found, values.float())
            continue
        step = quantise_rows(values, torch.int8)[1]
        torch.testing.assert_close(packed.scale, step, rtol=3e-7, atol=0)
        assert ((found - values).abs() <= 0.5001 * step[:, None]).all()
        whole = (found / packed.scale[:, None]).round()
        assert whole.abs().amax(dim=1)[1:].eq(127).all()
        assert packed.offset is not None
        assert torch.equal(packed.offset, -128 * whole.sum(1).int())


@needs_native
@given(
    ROWS,
    BLOCKS,
    BLOCKS,
    st.booleans(),
    st.sampled_from(["product", "residual", "gate", "gate of each row"]),
    st.booleans(),
)
def test_products(rows: int, n: int, k: int, bias: bool, added: str, int8: bool) -> None:
    plain, packed = matrices(16 * n, 4 * k, bias, int8)
    x = torch.randn(rows, 4 * k)
    residual = None if added == "product" else torch.randn(rows, 16 * n)
    gates = {"gate": torch.randn(16 * n), "gate of each row": torch.randn(rows, 16 * n)}
    rest = residual, gates.get(added)
    mine = native_kernels().project(native_kernels().operand(x, packed), packed, *rest)
    if residual is not None:
        rest = residual.clone(), gates.get(added)
    assert same(mine, Int8Kernels().project(Int8Kernels().operand(x, plain), plain, *rest))


@needs_native
def test_a_chunk_that_is_not_packed_takes_the_operand_of_one_that_is() -> None:
    """Where bytes of activations have no sign, 128 is added to them for packed matrices alone."""
    kernels = native_kernels()
    odd = kernels.lay_out(empty(24, 64, int8=True))
    assert not is_packed(odd)
    odd.write_rows(0, torch.randn(24, 64))
    values, scale = quantise_rows(torch.randn(5, 64), torch.int8)
    expected = Int8Kernels().project(Quantised(values, scale), odd)
    kernels.native = copy(kernels.native)
    kernels.native.zero = 128
    unsigned = Quantised((values.short() + 128).to(torch.uint8), scale)
    assert torch.equal(kernels.project(unsigned, odd), expected)


@needs_native
@given(ROWS, BLOCKS, BLOCKS, st.booleans())
def test_hidden_units(rows: int, n: int, k: int, int8: bool) -> None:
    x = torch.randn(rows, 4 * k) * 3
    _, into = matrices(16, 32 * n)
    aside = Matrix(into.weight)  # a float32 matrix: the hidden units as they are
    for units, of in ((32 * n, "geglu"), (16 * n, "gelu")):
        plain, packed = matrices(units, 4 * k, of == "gelu", int8)
        a, b = native_kernels().operand(x, packed), Int8Kernels().operand(x, plain)
        mine = getattr(native_kernels(), of)(a, packed, aside)
        assert same(mine, getattr(Int8Kernels(), of)(b, plain, aside))


@needs_native
def test_gelu_far_out() -> None:
    """Where the exponential leaves float32."""
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4]])
    _, matrix = plain_and_packed(torch.eye(4).repeat(4, 1))
    out = native_kernels().gelu(x, matrix, Matrix(torch.empty(1, 16)))
    assert same(out[:, :4], torch.tensor([[0.0, 0.0, 100.0, 1e4]]))


@needs_native
@given(ROWS, st.integers(1, 70))
def test_norms(rows: int, width: int) -> None:
    _, into = matrices(16, 16)
    into = Matrix(into.weight, None, into.scale, into.offset)
    x, weight, bias = torch.randn(rows, width) * 5, torch.randn(width), torch.randn(width)
    calls = [("rms_norm", (Norm(weight),)), ("rms_norm", (Norm(weight, bias),))]
    for name, arguments in [*calls, ("layer_norm", (weight, bias))]:
        mine = getattr(native_kernels(), name)(x, *arguments, into)
        plain = getattr(Int8Kernels(), name)(x, *arguments, into)
        values = mine.values.int() - native_kernels().native.zero
        assert (values - plain.values.int()).abs().max() <= 1
        assert torch.allclose(mine.scale, plain.scale, rtol=1e-5)


@needs_native
@given(st.integers(1, 3), ROWS, st.integers(1, 4), st.integers(1, 30), st.booleans())
def test_attention(batch: int, t: int, heads: int, s: int, masked: bool) -> None:
    q, k, v = (torch.randn(batch, n, h, 16) for n, h in ((t, heads), (s, 1), (s, 1)))
    valid = torch.rand(batch, s) < 0.5 if masked else None
    if valid is not None:
        valid[:, 0] = True
    assert same(native_kernels().attend(q, k, v, valid), Int8Kernels().attend(q, k, v, valid))
    if valid is not None:  # what is masked has no effect at all
        other = k + 1e3 * ~valid[:, :, None, None]
        a, b = (native_kernels().attend(q, keys, v, valid) for keys in (k, other))
        assert torch.equal(a, b)


@needs_native
@given(st.integers(1, 3), ROWS, st.integers(0, 4), st.integers(1, 2))
def test_split(batch: int, t: int, heads: int, kv: int) -> None:
    qkv = torch.randn(batch, t, (heads + 2 * kv) * 16)
    rotation = torch.randn(batch, t + 3, 1, 8)[:, 3:], torch.randn(batch, t, 1, 8)
    places = [torch.zeros(2, batch, t + 2, kv, 16) for _ in range(2)]
    queries = [
        kernels.split(qkv, rotation, place[0][:, 2:], place[1][:, 2:])
        for kernels, place in zip((native_kernels(), Int8Kernels()), places, strict=True)
    ]
    assert torch.allclose(*queries, atol=1e-5)
    assert torch.allclose(*places, atol=1e-5)
    assert not places[0][:, :, :2].any()


def test_actions_are_close(each_path: Path) -> None:
    """Limits of `pi0 verify`; tiny layers average less rounding away than real ones."""
    checkpoint = open_checkpoint(each_path)
    inputs, noise = random_inputs(CONFIG, 2, 6, 0)
    exact, close = (
        make_engine(f"cpu:{dtype}", checkpoint).sample(inputs, noise)
        for dtype in ("float32", "int8")
    )
    found = compare(exact, close)
    assert found.fault is None
    assert found.pcc > 0.999
    assert 1e-5 < found.rel_l2 < 0.03


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_damaged_weights_are_refused(tiny_path: Path, tmp_path: Path, dtype: str) -> None:
    """Quantised, a NaN would pass for a number."""
    shutil.copytree(tiny_path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tiny_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    inputs, noise = random_inputs(CONFIG, 2, 6, 0)
    with pytest.raises(Pi0Error, match="expected finite"):
        make_engine(f"cpu:{dtype}", open_checkpoint(tmp_path)).sample(inputs, noise)


def test_without_a_compiler(each_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower, with a warning, and within rounding of the same actions."""
    checkpoint = open_checkpoint(each_path)
    inputs, noise = random_inputs(CONFIG, 2, 6, 0)
    expected = make_engine("cpu:int8", checkpoint).sample(inputs, noise)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"engine cpu: slower than it could be: .+\."):
        plain = make_engine("cpu:int8", checkpoint)
    assert isinstance(plain.network.kernels, Int8Kernels)  # type: ignore[attr-defined]
    assert not isinstance(plain.network.kernels, NativeKernels)  # type: ignore[attr-defined]
    found = compare(expected, plain.sample(inputs, noise))
    assert found.rel_l2 < 0.01


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "--no-such-flag"))
    monkeypatch.setattr(native, "_processor", lambda: "avx2 fma")
    with pytest.warns(UserWarning, match="failed"):
        cpu.choose_kernels()
    assert not list(tmp_path.rglob("native-*"))


def test_bfloat16_only_where_it_is_faster(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_path)
    seconds = {torch.bfloat16: 3.0, torch.float32: 1.0}
    monkeypatch.setattr(cpu, "product_seconds", seconds.__getitem__)
    with pytest.raises(EngineError, match="found this one 3.0 times as slow"):
        make_engine("cpu:bfloat16", checkpoint)
    seconds[torch.bfloat16] = 0.5
    inputs, noise = random_inputs(CONFIG, 2, 6, 0)
    rough = make_engine("cpu:bfloat16", checkpoint).sample(inputs, noise)
    found = compare(make_engine("cpu:float32", checkpoint).sample(inputs, noise), rough)
    assert 1e-5 < found.rel_l2 < 0.03  # verify's limit
