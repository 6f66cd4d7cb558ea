"""What TTNN's operations compute, step by step as their kernels do it.

TTNN has golden functions of its own, which are plain PyTorch in float32: they know no formats
inside an operation, lack some operations and understand others differently (GELU is the exact form
whatever is asked for). Ours follow the kernels in the wheel (ttnn/ttnn/cpp/ttnn/operations) and the
formats that a dry run's chlkc_descriptors.h gives their buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.engines.tenstorrent.precision import BF16, F32
from pi0.engines.tenstorrent.silicon import TILE, Fpu


@dataclass(frozen=True)
class HostTensor:
    """Values that a device tensor of a dtype can hold; kept in bfloat16 where that holds them."""

    value: Tensor
    dtype: str

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def real(self) -> Tensor:
        return self.value.float()


@dataclass(frozen=True)
class Core:
    """What an operation runs on: its matrix engine, and the formats of its buffers."""

    fpu: Fpu
    round: Callable[[Tensor, str], Tensor]

    def buffered(self, x: Tensor, dtype: str) -> Tensor:
        """x after it lay in a buffer of this dtype."""
        return self.round(x, dtype).float() if self.fpu.silicon.buffers else x


def activate(x: Tensor, unary: Any) -> Tensor:
    """TTNN's activation, computed by the vector engine in float32."""
    name = unary.op_type.name
    if name == "GELU_TANH":
        return F.gelu(x, approximate="tanh")
    if name == "SILU":
        return F.silu(x)
    raise ValueError(f"no golden function for activation {name}")


def minimal_matmul(
    core: Core,
    x: HostTensor,
    w: HostTensor,
    bias_tensor: HostTensor | None = None,
    fused_activation: Any = None,
) -> Tensor:
    y = core.fpu.matmul(x.real, w.real)
    if bias_tensor is not None:
        y = core.fpu.operand(y) + core.fpu.operand(bias_tensor.real)
    return activate(y, fused_activation) if fused_activation else y


def minimal_matmul_split(
    core: Core, x: HostTensor, w: HostTensor, chunks: int
) -> tuple[Tensor, ...]:
    return minimal_matmul(core, x, w).chunk(chunks, dim=-1)


def minimal_matmul_addcmul(
    core: Core,
    x: HostTensor,
    w: HostTensor,
    factor: float,
    base: HostTensor,
    gate: HostTensor,
    bias_tensor: HostTensor | None = None,
) -> Tensor:
    fpu = core.fpu
    y = factor * fpu.times(minimal_matmul(core, x, w, bias_tensor), gate.real)
    return fpu.operand(y) + fpu.operand(base.real)


def rms_norm(
    core: Core, x: HostTensor, epsilon: float, weight: HostTensor, bias: HostTensor | None = None
) -> Tensor:
    squares = core.fpu.times(x.real, x.real).mean(dim=-1, keepdim=True)
    return _scaled(core, x.real, squares + epsilon, weight, bias)


def layer_norm(
    core: Core, x: HostTensor, epsilon: float, weight: HostTensor, bias: HostTensor | None = None
) -> Tensor:
    real = core.fpu.operand(x.real)  # the mean and what it is taken from pass the same registers
    centred = real - core.fpu.operand(real.mean(dim=-1, keepdim=True))
    squares = core.fpu.times(centred, centred).mean(dim=-1, keepdim=True)
    return _scaled(core, centred, squares + epsilon, weight, bias)


def _scaled(
    core: Core, x: Tensor, variance: Tensor, weight: HostTensor, bias: HostTensor | None
) -> Tensor:
    fpu = core.fpu
    y = fpu.times(fpu.times(x, variance.rsqrt()), weight.real)
    return y if bias is None else fpu.operand(y) + fpu.operand(bias.real)


def embedding(core: Core, tokens: HostTensor, table: HostTensor) -> Tensor:
    """As TTNN's, without a float32 copy of the table."""
    return table.value[tokens.value.long()]


def create_heads(
    core: Core, qkv: HostTensor, num_heads: int, num_kv_heads: int, transpose_k_heads: bool
) -> tuple[Tensor, ...]:
    batch, _, rows, width = qkv.shape
    head = width // (num_heads + 2 * num_kv_heads)
    parts = qkv.value.view(batch, rows, -1, head).transpose(1, 2)
    q = parts[:, :num_heads]
    k, v = parts[:, num_heads:].chunk(2, dim=1)
    return q, k.transpose(-1, -2) if transpose_k_heads else k, v


def rotary_embedding(
    core: Core, x: HostTensor, cos: HostTensor, sin: HostTensor, turn: HostTensor
) -> Tensor:
    """Columns are turned tile by tile; both products lie in a buffer of the dtype of x before they
    are added."""
    tiles = x.real.reshape(*x.shape[:-1], -1, TILE)
    turned = core.buffered(core.fpu.matmul(tiles, turn.real[0]).flatten(-2), x.dtype)
    straight = core.fpu.times(x.real, cos.real)
    return core.buffered(straight, x.dtype) + core.buffered(
        core.fpu.times(turned, sin.real), x.dtype
    )


def tile_view(core: Core, x: HostTensor, shape: tuple[int, ...]) -> Tensor:
    """Tiles, which lie in memory one after another, as those of a tensor of another shape."""
    (*_, rows, columns), (*_, new_rows, new_columns) = x.shape, shape
    tiles = x.value.reshape(-1, rows // TILE, TILE, columns // TILE, TILE).transpose(2, 3)
    taken = tiles.reshape(-1, new_rows // TILE, new_columns // TILE, TILE, TILE)
    return taken.transpose(2, 3).reshape(shape)


def attention(
    core: Core,
    q: HostTensor,
    k: HostTensor,
    v: HostTensor,
    attn_mask: HostTensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    output_concat_heads: bool = False,
    program_config: Any = None,
) -> Tensor:
    """Keys in chunks (`sdpa_inner_loop` in compute_common.hpp).

    Between chunks the running maximum, the weight of what was before and the output are bfloat16;
    logits and sums of weights are float32.
    """
    if is_causal:
        raise ValueError("no golden function for causal attention")
    fpu = core.fpu
    heads, keys = q.shape[1], k.shape[2]
    size = program_config.k_chunk_size if program_config else keys
    k_heads, v_heads = (x.real.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    # TTNN scales the exponent's argument, and divides the mask by the scale in a buffer.
    mask = None if attn_mask is None else core.buffered(attn_mask.real / scale, attn_mask.dtype)
    largest = total = out = torch.zeros(())
    for start in range(0, keys, size):
        chunk = slice(start, start + size)
        logits = fpu.matmul(q.real, k_heads[:, :, chunk].transpose(-1, -2))
        if mask is not None:
            logits = fpu.operand(logits) + mask[..., chunk]
        here = core.buffered(fpu.operand(logits).amax(dim=-1, keepdim=True), BF16)
        now = here if start == 0 else torch.maximum(largest, here)
        weights = torch.exp((fpu.operand(logits) - now) * scale)
        of_chunk = core.buffered(fpu.matmul(weights, v_heads[:, :, chunk]), BF16)
        sums = weights.sum(dim=-1, keepdim=True)
        if start == 0:
            total, out = sums, of_chunk
        else:
            kept = core.buffered(torch.exp((largest - now) * scale), BF16)
            total = sums + fpu.times(total, kept)
            out = core.buffered(of_chunk + core.buffered(fpu.times(out, kept), BF16), BF16)
        largest = now
    attended = fpu.times(out, 1 / fpu.operand(total))
    return attended.transpose(1, 2).flatten(2)[:, None] if output_concat_heads else attended


def update_caches(
    core: Core,
    keys: HostTensor,
    k: HostTensor,
    values: HostTensor,
    v: HostTensor,
    places: HostTensor,
) -> tuple[Tensor, ...]:
    """Writes rows [1, K, N, D] into caches [B, K, S, D], as on a card: to place b·S + s, or nowhere
    if that is negative."""
    written = places.value[0] >= 0
    place = places.value[0, written].long()
    page, row = place // keys.shape[2], place % keys.shape[2]
    for cache, rows in ((keys, k), (values, v)):
        kept = rows.value[0][:, written].to(cache.value.dtype)
        cache.value[page, :, row] = kept.transpose(0, 1)
    return keys.value, values.value


def multiply(
    core: Core, a: HostTensor, b: HostTensor, input_tensor_a_activations: Sequence[Any] = ()
) -> Tensor:
    x = a.real
    for unary in input_tensor_a_activations:
        x = core.buffered(activate(x, unary), a.dtype)
    return x * b.real


def add(core: Core, a: HostTensor, b: HostTensor) -> Tensor:
    return a.real + b.real


def addcmul(core: Core, a: HostTensor, b: HostTensor, c: HostTensor, value: float) -> Tensor:
    """The product lies in a register of the sums' dtype."""
    product = b.real * c.real * value
    return a.real + (product if a.dtype == F32 else core.buffered(product, BF16))


@dataclass(frozen=True)
class Golden:
    """A golden function of ours.

    Attributes:
        checks: two things that it is compared with by tests.
    """

    function: Callable[..., Any]
    checks: tuple[str, str]


TORCH, TTNN, MODEL = "PyTorch", "TTNN's golden function", "the model"
OURS = {
    "experimental.minimal_matmul": Golden(minimal_matmul, (TORCH, "TTNN's linear")),
    "experimental.minimal_matmul_split": Golden(minimal_matmul_split, (TORCH, "TTNN's linear")),
    "experimental.dit_minimal_matmul_addcmul_fused": Golden(
        minimal_matmul_addcmul, (TORCH, "TTNN's linear and addcmul")
    ),
    "rms_norm": Golden(rms_norm, (TORCH, TTNN)),
    "layer_norm": Golden(layer_norm, (TORCH, TTNN)),
    "embedding": Golden(embedding, (TORCH, TTNN)),
    "experimental.nlp_create_qkv_heads": Golden(create_heads, (TORCH, MODEL)),
    "experimental.rotary_embedding_llama": Golden(rotary_embedding, (TORCH, MODEL)),
    "experimental.view": Golden(tile_view, (TORCH, "tiles cut out one by one")),
    "transformer.scaled_dot_product_attention": Golden(attention, (TTNN, MODEL)),
    "experimental.indexed_fused_update_cache": Golden(update_caches, (TORCH, "TTNN's fill_cache")),
    "multiply": Golden(multiply, (TORCH, "TTNN's multiply")),
    "add": Golden(add, (TORCH, TTNN)),
    "addcmul": Golden(addcmul, (TORCH, TTNN)),
}
# What only moves values is TTNN's.
THEIRS = ("concat", "reshape", "to_memory_config")
NOTE = (
    "golden functions: TTNN's for "
    + ", ".join(THEIRS)
    + "; pi0's, each with two checks, for "
    + ", ".join(f"{name} ({' and '.join(golden.checks)})" for name, golden in OURS.items())
    + "."
)
