"""What the device and its libraries do alone: `python benchmarks/gpu/probe.py --out probe.json`.

Versions; PyTorch's backends of attention and this engine's kernel, with a mask and without, each
with its error beside float64; e4m3 products at the model's shapes with and without a bias and fast
accumulation; whether the engine's checks pass; whether one attention can be captured.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from common import attempt, make_parser, make_stream, microseconds, relative, show, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pi0.config import PRESETS
from pi0.engines.fast.cuda.engine import choose_kernels
from pi0.engines.fast.cuda.fp8 import FP8, check_products
from pi0.engines.fast.matrix import quantise_rows
from pi0.engines.fast.weights import Scheme

# Tokens, query heads, key/value heads, head dimension: prefill with 2 and 3 cameras, the actions,
# vision with 2 cameras (as one view with twice the heads).
ATTENTION = ((560, 8, 1, 256), (816, 8, 1, 256), (256, 32, 32, 72))
PRODUCTS = ((50, 1024, 4096), (512, 1152, 4304), (560, 2048, 16384), (816, 32768, 2048))
TINY_ATTENTION, TINY_PRODUCTS = ((20, 4, 1, 16),), ((5, 32, 48),)
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def versions(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found["triton"] = attempt(lambda: __import__("triton").__version__)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def attention_rows(device: torch.device, sizes: Any, stream: Any) -> list[dict[str, Any]]:
    rows = []
    for tokens, heads, kv_heads, width in sizes:
        q, k, v = (
            torch.randn(1, tokens, n, width, device=device, dtype=torch.bfloat16)
            for n in (heads, kv_heads, kv_heads)
        )
        valid = torch.ones(1, tokens, dtype=torch.bool, device=device)
        valid[:, -3:] = False
        for mask in (None, valid):
            wanted = attend(q.double(), k.double(), v.double(), mask, "MATH")
            row = {"tokens": tokens, "heads": heads, "width": width, "mask": mask is not None}
            for backend in BACKENDS:
                rows.append(row | measure_attention(q, k, v, mask, backend, wanted, stream))
            rows.append(row | measure_attention(q, k, v, mask, "this engine", wanted, stream))
    return rows


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """[T, H·D] of q [1, T, H, D], as `Kernels.attend` calls it."""
    if backend == "this engine":
        from pi0.engines.fast.cuda import triton_attention as ours

        return ours._attend(q, k, v, mask, ours.MANY, k.shape[1])
    _, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    q = q.view(1, tokens, kv_heads, -1, width).transpose(1, 2).flatten(2, 3)
    shown = None if mask is None else mask[:, None, None]
    with sdpa_kernel(getattr(SDPBackend, backend)):
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), shown)
    out = out.view(1, kv_heads, tokens, heads // kv_heads, width).transpose(1, 2)
    return out.reshape(tokens, heads * width)


def measure_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str, wanted: Tensor, stream: Any
) -> dict[str, Any]:
    def run() -> Tensor:
        return attend(q, k, v, mask, backend)

    error = attempt(lambda: relative(run(), wanted))
    time = attempt(lambda: microseconds([run], stream)) if isinstance(error, float) else "-"
    return {"backend": backend, "microseconds": time, "error": error}


def product_rows(device: torch.device, sizes: Any, stream: Any) -> list[dict[str, Any]]:
    rows = []
    for m, n, k in sizes:
        a, b = (torch.randn(size, k, device=device) for size in (m, n))
        bias = torch.randn(n, device=device).bfloat16()
        for biased in (False, True):
            for fast in (False, True):
                row = {"M": m, "N": n, "K": k, "bias": biased, "fast accumulation": fast}
                rows.append(row | measure_product(a, b, bias if biased else None, fast, stream))
    return rows


def measure_product(
    a: Tensor, b: Tensor, bias: Tensor | None, fast: bool, stream: Any
) -> dict[str, Any]:
    (left, left_scale), (right, scale) = quantise_rows(a, FP8), quantise_rows(b, FP8)
    wanted = (left.double() * left_scale[:, None]) @ (right.double() * scale[:, None]).t()
    wanted = wanted if bias is None else wanted + bias.double()

    def run() -> Tensor:
        return torch._scaled_mm(
            left,
            right.t(),
            left_scale[:, None],
            scale[None],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    error = attempt(lambda: relative(run(), wanted))
    time = attempt(lambda: microseconds([run], stream)) if isinstance(error, float) else "-"
    return {"microseconds": time, "error": error}


@torch.inference_mode()
def main() -> None:
    options = make_parser(__doc__ or "").parse_args()
    device = torch.device(options.device)
    stream, config = make_stream(device), PRESETS["tiny" if options.tiny else "pi0_base"]
    result = {"versions": versions(device)}
    print(*(f"{name}: {value}" for name, value in result["versions"].items()), sep="\n")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        notes = attempt(lambda dtype=dtype: choose_kernels(device, Scheme(dtype), config)[1])
        result["versions"][f"Triton's kernels, {name}"] = notes or "used"
        print(f"Triton's kernels in {name}: {notes or 'used'}")
    result["versions"]["e4m3 products"] = attempt(lambda: check_products(device)) or "right"
    print("e4m3 products:", result["versions"]["e4m3 products"])
    result["attention"] = attention_rows(
        device, TINY_ATTENTION if options.tiny else ATTENTION, stream
    )
    print(*show(result["attention"]), sep="\n")
    result["products"] = product_rows(device, TINY_PRODUCTS if options.tiny else PRODUCTS, stream)
    print(*show(result["products"]), sep="\n")
    write(options.out, result)


if __name__ == "__main__":
    main()
