"""Triton kernels beside the plain ones, on a CUDA device or else in Triton's interpreter.

The interpreter is chosen by an environment variable that Triton reads when it is imported, so the
tests run in a process of their own: this file, called by itself (`test_in_the_interpreter`).

The interpreter accepts what the compiler does not (test_triton_compiles.py). And it rounds to
bfloat16 by cutting off, and to e4m3 wrongly where a carry reaches the exponent: bfloat16 may be a
whole unit in the last place off, and quantised rows are looked at before their last rounding.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.engines.fast.cuda.fp8 import Fp8Kernels
from pi0.engines.fast.cuda.graph import Call, Graph
from pi0.engines.fast.kernels import Norm
from pi0.engines.fast.matrix import Matrix
from pi0.engines.fast.network import Network, make_rotation, slice_rotation
from pi0.engines.fast.plan import make_token_plan
from pi0.engines.fast.weights import Scheme, pack
from pi0.verify.cases import default_cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]
DEVICE = "cpu" if INTERPRETED else "cuda"

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

# 1 / (1 + exp(-u)) far below zero is 1 / inf, the 0 that is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

here = pytest.mark.usefixtures("device")
few = settings(max_examples=12 if INTERPRETED else 50)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
widths = st.integers(1, 150)
rows = st.integers(1, 4)
seeds = st.integers(0, 2**31)
MANY = 2**31
PRODUCTS = torch.float32 if INTERPRETED else torch.bfloat16
PLAIN = Fp8Kernels()


@pytest.fixture(scope="module")
def device() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device; test_in_the_interpreter runs them")


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def kernels():  # type: ignore[no-untyped-def]
    from pi0.engines.fast.cuda.triton_kernels import TritonKernels

    return TritonKernels()


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def plain(n: int, k: int, dtype: torch.dtype, seed: int = 0, bias: bool = False) -> Matrix:
    return Matrix(
        random(seed, n, k, dtype=dtype, scale=k**-0.5),
        random(seed, n, dtype=dtype) if bias else None,
    )


def quantised(n: int, k: int) -> Matrix:
    return Matrix(torch.empty(n, k, device=DEVICE), scale=torch.ones(n, device=DEVICE))


def expect(found: Tensor, wanted: Tensor, roundings: int = 2) -> None:
    """float32 differs in the order of sums; bfloat16 in roundings, of up to 2^-7 each."""
    relative = 1e-5 if wanted.dtype == torch.float32 else roundings * 2**-7
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    size = wanted.float().abs()
    error = (found.float() - wanted.float()).abs()
    assert (error <= relative * (size + size.mean())).all(), float((error / (size + 1e-9)).max())


def expect_product(found: Tensor, wanted: Tensor) -> None:
    """Both sum in float32, and round at other places."""
    if wanted.dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    else:
        expect(found, wanted, roundings=4)


def expect_rows(found: Tensor, scale: Tensor, wanted: Tensor) -> None:
    """Rows before their last rounding, whose largest magnitude is e4m3's."""
    assert scale.shape == (len(wanted), 1)
    largest = found.abs().amax(1)
    torch.testing.assert_close(largest, torch.full_like(largest, 448))
    expect((found * scale).to(wanted.dtype), wanted, roundings=3)


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in kernels although they are float32: the interpreter multiplies no bfloat16."""
    from pi0.engines.fast.cuda import triton_attention, triton_products

    monkeypatch.setattr(triton_attention, "MATRIX_DTYPES", {torch.float32, torch.bfloat16})
    if INTERPRETED:  # a device has no room for tiles of products in float32
        monkeypatch.setattr(triton_products, "MATRIX_DTYPES", {torch.float32, torch.bfloat16})


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of few rows are PyTorch's, too, so that kernels for what follows them run."""
    from pi0.engines.fast.cuda import triton_products

    monkeypatch.setattr(triton_products, "MOST_ROWS", 0)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from pi0.engines.fast.cuda import triton_kernels

    monkeypatch.setattr(triton_kernels, "FP8", torch.float32)


@here
@few
@given(rows=rows, width=widths, dtype=dtypes, seed=seeds)
def test_norms(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, into = random(seed, rows, width, dtype=dtype, scale=3), plain(4, width, dtype)
    weight, bias = random(seed + 1, width), random(seed + 2, width)
    for norm in (Norm(weight), Norm(weight, bias)):
        expect(kernels().rms_norm(x, norm, into), PLAIN.rms_norm(x, norm, into))
    if width > 1:  # of one value a layer norm leaves only the rounding of 0
        found = kernels().layer_norm(x, weight, bias, into)
        expect(found, PLAIN.layer_norm(x, weight, bias, into))


@here
def test_transposed_rows() -> None:
    """As the patches of one view come."""
    x, into, weight = random(0, 20, 7).t(), plain(4, 20, torch.float32), random(1, 20)
    expect(kernels().rms_norm(x, Norm(weight), into), PLAIN.rms_norm(x, Norm(weight), into))
    found = kernels().layer_norm(x, weight, weight, into)
    expect(found, PLAIN.layer_norm(x, weight, weight, into))


@here
@few
@given(rows=rows, width=widths, dtype=dtypes, seed=seeds)
@pytest.mark.usefixtures("few_are_many")
def test_hidden_units(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    a, into = random(seed, rows, 24, dtype=dtype, scale=2), plain(4, width, dtype)
    gate_up, first = plain(2 * width, 24, dtype, seed), plain(width, 24, dtype, seed, bias=True)
    expect(kernels().geglu(a, gate_up, into), PLAIN.geglu(a, gate_up, into), roundings=3)
    expect(kernels().gelu(a, first, into), PLAIN.gelu(a, first, into), roundings=3)


@here
@pytest.mark.usefixtures("few_are_many")
def test_columns_are_several_programs() -> None:
    a, into = random(0, 2, 8), plain(4, 2500, torch.float32)
    gate_up = plain(5000, 8, torch.float32)
    expect(kernels().geglu(a, gate_up, into), PLAIN.geglu(a, gate_up, into))


@here
def test_gelu_far_from_zero() -> None:
    """Neither end overflows."""
    a = torch.tensor([[-1e4], [-30.0], [0.0], [30.0], [1e4]], device=DEVICE)
    first = Matrix(torch.ones(1, 1, device=DEVICE))
    expect(kernels().gelu(a, first, first), PLAIN.gelu(a, first, first))


@here
@few
@given(rows=rows, width=st.integers(16, 150), dtype=dtypes, seed=seeds)
@pytest.mark.usefixtures("unrounded")
def test_quantised_rows(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, into = random(seed, rows, width, dtype=dtype, scale=5), quantised(16, width)
    weight, bias = random(seed + 1, width), random(seed + 2, width)
    unquantised = plain(4, width, dtype)
    expect_rows(*kernels().operand(x, into), x)
    for norm in (Norm(weight), Norm(weight, bias)):
        expect_rows(*kernels().rms_norm(x, norm, into), PLAIN.rms_norm(x, norm, unquantised))
    gate_up = plain(2 * width, width, dtype, seed)
    expect_rows(*kernels().geglu(x, gate_up, into), PLAIN.geglu(x, gate_up, unquantised))
    if width > 1:
        found = kernels().layer_norm(x, weight, bias, into)
        expect_rows(*found, PLAIN.layer_norm(x, weight, bias, unquantised))


@here
@pytest.mark.usefixtures("unrounded")
def test_rows_of_zeros_and_with_nan() -> None:
    """Zeros stay zeros; what is damaged is not made to look sound."""
    x = torch.zeros(2, 16, device=DEVICE)
    x[1, 3:5] = torch.tensor([torch.nan, 2.0])
    values, scale = kernels().operand(x, quantised(16, 16))
    assert (values[0] * scale[0] == 0).all()
    assert values[1, 3].isnan()


@here
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("unrounded")
@pytest.mark.usefixtures("few_are_many")
def test_rows_with_a_damaged_value(value: float) -> None:
    """What is not finite is not finite afterwards, quantised or not; other rows are as before."""
    x, ones = random(0, 3, 32), torch.ones(32, device=DEVICE)
    x[1, 5] = value
    gate_up = Matrix(torch.eye(32, device=DEVICE).repeat(2, 1))
    for into in (plain(4, 32, torch.float32), quantised(4, 32)):
        for result in (
            kernels().operand(x, into),
            kernels().rms_norm(x, Norm(ones), into),
            kernels().rms_norm(x, Norm(ones, ones), into),
            kernels().layer_norm(x, ones, ones, into),
            kernels().gelu(x, Matrix(gate_up.weight[:32]), into),
            kernels().geglu(x, gate_up, into),
        ):
            values = result if into.scale is None else result.values * result.scale
            assert (~values.isfinite()).any(dim=1).tolist() == [False, True, False]


@here
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("damaged", [0, 1, 2], ids=["queries", "keys", "values"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_attention_to_a_damaged_value(value: float, damaged: int) -> None:
    """In two shares; a query sees minus infinity and plus infinity alike, as keys of both signs."""
    q, k, v = (random(i, 1, n, 1, 16) for i, n in ((0, 2), (1, 200), (2, 200)))
    valid = torch.ones(1, 200, dtype=torch.bool, device=DEVICE)
    (q, k, v)[damaged][:, :, 0, 3] = value
    assert not kernels().attend(q, k, v, valid).isfinite().all(dim=1).any()


@here
@few
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 5),
    q_heads=st.integers(0, 9),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 20),
    dtype=dtypes,
)
def test_split(
    batch: int, tokens: int, q_heads: int, kv_heads: int, half: int, dtype: torch.dtype
) -> None:
    """Into a part of a buffer; what lies around it stays. The rotation is a part, too."""
    qkv = random(tokens, batch, tokens, (q_heads + 2 * kv_heads) * 2 * half, dtype=dtype)
    positions = torch.arange(3, tokens + 6, device=DEVICE).expand(batch, -1)
    rotation = slice_rotation(make_rotation(positions, 2 * half), slice(2, 2 + tokens))
    results = []
    for these in (kernels(), PLAIN):
        k, v = torch.zeros(2, batch, tokens + 3, kv_heads, 2 * half, dtype=dtype, device=DEVICE)
        q = these.split(qkv, rotation, k[:, 1:-2], v[:, 1:-2])
        results.append((q, k, v))
    for found, wanted in zip(*results, strict=True):
        if found.numel():
            expect(found, wanted)
    (_, _, found), (_, _, wanted) = results
    assert torch.equal(found, wanted)


@here
@few
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 9),
    keys=st.integers(1, 300),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 2),
    width=st.integers(1, 40),
    few=st.booleans(),
    masked=st.booleans(),
    seed=seeds,
)
def test_attention(
    batch: int,
    queries: int,
    keys: int,
    group: int,
    kv_heads: int,
    width: int,
    few: bool,
    masked: bool,
    seed: int,
) -> None:
    """Both tiles. Masked keys may hold anything."""
    from pi0.engines.fast.cuda import triton_attention

    q = random(seed, batch, queries + 1, kv_heads * group, width)[:, 1:]
    k, v = (random(seed + i, batch, keys, kv_heads, width) for i in (1, 2))
    valid = None
    if masked:
        valid = random(seed + 3, batch, keys) > 0
        valid[:, -1] = True
    wanted = PLAIN.attend(q.contiguous(), k, v, valid)
    if valid is not None:
        k[~valid], v[~valid] = 1e4, -1e4
    with patch.object(triton_attention, "MOST_QUERIES", MANY if few else 0):
        if few or masked:  # else PyTorch's
            found = kernels().attend(q, k, v, valid)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@here
def test_attention_that_sees_one_share_only() -> None:
    """All other shares are masked whole."""
    q, k, v = random(0, 1, 2, 4, 16), random(1, 1, 400, 1, 16), random(2, 1, 400, 1, 16)
    valid = torch.zeros(1, 400, dtype=torch.bool, device=DEVICE)
    valid[:, 150:160] = True
    found, wanted = (these.attend(q, k, v, valid) for these in (kernels(), PLAIN))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@here
@few
@given(
    width=widths,
    dtype=dtypes,
    biased=st.booleans(),
    gates=st.sampled_from([None, (), (3,)]),
    seed=seeds,
)
@pytest.mark.usefixtures("few_are_many")
def test_residuals(
    width: int, dtype: torch.dtype, biased: bool, gates: tuple[int, ...] | None, seed: int
) -> None:
    """Without a gate, with one for all rows, and with one for each."""
    a, matrix = random(seed, 3, 20, dtype=dtype), plain(width, 20, dtype, seed, biased)
    residual = random(seed + 1, 3, width, dtype=dtype)
    gate = None if gates is None else random(seed + 2, *gates, width)
    wanted = PLAIN.project(a, matrix, residual.clone(), gate)
    expect(kernels().project(a, matrix, residual, gate), wanted, roundings=3)


@here
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("damaged", [0, 1, 2], ids=["residual", "product", "gate"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("few_are_many")
def test_gated_residual_with_a_damaged_value(value: float, damaged: int) -> None:
    residual, a, gate = random(0, 2, 16), random(1, 2, 16), random(2, 16)
    (residual[0], a[0], gate)[damaged][3] = value
    matrix = Matrix(torch.eye(16, device=DEVICE))
    assert not kernels().project(a, matrix, residual, gate)[0, 3].isfinite()


@here
@few
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 40),
    width=st.integers(1, 150),
    q_heads=st.integers(0, 3),
    kv_heads=st.integers(1, 2),
    half=st.integers(1, 20),
    seed=seeds,
)
def test_products_that_are_heads(
    batch: int, tokens: int, width: int, q_heads: int, kv_heads: int, half: int, seed: int
) -> None:
    """Rotated and put where they belong, into a part of a buffer; what lies around it stays."""
    a = random(seed, batch * tokens, width, dtype=PRODUCTS)
    matrix = plain((q_heads + 2 * kv_heads) * 2 * half, width, PRODUCTS, seed)
    positions = torch.arange(3, tokens + 6, device=DEVICE).expand(batch, -1)
    rotation = slice_rotation(make_rotation(positions, 2 * half), slice(2, 2 + tokens))
    results = []
    for these in (kernels(), PLAIN):
        shape = (2, batch, tokens + 3, kv_heads, 2 * half)
        k, v = torch.zeros(shape, dtype=PRODUCTS, device=DEVICE)
        q = these.project_heads(a, matrix, rotation, k[:, 1:-2], v[:, 1:-2])
        results.append((q, k, v))
    for found, wanted in zip(*results, strict=True):
        if found.numel():
            expect_product(found, wanted)


@here
@few
@given(
    rows=st.integers(1, 70),
    inner=st.one_of(st.integers(1, 600), st.just(1024)),
    outputs=st.integers(1, 70),
    gated=st.booleans(),
    seed=seeds,
)
def test_products_and_what_follows(
    rows: int, inner: int, outputs: int, gated: bool, seed: int
) -> None:
    """GEGLU, and residuals with and without a gate: added in the same order every time."""
    a, into = random(seed, rows, inner, dtype=PRODUCTS), plain(4, outputs, PRODUCTS)
    gate_up = plain(2 * outputs, inner, PRODUCTS, seed + 1)
    found, wanted = (these.geglu(a, gate_up, into) for these in (kernels(), PLAIN))
    expect_product(found, wanted)
    matrix = plain(outputs, inner, PRODUCTS, seed)
    residual = random(seed + 2, rows, outputs, dtype=PRODUCTS)
    gate = random(seed + 3, outputs) if gated else None
    ours = kernels()
    first, second = (ours.project(a, matrix, residual.clone(), gate) for _ in range(2))
    assert torch.equal(first, second)
    assert not ours.counts.any()
    wanted = PLAIN.project(a, matrix, residual.clone(), gate)
    expect_product(first, wanted)


@here
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_products_of_a_damaged_value(value: float) -> None:
    """The row that has it, and no other, is not finite afterwards."""
    a = random(0, 3, 200, dtype=PRODUCTS)
    gate_up, down = (Matrix(a.new_ones(n, 200)) for n in (32, 16))
    a[1, 150] = value
    residual = random(1, 3, 16, dtype=PRODUCTS)
    for found in (kernels().geglu(a, gate_up, gate_up), kernels().project(a, down, residual)):
        assert (~found.isfinite()).any(dim=1).tolist() == [False, True, False]


@pytest.fixture
def small_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries are many: the interpreter takes a millisecond for a program."""
    from pi0.engines.fast.cuda import triton_attention, triton_check

    for module in (triton_check, triton_attention):
        monkeypatch.setattr(module, "MOST_QUERIES", 48)


@here
@pytest.mark.usefixtures("small_many")
@pytest.mark.parametrize("quantised", [False, True])
def test_check_passes(quantised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pi0.engines.fast.cuda import triton_check, triton_kernels

    if INTERPRETED:  # whose own e4m3 is wrong
        monkeypatch.setattr(triton_kernels, "FP8", torch.float32)
    triton_check.check(torch.device(DEVICE), torch.float32, quantised, PRESETS["tiny"])


@here
@pytest.mark.usefixtures("small_many")
def test_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from pi0.engines.fast.cuda import triton_check, triton_kernels

    monkeypatch.setattr(triton_kernels, "RMS_EPS", 1e-2)
    with pytest.raises(triton_check.TritonUnavailable, match="rms_norm differs from PyTorch's by"):
        triton_check.check(torch.device(DEVICE), torch.float32, False, PRESETS["tiny"])


@here
@pytest.mark.parametrize("case", [0, 1], ids=["all valid", "masked"])
@pytest.mark.parametrize("preset", ["tiny", "pi05_tiny"])
def test_whole_sampling_call(tmp_path: Path, case: int, preset: str) -> None:
    """In float32: with residuals added in place and keys written in place, the same actions."""
    device = torch.device(DEVICE)
    synthesise(tmp_path, PRESETS[preset], LAYOUTS["openpi"], 0, torch.float32)
    weights = pack(open_checkpoint(tmp_path), Scheme(torch.float32, mlp_chunk=2**31)).to(device)
    config = weights.config
    chosen = default_cases(config, cameras=2, tokens=5)[case]
    plan = make_token_plan(chosen.inputs, config.vision.num_patches, config.suffix_len, bucket=16)
    call = Call(chosen.inputs, plan, chosen.noise, steps=1)
    with torch.inference_mode():
        found, wanted = (
            Graph(Network(weights, these), call, device)(call) for these in (kernels(), PLAIN)
        )
    # Only the order of sums differs: 1e-6 through a tower.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
