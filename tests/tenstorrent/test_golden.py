"""Golden functions, each against two others: TTNN's, PyTorch's, the model's."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import EngineOptions, make_engine
from pi0.engines.tenstorrent import golden
from pi0.engines.tenstorrent.engine import TtnnHostEngine
from pi0.engines.tenstorrent.golden import HostTensor
from pi0.engines.tenstorrent.host import HostBackend
from pi0.engines.tenstorrent.layout import MASKED, neighbours
from pi0.engines.tenstorrent.silicon import CARD, IDEAL, TF32, cut
from pi0.inputs import random_inputs
from pi0.model.gemma import attend

pytestmark = pytest.mark.ttnn
GELU = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731


@pytest.fixture(scope="module")
def ideal(tiny_path: Path) -> HostBackend:
    made = TtnnHostEngine(open_checkpoint(tiny_path), EngineOptions("exact")).backend
    assert isinstance(made, HostBackend)
    assert made.silicon == IDEAL
    return made


@pytest.fixture(scope="module")
def card(ideal: HostBackend) -> HostBackend:
    return HostBackend(ideal.ttnn, CARD)


def f32(x: Tensor) -> HostTensor:
    return HostTensor(x, "float32")


def bf16(x: Tensor) -> HostTensor:
    return HostTensor(x.bfloat16(), "bfloat16")


def theirs(backend: HostBackend, name: str):
    return backend.ttnn.get_golden_function(backend.option(name))


def near(found: HostTensor | Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    value = found.value if isinstance(found, HostTensor) else found
    return torch.allclose(value, wanted, atol=tolerance, rtol=tolerance)


def test_every_operation_of_the_network_is_listed(tiny_path: Path) -> None:
    engine = make_engine("ttnn-host", open_checkpoint(tiny_path))
    used, run = set(), engine.backend.run

    def noting(name: str, *args: object, **options: object) -> object:
        used.add(name)
        return run(name, *args, **options)

    engine.backend.run = noting
    inputs, noise = random_inputs(engine.config, 2, 10, 0)
    engine.velocity(noise, torch.ones(1), engine.prefill(inputs), lambda name, x: x.clone())
    engine.sample(inputs, noise, 1)
    assert used == {*golden.OURS, *golden.THEIRS}
    assert all(name in engine.notes[1] for name in used)


def test_products(ideal: HostBackend) -> None:
    x, w, b = torch.randn(1, 1, 64, 64), torch.randn(64, 96), torch.randn(1, 1, 1, 96)
    linear = theirs(ideal, "linear")
    run = ideal.run("experimental.minimal_matmul", f32(x), f32(w), bias_tensor=f32(b))
    assert near(run, x @ w + b, 1e-4)
    assert near(run, linear(x, w, bias=b), 1e-4)
    for name, function in (("GELU_TANH", GELU), ("SILU", F.silu)):
        unary = ideal.ttnn.UnaryWithParam(ideal.option(f"UnaryOpType.{name}"))
        run = ideal.run(
            "experimental.minimal_matmul",
            f32(x),
            f32(w),
            bias_tensor=f32(b),
            fused_activation=unary,
        )
        assert near(run, function(x @ w + b), 1e-4)
    parts = ideal.run("experimental.minimal_matmul_split", f32(x), f32(w), chunks=3)
    for part, wanted, other in zip(
        parts, (x @ w).chunk(3, -1), linear(x, w).chunk(3, -1), strict=True
    ):
        assert near(part, wanted, 1e-4)
        assert near(part, other, 1e-4)
    base, addcmul = torch.randn(1, 1, 64, 96), theirs(ideal, "addcmul")
    name = "experimental.dit_minimal_matmul_addcmul_fused"
    for rows in (1, 64):
        gate = torch.randn(1, 1, rows, 96)
        run = ideal.run(name, f32(x), f32(w), 0.5, f32(base), f32(gate), bias_tensor=f32(b))
        assert near(run, base + 0.5 * gate * (x @ w + b), 1e-4)
        product, whole = linear(x, w, bias=b), gate.expand_as(base)
        assert near(run, addcmul(base, product, whole, value=0.5), 1e-4)


def test_norms(ideal: HostBackend) -> None:
    x, weight, bias = torch.randn(1, 1, 8, 64) + 1, *torch.randn(2, 1, 1, 1, 64)
    flat = weight.flatten(), bias.flatten()
    for shift in (None, bias):
        given = None if shift is None else f32(shift)
        run = ideal.run("rms_norm", f32(x), epsilon=1e-6, weight=f32(weight), bias=given)
        wanted = F.rms_norm(x, (64,), flat[0], 1e-6) + (0 if shift is None else shift)
        assert near(run, wanted)
        assert near(run, theirs(ideal, "rms_norm")(x, epsilon=1e-6, weight=weight, bias=shift))
    run = ideal.run("layer_norm", f32(x), epsilon=1e-6, weight=f32(weight), bias=f32(bias))
    assert near(run, F.layer_norm(x, (64,), *flat, 1e-6))
    assert near(run, theirs(ideal, "layer_norm")(x, epsilon=1e-6, weight=weight, bias=bias))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norms_read_a_float32_stream_as_tf32(card: HostBackend, name: str) -> None:
    x, (weight, bias) = torch.randn(1, 1, 32, 64) + 10, torch.randn(2, 1, 1, 1, 64)
    given = {"epsilon": 1e-6, "weight": f32(weight), "bias": f32(bias)}
    of_all, of_tf32 = (card.run(name, f32(value), **given) for value in (x, cut(x, TF32)))
    assert torch.equal(of_all.value, of_tf32.value)


def test_elements(ideal: HostBackend) -> None:
    x, y, z = torch.randn(3, 1, 1, 64, 32)
    gelu = [ideal.ttnn.UnaryWithParam(ideal.option("UnaryOpType.GELU_TANH"))]
    run = ideal.run("add", f32(x), f32(y))
    assert near(run, x + y)
    assert near(run, theirs(ideal, "add")(x, y))
    run = ideal.run("multiply", f32(x), f32(y), input_tensor_a_activations=gelu)
    assert near(run, GELU(x) * y)
    assert near(run, theirs(ideal, "multiply")(GELU(x), y))
    run = ideal.run("addcmul", f32(x), f32(y), f32(z), value=-0.25)
    assert near(run, x - 0.25 * y * z)
    assert near(run, theirs(ideal, "addcmul")(x, y, z, value=-0.25))


def test_heads_and_rows(ideal: HostBackend) -> None:
    x = torch.randn(2, 1, 64, (4 + 2 * 2) * 32)
    name = "experimental.nlp_create_qkv_heads"
    options = {"num_heads": 4, "num_kv_heads": 2, "transpose_k_heads": False}
    q, k, v = ideal.run(name, f32(x), **options)
    split = x[:, 0].view(2, 64, 8, 32)
    for found, wanted in ((q, split[:, :, :4]), (k, split[:, :, 4:6]), (v, split[:, :, 6:])):
        assert torch.equal(found.value.transpose(1, 2), wanted)
    caches, rows = torch.randn(2, 1, 2, 96, 32), torch.randn(2, 1, 2, 64, 32)
    wanted = torch.cat([rows, caches[:, :, :, 64:]], dim=3)
    for cache, new, each in zip(caches, rows, wanted, strict=True):
        assert torch.equal(theirs(ideal, "fill_cache")(cache.clone(), new, 0), each)
    name = "experimental.indexed_fused_update_cache"
    held = [f32(cache.clone()) for cache in caches]
    given = (held[0], f32(rows[0]), held[1], f32(rows[1]))
    ideal.run(name, *given, HostTensor(torch.arange(64)[None], "int32"))
    for cache, each in zip(held, wanted, strict=True):
        assert torch.equal(cache.value, each), "written in place"
    places = torch.full((1, 64), -1)
    places[0, 5] = 90
    ideal.run(name, *given, HostTensor(places, "int32"))
    assert torch.equal(held[1].value[:, :, 90], rows[1][:, :, 5])
    assert torch.equal(held[1].value[:, :, :90], wanted[1][:, :, :90]), "-1 is nowhere"
    several = [f32(torch.zeros(3, 1, 96, 32)) for _ in range(2)]
    rows = torch.randn(2, 1, 1, 64, 32)
    places = torch.cat([torch.arange(32), 2 * 96 + 32 + torch.arange(32)])[None]
    given = (several[0], f32(rows[0]), several[1], f32(rows[1]))
    ideal.run(name, *given, HostTensor(places, "int32"))
    for cache, new in zip(several, rows, strict=True):
        wanted = torch.zeros(3, 1, 96, 32)
        wanted[0, 0, :32], wanted[2, 0, 32:64] = new[0, 0].split(32)
        assert torch.equal(cache.value, wanted), "places of several caches follow each other"
    table, tokens = torch.randn(10, 8), torch.tensor([[3, 0, 9]])
    found = ideal.run("embedding", HostTensor(tokens, "uint32"), f32(table), dtype="float32")
    assert torch.equal(found.value, F.embedding(tokens, table))
    assert torch.equal(found.value, theirs(ideal, "embedding")(tokens, table))


def test_rotation(ideal: HostBackend, card: HostBackend) -> None:
    """That it is the model's is tested with the layout."""
    x, (cos, sin) = torch.randn(1, 2, 64, 64), torch.randn(2, 1, 2, 64, 64)
    name, turn = "experimental.rotary_embedding_llama", neighbours()
    turned = ideal.run(name, f32(x), f32(cos), f32(sin), f32(turn))
    a, b = x[..., ::2], x[..., 1::2]
    assert near(turned.value[..., ::2], a * cos[..., ::2] - b * sin[..., ::2])
    assert near(turned.value[..., 1::2], b * cos[..., 1::2] + a * sin[..., 1::2])
    rounded = card.run(name, bf16(x), bf16(cos), bf16(sin), bf16(turn)).value
    product = lambda u, w: (u.bfloat16() * w.bfloat16()).float()  # noqa: E731
    even = product(a, cos[..., ::2]) - product(b, sin[..., ::2])
    assert torch.equal(rounded[..., ::2], even.bfloat16()), "each product is rounded"


def test_tiles_in_another_shape(ideal: HostBackend) -> None:
    """Heads side by side become heads of 32 tokens each, one after another, and back."""
    x, name = torch.randn(1, 1, 64, 3 * 64), "experimental.view"
    heads = ideal.run(name, f32(x), (1, 6, 32, 64))
    wanted = x.view(2, 32, 3, 64).transpose(1, 2).reshape(1, 6, 32, 64)
    assert torch.equal(heads.value, wanted)
    assert torch.equal(ideal.run(name, heads, (1, 1, 64, 192)).value, x)

    def tiles(of: Tensor) -> list[Tensor]:
        rows = [row for head in of.flatten(0, 1) for row in head.split(32)]
        return [tile for row in rows for tile in row.split(32, dim=1)]

    one_by_one = zip(tiles(x), tiles(heads.value), strict=True)
    assert all(torch.equal(left, right) for left, right in one_by_one), "tiles cut out one by one"


def chunked(backend: HostBackend, q, k, v, mask, size: int, scale: float = 0.25) -> Tensor:
    ttnn = backend.ttnn
    return backend.run(
        "transformer.scaled_dot_product_attention",
        *(HostTensor(x, "float32") for x in (q, k, v)),
        attn_mask=None if mask is None else bf16(mask),
        is_causal=False,
        scale=scale,
        program_config=ttnn.SDPAProgramConfig(
            compute_with_storage_grid_size=(8, 8), q_chunk_size=32, k_chunk_size=size
        ),
    ).value


def test_attention(ideal: HostBackend, card: HostBackend) -> None:
    """In chunks or at once, with and without a mask; chunks that a row does not see at all."""
    q, (k, v) = torch.randn(1, 4, 64, 32), 2 * torch.randn(2, 1, 2, 192, 32)
    visible = torch.rand(64, 192) < 0.5
    visible[:, 150] = True
    visible[5, :128] = False
    mask = torch.zeros(1, 1, 64, 192).masked_fill(~visible, MASKED)
    their = theirs(ideal, "transformer.scaled_dot_product_attention")
    tokens = lambda x: x.transpose(1, 2)  # noqa: E731
    model = attend(tokens(q) * 0.25 * 32**0.5, tokens(k), tokens(v), visible[None])
    for size in (32, 64, 192):
        found = chunked(ideal, q, k, v, mask, size)
        assert near(found, their(q, k, v, attn_mask=mask, is_causal=False, scale=0.25))
        assert near(tokens(found).flatten(2), model)
    whole = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.25).softmax(-1)
    assert near(chunked(ideal, q, k, v, None, 64), whole @ v.repeat_interleave(2, 1))
    errors = [
        float((chunked(card, q, k, v, mask, size) - model_heads).norm() / model_heads.norm())
        for size in (192, 32)
        for model_heads in [chunked(ideal, q, k, v, mask, 192)]
    ]
    assert 1e-4 < errors[0] < errors[1] < 1e-2, "more chunks round the state more often"


@pytest.mark.parametrize("spread", [1, 8])
def test_masked_content_weighs_nothing(card: HostBackend, spread: float) -> None:
    """Not a bit, whatever is behind the mask, in whichever chunk it is, also if that is all of it
    and logits are large."""
    q, (k, v) = torch.randn(1, 2, 32, 32), torch.randn(2, 1, 1, 128, 32)
    k *= spread
    for hidden in (slice(0, 64), slice(64, 128), slice(32, 96)):
        mask = torch.zeros(1, 1, 32, 128)
        mask[..., hidden] = MASKED
        first = chunked(card, q, k, v, mask, 32)
        assert first.isfinite().all()
        k[:, :, hidden] *= -3
        v[:, :, hidden] += 100
        assert torch.equal(chunked(card, q, k, v, mask, 32), first)


def test_gelu_lies_in_a_buffer_of_its_dtype(card: HostBackend) -> None:
    gelu = [card.ttnn.UnaryWithParam(card.option("UnaryOpType.GELU_TANH"))]
    x, y = torch.randn(2, 1, 1, 32, 32).bfloat16()
    found = card.run("multiply", bf16(x), bf16(y), input_tensor_a_activations=gelu).value
    assert torch.equal(found, GELU(x.float()).bfloat16() * y)


def test_checks_are_named() -> None:
    """Two each, and this file has them."""
    source = inspect.getsource(inspect.getmodule(test_checks_are_named))
    for name, ours in golden.OURS.items():
        assert len(set(ours.checks)) == 2
        assert f'"{name}"' in source
