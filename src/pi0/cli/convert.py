"""`pi0 convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pi0.cli import options


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Checkpoint of any kind.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ],
    to: Annotated[
        str, typer.Option("--to", help="openpi (PyTorch), lerobot or jax.", show_default=False)
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16 or float32; default: as stored, and float32 where LoRA is merged.",
            show_default=False,
        ),
    ] = None,
    base: options.Base = None,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    norm_stats: options.NormStats = None,
    norm_mode: Annotated[
        str | None,
        typer.Option(
            help="With --to lerobot, how openpi's policy normalises: mean_std, quantiles or "
            "min_max; default: mean_std for π0 and quantiles for π0.5.",
            show_default=False,
        ),
    ] = None,
    state_in_prompt: options.StateInPrompt = None,
    tokenizer: options.TokenizerFile = None,
) -> None:
    """Write a checkpoint in another project's form, with LoRA merged.

    Sources are all checkpoints that are read: openpi's (JAX and PyTorch), LeRobot's, transformers',
    older ones, PEFT adapters. The folder gets the weights under the target's names, its
    config.json, its form of normalisation statistics, and the source's tokenizer. What the target
    cannot say, or needs and the source does not have, is a warning or an error.

    **Examples**

        pi0 convert pi0_base pi0_pytorch --to openpi
        pi0 convert pi0_base pi0_lerobot --to lerobot --dtype float32
        pi0 convert pi0_base pi0_jax --to jax --horizon 50
    """
    from pi0.checkpoint.convert import convert as write
    from pi0.checkpoint.convert import parse_target
    from pi0.checkpoint.load import open_checkpoint
    from pi0.checkpoint.outputs import expand_user
    from pi0.cli.show import byte_progress, human_bytes, print_line
    from pi0.dtypes import parse_dtype
    from pi0.findings import enforce
    from pi0.policy.export import export_files

    parse_target(to)
    wanted = parse_dtype(dtype) if dtype else None
    checkpoint = open_checkpoint(source, horizon, max_tokens, base)
    stored = {info.dtype for info in checkpoint.tensors.values()}
    precision = dtype or ("bfloat16" if stored == {"BF16"} else "float32")
    export = export_files(
        checkpoint, to, precision, norm_stats, tokenizer, norm_mode, state_in_prompt
    )
    enforce(export.findings)
    out = expand_user(out)
    with byte_progress(f"writing {out.name}", checkpoint.read_bytes) as progress:
        write(checkpoint, out, to, export.files, wanted, progress)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print_line(f"{out}: {to}, {human_bytes(size)}")
