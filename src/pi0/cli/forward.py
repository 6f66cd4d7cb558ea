"""`pi0 trace` and `pi0 sample`: the model alone, without robots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi0.cli import options

if TYPE_CHECKING:
    import numpy as np

    from pi0.checkpoint.load import Checkpoint
    from pi0.engines.base import Engine
    from pi0.trace import Trace

InputsFile = Annotated[
    Path,
    typer.Option(
        "--inputs",
        metavar="IN.npz",
        help="images (B,N,3,S,S) float32 in [-1,1], img_masks (B,N) bool, tokens (B,T) int64, "
        "token_masks (B,T) bool, state (B,32) and noise (B,50,32) float32.",
        show_default=False,
    ),
]


def trace(
    checkpoint: options.Checkpoint,
    image_size: options.ImageSize = None,
    cameras: options.Cameras = 2,
    tokens: options.Tokens = None,
    inputs: options.Inputs = None,
    engine: options.Engine = "reference",
    device: options.Device = None,
    dtype: options.Dtype = None,
    cache: options.Cache = False,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Run one forward pass and show the eleven stages, or those that an engine shows.

    Shape, dtype, statistics and time of each, and the parts of the attention mask with who uses
    them. Without --inputs the model reads noise.

    **Examples**

        pi0 trace pi0_base --cameras 2 --image-size 384 --tokens 32
        pi0 trace tiny --inputs in.npz --json
    """
    from dataclasses import asdict

    from pi0.checkpoint.load import open_checkpoint
    from pi0.cli.show import print_json
    from pi0.inputs import from_npz, random_inputs
    from pi0.trace import trace as run

    arrays = read_npz(inputs) if inputs else None
    size = image_side(arrays) or image_size
    opened = open_checkpoint(checkpoint, horizon, max_tokens)
    _require_memory(opened, engine, device, dtype, size, cache, arrays, cameras, tokens)
    machine = _engine(opened, engine, device, dtype, size, cache)
    config = machine.config
    model_inputs, noise = (
        from_npz(config, arrays)
        if arrays
        else random_inputs(config, cameras, tokens or config.max_tokens, seed)
    )
    traced = run(machine, model_inputs, noise)
    if as_json:
        print_json(asdict(traced))
    else:
        print_trace(traced)


def sample(
    checkpoint: options.Checkpoint,
    inputs: InputsFile,
    out: Annotated[
        Path,
        typer.Option(metavar="OUT.npz", help="Written: actions (B,50,32).", show_default=False),
    ],
    steps: options.Steps = 10,
    engine: options.Engine = "reference",
    device: options.Device = None,
    dtype: options.Dtype = None,
    cache: options.Cache = False,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
) -> None:
    """Sample actions from model-level inputs, without any pre-processing.

    For comparing implementations: same inputs and noise in, actions in the model's units out.

    **Examples**

        pi0 sample pi0_base --inputs in.npz --out out.npz
        pi0 sample tiny --inputs in.npz --out out.npz --dtype bfloat16
    """
    import numpy as np

    from pi0.checkpoint.files import replacing, require_writable
    from pi0.checkpoint.load import open_checkpoint
    from pi0.cli.show import print_line, step_progress
    from pi0.inputs import from_npz

    require_writable(out)
    arrays = read_npz(inputs)
    opened = open_checkpoint(checkpoint, horizon, max_tokens)
    _require_memory(opened, engine, device, dtype, image_side(arrays), cache, arrays)
    machine = _engine(opened, engine, device, dtype, image_side(arrays), cache)
    model_inputs, noise = from_npz(machine.config, arrays)
    with step_progress("denoising", steps) as on_step:
        actions = machine.sample(model_inputs, noise, steps, on_step).numpy()
    with replacing(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, actions=actions)
    print_line(f"{out}: actions {list(actions.shape)}, std {actions.std():.4f}")


def print_trace(traced: Trace) -> None:
    """Prints the stage table and how the sequence is made up."""
    from pi0.cli.show import human_dims, print_line, table

    table(
        "Stages (ms since the stage before; velocity: the whole pass)",
        ["stage", "shape", "dtype", "min", "max", "mean", "std", "ms"],
        [
            [
                row.stage,
                human_dims(row.shape),
                row.dtype,
                *(f"{value:.3f}" for value in (row.min, row.max, row.mean, row.std)),
                f"{row.ms:.1f}",
            ]
            for row in traced.stages
        ],
        left=3,
    )
    if traced.not_shown:
        print_line(f"not shown by this engine: {', '.join(traced.not_shown)}")
    print_line(f"sequence: prefix {traced.prefix} + suffix {traced.suffix} = {traced.total}")
    if traced.slices:
        table(
            "",
            ["mask slice", "shape", "visible", "used by"],
            [
                [part.name, str(part.shape), f"{part.visible:.1%}", part.used_by]
                for part in traced.slices
            ],
            left=4,
        )


def _require_memory(
    opened: Checkpoint,
    engine: str,
    device: str | None,
    dtype: str | None,
    image_size: int | None,
    cache: bool,
    arrays: dict[str, np.ndarray[Any, Any]] | None,
    cameras: int = 1,
    tokens: int | None = None,
) -> None:
    """Compares what a forward pass needs with what is free, where the host does the work and does
    not map its weights from a file."""
    from pi0.checkpoint.estimate import require_memory_for
    from pi0.engines.base import choose_precision

    if engine in ("cuda", "ttnn") or (device or "").startswith("cuda") or cache:
        return
    batch, tokens = 1, tokens or opened.config.max_tokens
    if arrays and "tokens" in arrays and image_side(arrays) and arrays["tokens"].ndim == 2:
        batch, tokens = arrays["tokens"].shape
        cameras = arrays["images"].shape[1]
    precision = choose_precision(engine, dtype)
    require_memory_for(opened, engine, precision, cameras, tokens, image_size, batch)


def _engine(
    opened: Checkpoint,
    engine: str,
    device: str | None,
    dtype: str | None,
    image_size: int | None,
    cache: bool,
) -> Engine:
    from pi0.cli.show import byte_progress
    from pi0.engines.base import make_engine

    with byte_progress("loading", opened.read_bytes) as progress:
        return make_engine(engine, opened, device, dtype, image_size, progress, cache)


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    import zipfile

    import numpy as np

    from pi0.checkpoint.files import expand_user
    from pi0.errors import ObservationError

    try:
        with open(expand_user(path), "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ObservationError(f"{path}: expected an .npz of arrays, found {error}.") from error


def image_side(arrays: dict[str, np.ndarray[Any, Any]] | None) -> int | None:
    """The image size of an inputs file; `from_npz` checks the rest of it."""
    images = (arrays or {}).get("images")
    return None if images is None or images.ndim != 5 else int(images.shape[-1])
