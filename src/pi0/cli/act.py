"""`pi0 act`: images, a prompt and a state in, robot actions out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi0.cli import options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pi0.policy import Robot

    Actions = NDArray[np.float32]

PRINTED_ROWS = 5
PRINTED_COLUMNS = 8
EIGHT_BIT_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # others PIL would clip


@options.with_policy
def act(
    checkpoint: options.Checkpoint,
    image: Annotated[
        list[str],
        typer.Option(metavar="CAMERA=FILE", help="One for each camera.", show_default=False),
    ],
    prompt: Annotated[str, typer.Option(help="What the robot is to do.", show_default=False)],
    state: Annotated[
        str,
        typer.Option(help='Joint state, "0.1,0.2,…" or a .npy file.', show_default=False),
    ],
    wishes: options.PolicyOptions,
    steps: options.PolicySteps = None,
    sampler: options.Sampler = "euler",
    seed: options.Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the chunk as .npy.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of the chunk as .png.", show_default=False)
    ] = None,
    save_inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="IN.npz",
            help="Write what the model reads, and the noise, as `pi0 sample` takes them.",
            show_default=False,
        ),
    ] = None,
    on_limit: Annotated[
        str, typer.Option(help="Actions beyond the robot's limits: error, clamp or warn.")
    ] = "error",
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Print the eleven stages, too (one more pass).")
    ] = False,
    engine: options.EngineOrAuto = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    weight_cache: options.WeightCache = False,
    as_json: options.Json = False,
) -> None:
    """Compute a chunk of actions from camera images, a prompt and a joint state.

    Camera names are the robot's; an unknown or a missing one is an error.

    **Examples**

        pi0 act demo --image base=base.png --image wrist=wrist.png \\
            --prompt "pick up the red cube" \\
            --state "0,0,0,0,0,0,0,0" --plot chunk.png
        pi0 act my_aloha --robot aloha --image cam_high=top.png \\
            --prompt "fold the towel" --state state.npy \\
            --out actions.npy --engine cpu:int8
        pi0 act my_arm --robot arm.toml --image top=top.png \\
            --prompt "wipe the table" --state "0,0,0,0,0,0"
    """
    import numpy as np

    from pi0.checkpoint.load import open_checkpoint
    from pi0.checkpoint.outputs import replacing, require_writable
    from pi0.cli.engine import load_engine
    from pi0.cli.forward import print_trace
    from pi0.cli.plot import plot_chunk, require_matplotlib
    from pi0.cli.show import print_json, print_line, step_progress
    from pi0.engines.memory import require_memory
    from pi0.inputs import to_npz
    from pi0.policy import Policy, choose_engine, prepare
    from pi0.trace import trace

    given = _split(image)
    files = [str(value) for value in (wishes.robot, wishes.tokenizer, wishes.norm_stats) if value]
    reads = [checkpoint, base, state, *files, *(path for _, path in given)]
    require_writable(out, plot, save_inputs, reads=reads)
    if plot:
        require_matplotlib()
    values = _read_state(state)
    opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
    setup = prepare(opened, wishes)
    pipeline = setup.require()
    table = pipeline.robot
    observation = pipeline.observation(_read_images(table, given), values, prompt)
    spec = choose_engine(engine, opened.config, dtype, device, wishes.image_size)
    sizes = len(given), pipeline.prompt.max_tokens, wishes.image_size
    require_memory(opened, spec, *sizes, loaded=weight_cache)
    inputs, _ = pipeline.encode(observation)  # what does not fit is said before weights are loaded
    made = load_engine(opened, spec, *sizes, weight_cache=weight_cache)
    steps = steps or setup.steps
    policy = Policy(
        pipeline,
        made,
        steps=steps,
        sampler=sampler,
        seed=seed,
        on_limit=on_limit,
        metadata=setup.describe(),
    )
    noise = policy.draw_noise()
    with policy:
        with step_progress("denoising", steps) as on_step:
            result = policy.infer(observation, noise=noise, on_step=on_step)
        traced = trace(made, inputs, noise) if stages else None
    actions = result["actions"]
    if out:
        with replacing(out) as temporary, open(temporary, "wb") as file:
            np.save(file, actions)
    if save_inputs:
        with replacing(save_inputs) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **to_npz(inputs, noise))
    if plot:
        with replacing(plot) as temporary:
            plot_chunk(
                temporary,
                actions,
                prompt,
                names=table.action_names,
                units=table.action_units,
                limits=list(zip(table.limits.low, table.limits.high, strict=True))
                if table.limits
                else None,
                rate_hz=table.control_hz,
            )
    if as_json:
        arrays = {name: v.tolist() for name, v in result.items() if isinstance(v, np.ndarray)}
        print_json({**result, **arrays, "policy": policy.metadata})
        return
    if traced:
        print_trace(traced)
    print_actions(actions, table.action_names, result["policy_timing"], spec.label)
    for path in (out, save_inputs, plot):
        if path:
            print_line(f"wrote {path}")


def print_actions(
    actions: Actions, names: tuple[str, ...], timing: dict[str, float], engine: str
) -> None:
    """Prints the first rows of a chunk [H, D], and how long it took."""
    from pi0.cli.show import print_line, table

    shown = min(actions.shape[1], PRINTED_COLUMNS)
    title = f"Actions {list(actions.shape)}: the first {PRINTED_ROWS} steps"
    if shown < actions.shape[1]:
        title += f", {shown} of {actions.shape[1]} columns (all: --out, --json)"
    table(
        title,
        ["step", *(names[:shown] or map(str, range(shown)))],
        [
            [str(i), *(f"{value:.4f}" for value in row[:shown])]
            for i, row in enumerate(actions[:PRINTED_ROWS])
        ],
    )
    print_line(
        f"engine {engine}: {timing['infer_ms']:.0f} ms for the actions, "
        f"{timing['total_ms']:.0f} ms with images and prompt"
    )


def _split(options: list[str]) -> list[tuple[str, Path]]:
    from pi0.checkpoint.outputs import expand_user
    from pi0.errors import ObservationError

    pairs = [option.partition("=") for option in options]
    for name, equals, path in pairs:
        if not name or not path:
            raise ObservationError(
                f"--image: expected CAMERA=FILE, found {name + equals + path!r}."
            )
    return [(name, expand_user(path)) for name, _, path in pairs]


def _read_images(robot: Robot, given: list[tuple[str, Path]]) -> dict[str, Any]:
    """The pictures by the robot's camera keys."""
    from pi0.errors import ObservationError

    images: dict[str, Any] = {}
    for name, path in given:
        key = robot.camera_key(name)
        if key is None:
            known = ", ".join((*camera.names, camera.key)[0] for camera in robot.cameras)
            raise ObservationError(
                f"camera {name}: expected one of {known} for robot {robot.name}, found {name!r}."
            )
        if key in images:
            raise ObservationError(f"camera {name}: expected one picture for {key}, found two.")
        images[key] = _read_image(name, path)
    return images


def _read_image(name: str, path: Path) -> Any:
    import numpy as np
    from PIL import Image, ImageOps

    from pi0.errors import ObservationError

    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BIT_MODES:
                raise ObservationError(
                    f"image {name}: expected a picture of 8 bits a channel in {path}, found mode "
                    f"{image.mode}."
                )
            # As viewers show it: phones store pictures lying on their sides.
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if not path.exists() else str(error)
        raise ObservationError(
            f"image {name}: expected a picture in {path}, found none ({reason})."
        ) from error


def _read_state(text: str) -> NDArray[np.float64]:
    import numpy as np

    from pi0.checkpoint.outputs import expand_user
    from pi0.errors import ObservationError

    try:
        if text.endswith(".npy"):
            with open(expand_user(text), "rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            if array.dtype.kind not in "uif":
                raise ValueError("no array of real numbers")
            return np.atleast_1d(array.astype(np.float64))
        words = re.split(r"\s*,\s*|\s+", text.strip())
        if "" in words:  # such as of an empty variable; the numbers after it would move up
            raise ValueError("a number is missing")
        if "_" in text:
            raise ValueError("an underscore")
        return np.array([float(word) for word in words])
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise ObservationError(
            f'--state: expected numbers as in "0.1,0.2" or a .npy file, found {text!r} ({error}).'
        ) from error
