"""What eight bits cost: `python benchmarks/int8.py CKPT`.

Actions with some of the matrices in int8 beside actions in float32, same inputs and noise; and what
becomes of it if the scales of norms are folded into the matrices that follow before these are
quantised. --outliers gives every hundredth channel of every norm of Gemma a scale 30 times as
large, as trained models have and random ones do not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.engines.fast.cpu.engine import choose_kernels
from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import make_token_plan
from pi0.engines.fast.weights import Matrix, PackedWeights, Scheme, pack, quantise_rows
from pi0.inputs import random_inputs
from pi0.verify.compare import compare

GROUPS = {
    "vision attention": r"vision_tower\..*\.(qkv|out_proj)",
    "vision MLP": r"vision_tower\..*\.fc.",
    "projector": "projector",
    "VLM attention": r"vlm\..*\.(qkv|kv|o_proj)",
    "VLM gate and up": r"vlm\..*\.gate_up\..*",
    "VLM down": r"vlm\..*\.down\..*",
    "expert attention": r"expert\..*\.(qkv|o_proj)",
    "expert gate and up": r"expert\..*\.gate_up\..*",
    "expert down": r"expert\..*\.down\..*",
    "all": ".*",
}


@torch.inference_mode()
def packed(
    checkpoint: Checkpoint, pattern: str | None, outliers: bool, fold: bool
) -> PackedWeights:
    """Weights of which the matrices that match are quantised."""
    late = outliers or fold  # norms are changed first
    dtype_by_pattern = {} if late or pattern is None else {pattern: torch.int8}
    weights = pack(checkpoint, Scheme(torch.float32, dtype_by_pattern))
    if outliers:
        for name, tensor in weights.tensors.items():
            if name.endswith(("norm1.weight", "norm2.weight")) and "vision" not in name:
                tensor[::100] *= 30
    if fold:
        fold_norms(weights)
    if late and pattern is not None:
        weights.scheme = Scheme(torch.float32, {pattern: torch.int8})
        for name, matrix in weights.matrices.items():
            if weights.scheme.dtype_of(name) == torch.int8:
                values, scale = quantise_rows(matrix.weight, torch.int8)
                weights.matrices[name] = Matrix(values, matrix.bias, scale)
    return weights


def fold_norms(weights: PackedWeights) -> None:
    for name, norm in weights.tensors.items():
        block, _, which = name.removesuffix(".weight").rpartition(".")
        if which in ("norm1", "norm2") and "vision" not in name:
            readers = ("qkv", "kv") if which == "norm1" else ("gate_up",)
            for matrix, value in weights.matrices.items():
                if matrix.startswith(block + ".") and matrix.split(".")[3] in readers:
                    value.weight *= norm
            norm.fill_(1)


@torch.inference_mode()
def actions(weights: PackedWeights, seeds: int) -> Tensor:
    config = weights.config
    kernels = choose_kernels()
    kernels.prepare(weights)
    network = Network(weights, kernels)
    inputs, _ = random_inputs(config, 3, config.max_tokens, 0)
    plan = make_token_plan(inputs, config.vision.num_patches, config.suffix_len)
    cache = network.prefill(inputs, plan)

    noises = (
        torch.randn(
            1, config.horizon, config.action_dim, generator=torch.Generator().manual_seed(i)
        )
        for i in range(seeds)
    )
    times = network.step_times(10)
    return torch.stack([network.denoise(noise, times, cache) for noise in noises])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outliers", action="store_true")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.checkpoint)

    def run(pattern: str | None, fold: bool) -> Tensor:
        return actions(packed(checkpoint, pattern, args.outliers, fold), args.seeds)

    exact = run(None, False)
    print(f"worst of {args.seeds} noises\n\n| in int8 | PCC | relative L2 |\n|---|---|---|")
    rows: list[tuple[str, str, bool]] = [(name, p, False) for name, p in GROUPS.items()]
    rows.append(("all, norms folded first", ".*", True))
    for name, pattern, fold in rows:
        found = [compare(a, b) for a, b in zip(exact, run(pattern, fold), strict=True)]
        pcc, error = min(f.pcc for f in found), max(f.rel_l2 for f in found)
        print(f"| {name} | {pcc:.7f} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
