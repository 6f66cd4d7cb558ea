"""Every call of a Triton kernel compiles for several GPUs and fits them; this needs none of them.

The interpreter of test_triton.py accepts what the compiler does not.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from pi0.config import PRESETS

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

from gpu_compiler import SHARED, Compiled, compiling_for

from pi0.engines.fast.cuda import triton_attention
from pi0.engines.fast.cuda.triton_attention import FEW, MANY, SHARE
from pi0.engines.fast.cuda.triton_check import run_all
from pi0.engines.fast.cuda.triton_kernels import TritonKernels

META = torch.device("meta")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from an earlier run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def require_fit(compiled: list[Compiled], capability: int) -> None:
    for kernel in compiled:
        assert kernel.shared <= SHARED[capability], kernel
        assert kernel.stack == 0, kernel


@pytest.mark.parametrize(
    ("capability", "dtype", "quantised"),
    [
        (80, torch.bfloat16, False),
        (89, torch.bfloat16, True),
        (90, torch.bfloat16, False),
        (90, torch.bfloat16, True),
        (90, torch.float32, False),
    ],
)
def test_every_call_fits(
    capability: int, dtype: torch.dtype, quantised: bool, tmp_path: Path
) -> None:
    """The calls of the check at the engine's start, at the sizes of the published models."""
    with torch.inference_mode(), compiling_for(capability, tmp_path) as compiled:
        run_all(TritonKernels(), META, dtype, quantised, PRESETS["pi0_base"])
    names = {kernel.name for kernel in compiled}
    assert len(names) == (4 if dtype == torch.float32 else 9), names
    require_fit(compiled, capability)


@pytest.mark.parametrize("capability", [80, 89, 120])
def test_attention_fits(capability: int, tmp_path: Path) -> None:
    """Which takes most. 12.0 is here because its shared memory is as small as that of 8.9."""
    q, kv = (torch.empty(1, t, h, 256, dtype=torch.bfloat16, device=META) for t, h in SIZES)
    with compiling_for(capability, tmp_path) as compiled:
        for tile, share in ((FEW, SHARE), (MANY, kv.shape[1])):
            triton_attention._attend(q, kv, kv, None, tile, share)
    assert len(compiled) == 4
    require_fit(compiled, capability)


SIZES = ((816, 8), (867, 1))  # tokens and heads of queries, and of keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_heads_compile(dtype: torch.dtype, tmp_path: Path) -> None:
    """Products have a least size in the compiler, and none in the interpreter."""
    with compiling_for(90, tmp_path) as compiled:
        for width in (1, 12, 40):
            q, k = (torch.empty(1, n, 1, width, dtype=dtype, device=META) for n in (3, 20))
            triton_attention._attend(q, k, k, None, FEW, SHARE)
    assert compiled
