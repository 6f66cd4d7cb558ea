"""Whether Triton works here: its kernels against plain PyTorch's, at the model's sizes.

A kernel that a device, driver or version of Triton gets wrong, or that asks for more than the
device has, is found before it moves a robot. Rows and keys are few, and so is the inner size of
matrices whose products are not Triton's: no kernel is compiled for those.
"""

from __future__ import annotations

from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from pi0.config import GemmaConfig, Pi0Config, SiglipConfig
from pi0.engines.fast.cuda.fp8 import FP8, Fp8Kernels, Rows
from pi0.engines.fast.cuda.triton_attention import MOST_QUERIES
from pi0.engines.fast.cuda.triton_kernels import TritonKernels
from pi0.engines.fast.cuda.triton_products import MOST_ROWS
from pi0.engines.fast.kernels import Norm
from pi0.engines.fast.matrix import Matrix
from pi0.engines.fast.network import make_rotation

ROWS, INNER, KEYS = 5, 16, 300
MANY_ROWS = MOST_ROWS + 1  # whose products are not Triton's
# Relative L2. bfloat16 is rounded twice at 2^-9; e4m3 at 2^-4, and both sides may round apart.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.01, FP8: 0.05}


class TritonUnavailable(Exception):
    """Triton cannot be used; the message says why."""


def check(device: torch.device, dtype: torch.dtype, quantised: bool, config: Pi0Config) -> None:
    """Runs every kernel in a dtype on a device (the current one) and compares.

    Raises:
        TritonUnavailable: one does not compile, does not run or gives other numbers.
    """
    try:
        wanted = run_all(Fp8Kernels(), device, dtype, quantised, config)
        found = run_all(TritonKernels(), device, dtype, quantised, config)
    except (TritonError, RuntimeError, OSError, CalledProcessError) as why:
        raise TritonUnavailable(str(why)) from why
    limit = LIMITS[FP8 if quantised else dtype]
    for name in wanted:
        error = float((found[name] - wanted[name]).norm() / wanted[name].norm())
        if not error <= limit:  # a NaN is none
            raise TritonUnavailable(
                f"{name} differs from PyTorch's by {error:.2g}, more than {limit}"
            )


class Values:
    """Random tensors on a device, the same ones each time."""

    def __init__(self, device: torch.device, dtype: torch.dtype, quantised: bool) -> None:
        self.device, self.dtype, self.quantised = device, dtype, quantised
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def matrix(self, outputs: int, inner: int = INNER, bias: bool = False) -> Matrix:
        return Matrix(self(outputs, inner), self(outputs) if bias else None)

    def target(self) -> Matrix:
        """One that an operand is meant for."""
        scale = torch.ones(1, device=self.device) if self.quantised else None
        return Matrix(self(1, INNER), scale=scale)


def run_all(
    kernels: Fp8Kernels,
    device: torch.device,
    dtype: torch.dtype,
    quantised: bool,
    config: Pi0Config,
) -> dict[str, Tensor]:
    """Results of all kernels at a model's sizes, by name, in float32."""
    values = Values(device, dtype, quantised)
    results: dict[str, Any] = _run_vision(kernels, values, config.vision)
    for name, gemma in (("vlm", config.vlm), ("expert", config.expert)):
        found = _run_norms(kernels, values, gemma) | _run_attention(kernels, values, gemma)
        results |= {f"{name}.{kernel}": result for kernel, result in found.items()}
    found = _run_products(kernels, values, config.expert)
    results |= {f"expert.{kernel}": result for kernel, result in found.items()}
    return {name: _dequantise(result) for name, result in results.items()}


def _run_vision(kernels: Fp8Kernels, values: Values, config: SiglipConfig) -> dict[str, Any]:
    x, weight, bias = values(ROWS, config.width), *values(2, config.width).float()
    into = values.target()
    first = values.matrix(config.mlp_dim, bias=True)
    return {
        "vision.operand": kernels.operand(x, into),
        "vision.layer_norm": kernels.layer_norm(x, weight, bias, into),
        "vision.gelu": kernels.gelu(values(ROWS, INNER), first, into),
    }


def _run_norms(kernels: Fp8Kernels, values: Values, config: GemmaConfig) -> dict[str, Any]:
    x, norm = values(MANY_ROWS, config.width), values(2, config.width).float()
    into, out = values.target(), values.matrix(config.width)
    a, ones = values(MANY_ROWS, INNER), x.new_ones(x.shape)
    return {
        "operand": kernels.operand(x, into),
        "rms_norm": kernels.rms_norm(x, Norm(norm[0]), into),
        "adaptive_norm": kernels.rms_norm(x, Norm(*norm), into),
        "geglu": kernels.geglu(a, values.matrix(2 * config.mlp_dim), into),
        "residual": kernels.project(a, out, ones.clone()),
        "gated_residual": kernels.project(a, out, ones.clone(), norm[0]),
    }


def _run_products(kernels: Fp8Kernels, values: Values, config: GemmaConfig) -> dict[str, Any]:
    """Of few rows, with all that is done in one kernel; sizes are the model's."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = values.matrix((heads + 2 * kv_heads) * width, config.width)
    gate_up = values.matrix(2 * config.mlp_dim, config.width)
    down = values.matrix(config.width, config.mlp_dim)
    x, gate = values(ROWS, config.width) * config.width**-0.5, values(config.width).float()
    keys = values(2, 1, ROWS + 1, kv_heads, width)
    rotation = make_rotation(torch.arange(ROWS, device=values.device)[None], width)
    hidden = kernels.geglu(x, gate_up, down)
    ones = x.new_ones(x.shape)
    return {
        "own_queries": kernels.project_heads(x, qkv, rotation, *keys[:, :, 1:]),
        "own_keys": keys,
        "hidden": hidden,
        "added_product": kernels.project(hidden, down, ones.clone()),
        "gated_product": kernels.project(hidden, down, ones.clone(), gate),
    }


def _run_attention(kernels: Fp8Kernels, values: Values, config: GemmaConfig) -> dict[str, Any]:
    """Few queries, as the suffix has, and many, as the prefix; each with a mask and without."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    keys, no_queries = values(2, 1, ROWS, kv_heads, width), values(1, ROWS, 2 * kv_heads * width)
    rotation = make_rotation(torch.arange(ROWS, device=values.device)[None], width)
    kernels.split(no_queries, rotation, *keys)  # as in the VLM's last layer
    results = {"keys_alone": keys}
    for name, tokens in (("few", ROWS), ("many", MOST_QUERIES // heads + 1)):
        k, v = values(2, 1, KEYS + tokens, kv_heads, width)
        rotation = make_rotation(torch.arange(tokens, device=values.device)[None], width)
        qkv = values(1, tokens, (heads + 2 * kv_heads) * width)
        q = kernels.split(qkv, rotation, k[:, :tokens], v[:, :tokens])
        valid = values(1, KEYS + tokens) > 0
        results |= {
            f"{name}.queries": q,
            f"{name}.keys": k,
            f"{name}.values": v,
            f"{name}.attention": kernels.attend(q, k, v),
            f"{name}.masked_attention": kernels.attend(q, k, v, valid),
        }
    return results


def _dequantise(result: Any) -> Tensor:
    return result.values.float() * result.scale if isinstance(result, Rows) else result.float()
