"""Whether Triton works here: its kernels against plain PyTorch's, on small random tensors.

A kernel that a device, driver or version of Triton gets wrong is found before it moves a robot.
"""

from __future__ import annotations

from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from pi0.engines.fast.cuda.fp8 import FP8, Fp8Kernels, Rows
from pi0.engines.fast.cuda.triton_kernels import TritonKernels
from pi0.engines.fast.kernels import Norm
from pi0.engines.fast.network import make_rotation
from pi0.engines.fast.weights import Matrix

ROWS, WIDTH, HEADS, HEAD_DIM, KEYS = 5, 64, 3, 16, 300
# Relative L2. bfloat16 is rounded twice at 2^-9; e4m3 at 2^-4, and both sides may round apart.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.01, FP8: 0.05}


class TritonUnavailable(Exception):
    """Triton cannot be used; the message says why."""


def check(device: torch.device, dtype: torch.dtype, quantised: bool) -> None:
    """Runs every kernel in a dtype on a device (the current one) and compares.

    Raises:
        TritonUnavailable: one does not compile, does not run or gives other numbers.
    """
    try:
        wanted = _run(Fp8Kernels(), device, dtype, quantised)
        found = _run(TritonKernels(), device, dtype, quantised)
    except (TritonError, RuntimeError, OSError, CalledProcessError) as why:
        raise TritonUnavailable(str(why)) from why
    limit = LIMITS[FP8 if quantised else dtype]
    for name in wanted:
        error = float((found[name] - wanted[name]).norm() / wanted[name].norm())
        if not error <= limit:  # a NaN is none
            raise TritonUnavailable(
                f"{name} differs from PyTorch's by {error:.2g}, more than {limit}"
            )


def _run(
    kernels: Fp8Kernels, device: torch.device, dtype: torch.dtype, quantised: bool
) -> dict[str, Tensor]:
    """Results of all kernels by name, in float32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, norm = random(ROWS, WIDTH), random(2, WIDTH, dtype=torch.float32)
    first, gate_up = Matrix(random(WIDTH, WIDTH), random(WIDTH)), Matrix(random(2 * WIDTH, WIDTH))
    into = Matrix(x, scale=norm[0] if quantised else None)
    qkv = random(1, ROWS, (HEADS + 2) * HEAD_DIM)
    k, v = random(2, 1, KEYS, 1, HEAD_DIM)
    valid = random(1, KEYS) > 0
    rotation = make_rotation(torch.arange(ROWS, device=device)[None], HEAD_DIM)
    q = kernels.split(qkv, rotation, k[:, :ROWS], v[:, :ROWS])
    results = {
        "operand": kernels.operand(x, into),
        "rms_norm": kernels.rms_norm(x, Norm(norm[0]), into),
        "adaptive_norm": kernels.rms_norm(x, Norm(*norm), into),
        "layer_norm": kernels.layer_norm(x, norm[0], norm[1], into),
        "gelu": kernels.gelu(x, first, into),
        "geglu": kernels.geglu(x, gate_up, into),
        "residual": kernels.project(x, Matrix(first.weight), x.new_ones(ROWS, WIDTH)),
        "gated_residual": kernels.project(
            x, Matrix(first.weight), x.new_ones(ROWS, WIDTH), norm[0]
        ),
        "queries": q,
        "keys": k,
        "values": v,
        "attention": kernels.attend(q, k, v, valid),
    }
    return {name: _dequantise(result) for name, result in results.items()}


def _dequantise(result: Any) -> Tensor:
    return result.values.float() * result.scale if isinstance(result, Rows) else result.float()
