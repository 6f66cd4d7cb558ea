"""Every call of a Triton kernel compiles for several GPUs, which needs none of them.

The interpreter of test_triton.py accepts what the compiler does not.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pi0.engines.fast.kernels import Norm
from pi0.engines.fast.network import make_rotation
from pi0.engines.fast.weights import Matrix

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)


@pytest.mark.parametrize(
    ("capability", "quantised"), [(80, False), (89, True), (90, False), (90, True)]
)
def test_every_call_compiles(
    capability: int, quantised: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To machine code, with the types and sizes of the published model; this needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=True))
        constant = {p.name for p in kernel.params if p.is_constexpr or values[p.name] is None}
        source = ASTSource(
            kernel,
            {n: "constexpr" if n in constant else triton_type(v) for n, v in values.items()},
            constexprs={name: values[name] for name in constant},
        )
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        compiled.append(kernel.__name__)

    monkeypatch.setattr(triton.JITFunction, "run", launch)
    call_all(quantised)
    assert len(set(compiled)) == 6


def triton_type(value: Any) -> str:
    if isinstance(value, Tensor):
        names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.bool: "i1"}
        return f"*{names.get(value.dtype, 'fp8e4nv')}"
    return "fp32" if isinstance(value, float) else "i32"


def call_all(quantised: bool) -> None:
    """Every operation as the network calls it at full size, but for the number of rows."""
    from pi0.engines.fast.cuda.triton_kernels import TritonKernels

    these = TritonKernels()

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    into = Matrix(zeros(1, 16), scale=zeros(1) if quantised else None)
    a = zeros(2, 16)
    for width in (1024, 1152, 2048):
        x, weight = zeros(2, width), zeros(width, dtype=torch.float32)
        these.operand(x, into)
        these.rms_norm(x, Norm(weight), into)
        these.rms_norm(x, Norm(weight, weight), into)
        these.project(a, Matrix(zeros(width, 16)), x, weight)
        these.layer_norm(x, weight, weight, into)
    for units in (4096, 16384):
        these.geglu(a, Matrix(zeros(2 * units, 16)), into)
    these.gelu(a, Matrix(zeros(4304, 16), zeros(4304)), into)
    k, v = zeros(2, 1, 835, 1, 256)
    rotation = make_rotation(torch.arange(51)[None], 256)
    for heads in (8, 0):
        q = these.split(zeros(1, 51, (heads + 2) * 256), rotation, k[:, 784:], v[:, 784:])
        if heads:
            these.attend(q[:, 1:], k, v, zeros(1, 835, dtype=torch.bool))
