"""How far TTNN's numbers, computed on the host, are from the reference: stages and actions.

    python benchmarks/ttnn_error.py CKPT --precision fast    # needs: ttnn

Chained: the engine lives with its own errors. Errors of stages are relative to the reference's
norm; that of the actions to what the model moved, ‖a − a_ref‖ / ‖a_ref − noise‖, beside PCC and
the least-squares gain of the movement. Of the blocks of a tower the worst is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import Engine, make_engine
from pi0.inputs import ModelInputs, random_inputs


def stages(engine: Engine, inputs: ModelInputs, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every stage of a prefix and one step, by name."""
    seen: dict[str, torch.Tensor] = {}

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        seen[name] = value.double().clone()
        return value

    engine.velocity(noise, torch.ones(1), engine.prefill(inputs, tap), tap)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", default="accurate")
    parser.add_argument("--cameras", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.checkpoint)
    inputs, noise = random_inputs(checkpoint.config, options.cameras, options.tokens, 0)
    results = []
    for spec in ("reference", f"ttnn-host:{options.precision}"):
        with make_engine(spec, checkpoint) as engine:
            of_stages = stages(engine, inputs, noise)
            results.append((of_stages, engine.sample(inputs, noise, options.steps)))
    (wanted, right), (found, ours) = results
    worst: dict[str, tuple[float, float]] = {}
    for name, value in wanted.items():
        key = name.partition(".block")[0] + (" block" if ".block" in name else "")
        row = pcc(found[name], value), float((found[name] - value).norm() / value.norm())
        worst[key] = max(worst.get(key, row), row, key=lambda of: of[1])
    for key, (correlation, error) in worst.items():
        print(f"{key:28} {correlation:.6f} ({error:.1e})")
    moved, ours_moved = (actions.double() - noise for actions in (right, ours))
    error = float((ours_moved - moved).norm() / moved.norm())
    gain = float((ours_moved * moved).sum() / moved.square().sum())
    print(f"{'actions':28} {pcc(ours, right):.6f} ({error:.1e} of the movement), gain {gain:.4f}")


def pcc(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


if __name__ == "__main__":
    main()
