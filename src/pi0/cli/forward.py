"""`pi0 trace` and `pi0 sample`: the model alone, without robots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi0.cli import options

if TYPE_CHECKING:
    import numpy as np

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
    weight_cache: options.WeightCache = False,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Run one forward pass and show the eleven stages, or those that an engine shows.

    Prints shape, dtype, statistics and time of each stage, and the parts of the attention mask with
    what uses them. Without --inputs the model reads random inputs.

    **Examples**

        pi0 trace pi0_base --cameras 2 --image-size 384 --tokens 32
        pi0 trace tiny --inputs in.npz --engine cpu:float32 --json
    """
    from dataclasses import asdict

    from pi0.checkpoint.load import open_checkpoint
    from pi0.cli.engine import load_engine
    from pi0.cli.show import print_json
    from pi0.engines.spec import EngineSpec
    from pi0.inputs import from_npz, random_inputs
    from pi0.trace import trace as run

    arrays = read_npz(inputs) if inputs else None
    size = image_side(arrays) or image_size
    opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
    spec = EngineSpec.parse(engine, dtype, device)
    asked = 1, cameras, tokens or opened.config.max_tokens
    batch, cameras, length = array_sizes(arrays) or asked
    with load_engine(opened, spec, cameras, length, size, batch, weight_cache) as made:
        model_inputs, noise = (
            from_npz(made.config, arrays)
            if arrays
            else random_inputs(made.config, cameras, length, seed)
        )
        traced = run(made, model_inputs, noise)
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
    steps: options.PolicySteps = None,
    sampler: options.Sampler = "euler",
    engine: options.Engine = "reference",
    device: options.Device = None,
    dtype: options.Dtype = None,
    weight_cache: options.WeightCache = False,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
) -> None:
    """Sample actions from model-level inputs, without any pre-processing.

    For comparing implementations: same inputs and noise in, actions in the model's units out.

    **Examples**

        pi0 sample pi0_base --inputs in.npz --out out.npz
        pi0 sample tiny --inputs in.npz --out out.npz --engine cpu:int8
    """
    import numpy as np

    from pi0.checkpoint.load import open_checkpoint
    from pi0.checkpoint.outputs import replacing, require_writable
    from pi0.cli.engine import load_engine
    from pi0.cli.show import print_line, step_progress
    from pi0.engines.spec import EngineSpec
    from pi0.inputs import from_npz

    require_writable(out, reads=(checkpoint, base, inputs))
    arrays = read_npz(inputs)
    opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
    spec = EngineSpec.parse(engine, dtype, device)
    batch, cameras, length = array_sizes(arrays) or (1, 1, 1)
    size = image_side(arrays)
    steps = steps or opened.steps
    with load_engine(opened, spec, cameras, length, size, batch, weight_cache) as made:
        model_inputs, noise = from_npz(made.config, arrays)
        with step_progress("denoising", steps) as on_step:
            actions = made.sample(model_inputs, noise, steps, on_step, None, sampler).numpy()
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
    print_hidden("not shown", traced.not_shown)
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


def print_hidden(what: str, hidden: dict[str, str]) -> None:
    """Prints stages that are not shown, those with the same reason on one line."""
    from pi0.cli.show import print_line

    for why in dict.fromkeys(hidden.values()):
        stages = ", ".join(name for name, reason in hidden.items() if reason == why)
        print_line(f"{what}: {stages} ({why})")


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    import zipfile

    import numpy as np

    from pi0.checkpoint.outputs import expand_user
    from pi0.errors import ObservationError

    try:
        with open(expand_user(path), "rb") as file:
            if not zipfile.is_zipfile(file):  # numpy would advise to unpickle it
                raise ValueError("another kind of file or a truncated one")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ObservationError(f"{path}: expected an .npz of arrays, found {error}.") from error


def image_side(arrays: dict[str, np.ndarray[Any, Any]] | None) -> int | None:
    """The image size of an inputs file; `from_npz` checks the rest of it."""
    images = (arrays or {}).get("images")
    return None if images is None or images.ndim != 5 else int(images.shape[-1])


def array_sizes(arrays: dict[str, np.ndarray[Any, Any]] | None) -> tuple[int, int, int] | None:
    """Rows, cameras and tokens of an inputs file, if it has them; `from_npz` checks the rest."""
    if not arrays or image_side(arrays) is None or "tokens" not in arrays:
        return None
    tokens = arrays["tokens"]
    return (*arrays["images"].shape[:2], tokens.shape[1]) if tokens.ndim == 2 else None
