"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="Checkpoint folder, .safetensors file or shard index.",
        show_default=False,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        help="Engine that computes: reference (plain PyTorch), cpu and cuda (fast), ttnn (a "
        "Tenstorrent card) or ttnn-host (its numerics, on the host)."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu or cuda; for engine ttnn the number of a card; default: the engine's.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="The engine's precision, e.g. float32 or bfloat16; default: the engine's first.",
        show_default=False,
    ),
]
Cache = Annotated[
    bool,
    typer.Option(
        "--weight-cache",
        help="Keep the weights, packed for the engine, in a file beside the checkpoint: the next "
        "start takes them from there.",
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Pixels; default: the checkpoint's.", show_default=False),
]
Cameras = Annotated[int, typer.Option(min=1, help="Cameras.")]
Tokens = Annotated[
    int | None,
    typer.Option(min=1, help="Text tokens; default: the checkpoint's.", show_default=False),
]
Horizon = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Actions in a chunk, where the checkpoint does not declare it.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens that prompts are padded to, where the checkpoint does not declare it.",
        show_default=False,
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        metavar="IN.npz", help="Inputs and noise as for `pi0 sample`.", show_default=False
    ),
]
