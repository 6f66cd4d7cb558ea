"""`pi0 diff`: are two checkpoints the same policy?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi0.cli import options

if TYPE_CHECKING:
    from pi0.checkpoint.diff import WeightsDiff
    from pi0.checkpoint.load import Checkpoint
    from pi0.policy.diff import Difference, PolicyDiff

SHOWN = 20  # rows of a table; --json has all


@options.with_policy
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
    wishes: options.PolicyOptions,
    base: options.Base = None,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Largest relative L2 of a tensor that counts as the same."),
    ] = 0,
    as_json: options.Json = False,
) -> None:
    """Tell whether two checkpoints are the same policy, whatever their layouts and dtypes.

    Compares all tensors that the model reads (values in bfloat16 and float32 after rounding to
    bfloat16), configuration, conventions, statistics and tokenizer. The options hold for both;
    --base for those that are adapters. Exit code 1 if anything differs.

    **Examples**

        pi0 diff pi0_base my_fine_tune
        pi0 diff my_adapter merged --base pi0_base --tolerance 1e-6
    """
    from pi0.checkpoint.diff import diff_weights
    from pi0.checkpoint.load import check
    from pi0.cli.show import byte_progress, print_json
    from pi0.policy import prepare
    from pi0.policy.diff import diff_policies

    left, right = opened = tuple(_open(path, base, horizon, max_tokens) for path in (a, b))
    _require_use(base, opened)
    for checkpoint in opened:  # what cannot be loaded is no policy
        check(checkpoint)
    policies = diff_policies(prepare(left, wishes), prepare(right, wishes))
    with byte_progress("comparing", sum(c.read_bytes for c in opened)) as progress:
        weights = diff_weights(left, right, tolerance, progress)
    if as_json:
        print_json(_data(opened, weights, policies))
    else:
        _print(opened, weights, policies)
    if weights.differences or policies.differences:
        raise typer.Exit(1)


def _open(path: Path, base: Path | None, horizon: int | None, max_tokens: int | None) -> Checkpoint:
    from pi0.checkpoint.load import open_checkpoint
    from pi0.checkpoint.locate import find_adapter

    adapter = find_adapter(path, named=False)
    return open_checkpoint(path, horizon, max_tokens, base if adapter else None)


def _require_use(base: Path | None, opened: tuple[Checkpoint, ...]) -> None:
    from pi0.errors import ConfigError

    if base and not any(checkpoint.adapter for checkpoint in opened):
        raise ConfigError(
            "base (--base): expected an adapter among the two, found full models. Leave it out."
        )


def _data(
    opened: tuple[Checkpoint, ...], weights: WeightsDiff, policies: PolicyDiff
) -> dict[str, Any]:
    from dataclasses import asdict

    paths = {name: str(c.path) for name, c in zip("ab", opened, strict=True)}
    same = not (weights.differences or policies.differences)
    return {**paths, "same": same, "weights": asdict(weights), "policy": asdict(policies)}


def _print(opened: tuple[Checkpoint, ...], weights: WeightsDiff, policies: PolicyDiff) -> None:
    from pi0.cli.show import print_line, table

    for name, checkpoint in zip("AB", opened, strict=True):
        dtypes = sorted({checkpoint.tensors[theirs].dtype for theirs in checkpoint.names.ours})
        print_line(
            f"{name}: {checkpoint.path}, layout {checkpoint.names.layout}, {', '.join(dtypes)}"
        )
    print_line("")
    if weights.differences:
        table(
            f"Tensors that differ, the largest {SHOWN} at most",
            ["tensor", "what", "rel. L2", "PCC", "max abs"],
            [
                [d.name, d.what, *_numbers([(d.rel_l2, ".1e"), (d.pcc, ".6f"), (d.max_abs, ".1e")])]
                for d in weights.differences[:SHOWN]
            ],
            left=2,
        )
    if policies.differences:
        rows = [
            [d.what, _short(d.a), _short(d.b), _names(d.also), d.remedy]
            for d in policies.differences
        ]
        columns = ["what", "A", "B", "also affects", "set with"]
        table("Settings that differ", columns, rows, left=5)
    for dtype, rounded in weights.rounded.items():
        were = "tensor was" if rounded == 1 else "tensors were"
        print_line(f"{rounded} {were} rounded to {dtype}, in which one of the two is stored")
    if policies.not_compared:
        print_line(f"conventions and tokenizer not compared. {policies.not_compared}")
    print_line(_verdict(weights, policies))


def _numbers(values: list[tuple[float | None, str]]) -> list[str]:
    return ["" if value is None else format(value, form) for value, form in values]


def _names(differences: tuple[Difference, ...]) -> str:
    """What they are of, each once: "statistics.actions" for its offset and for its scale."""
    names = [d.what.partition("[")[0].partition(":")[0] for d in differences]
    return ", ".join(dict.fromkeys(_statistics_of(name) for name in names))


def _statistics_of(name: str) -> str:
    return name.rpartition(".")[0] if name.startswith("statistics.") else name


def _short(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _verdict(weights: WeightsDiff, policies: PolicyDiff) -> str:
    from pi0.cli.show import count

    tensors, settings = len(weights.differences), len(policies.differences)
    if tensors or settings:
        found = (
            f"different: {count(tensors, 'tensor')} ({weights.compared} compared), "
            f"{count(settings, 'setting')}"
        )
        return f"{found} of those compared" if policies.not_compared else found
    what = "the same weights" if policies.not_compared else "the same policy"
    within = f", {weights.within} of them within the tolerance" if weights.within else ""
    return f"{what}: {count(weights.compared, 'tensor')}{within}"
