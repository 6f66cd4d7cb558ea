"""Every matrix product of the model: `python benchmarks/gpu/gemm.py --out gemm.json`.

Time, TFLOP/s and bytes of weights read per second, in bfloat16 and in e4m3 with slow and fast
accumulation. Weights take turns so that no cache holds them, as in a call, where each is read once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import attempt, make_parser, make_stream, microseconds, show, write

from pi0.config import PRESETS, GemmaConfig, Pi0Config
from pi0.engines.fast.cuda.fp8 import FP8

BEYOND_CACHES = 256 << 20  # bytes of weights that take turns; an H100's second cache holds 50 MB
PATCHES_TEXT = (2, 48), (3, 48)  # cameras and text tokens


def shapes(config: Pi0Config) -> list[tuple[str, int, int, int]]:
    """What is multiplied: a name, M rows, N outputs, K."""
    vision, found = config.vision, []
    for cameras, text in PATCHES_TEXT:
        rows = cameras * vision.num_patches
        for name, n, k in (
            ("qkv", 3 * vision.width, vision.width),
            ("out", vision.width, vision.width),
            ("fc1", vision.mlp_dim, vision.width),
            ("fc2", vision.width, vision.mlp_dim),
        ):
            found.append((f"vision {name}", rows, n, k))
        found += gemma_shapes("vlm", config.vlm, rows + text)
    return found + gemma_shapes("expert", config.expert, config.horizon)


def gemma_shapes(trunk: str, config: GemmaConfig, rows: int) -> list[tuple[str, int, int, int]]:
    heads = config.num_heads * config.head_dim
    return [
        (f"{trunk} qkv", rows, heads + 2 * config.num_kv_heads * config.head_dim, config.width),
        (f"{trunk} out", rows, config.width, heads),
        (f"{trunk} gate and up", rows, 2 * config.mlp_dim, config.width),
        (f"{trunk} down", rows, config.width, config.mlp_dim),
    ]


def measure(m: int, n: int, k: int, kind: str, device: torch.device, stream: Any) -> float:
    """Microseconds of a product."""
    size = n * k * (2 if kind == "bfloat16" else 1)
    count = max(1, min(64, BEYOND_CACHES // size)) if device.type == "cuda" else 1
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(count)]
    if kind == "bfloat16":
        return microseconds([lambda w=w: F.linear(a, w) for w in weights], stream)
    scales = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
    left, fast = a.to(FP8), kind == "e4m3 fast"

    def multiply(w: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(left, w.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

    quantised = [weight.to(FP8) for weight in weights]
    return microseconds([lambda w=w: multiply(w) for w in quantised], stream)


@torch.inference_mode()
def main() -> None:
    options = make_parser(__doc__ or "").parse_args()
    device, rows = torch.device(options.device), []
    stream = make_stream(device)
    for name, m, n, k in shapes(PRESETS["tiny" if options.tiny else "pi0_base"]):
        for kind in ("bfloat16", "e4m3", "e4m3 fast"):
            time = attempt(lambda size=(m, n, k), kind=kind: measure(*size, kind, device, stream))
            row = {"matrix": name, "M": m, "N": n, "K": k, "kind": kind, "microseconds": time}
            measured = isinstance(time, float)
            row["TFLOP/s"] = 2e-6 * m * n * k / time if measured else "-"
            size = n * k * (2 if kind == "bfloat16" else 1)
            row["weights, GB/s"] = 1e-3 * size / time if measured else "-"
            rows.append(row)
    print(*show(rows), sep="\n")
    write(options.out, rows)


if __name__ == "__main__":
    main()
