"""`pi0 act`: images, a prompt and a state in, robot actions out."""

from __future__ import annotations

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
    robot: Annotated[
        str | None,
        typer.Option(
            help="generic, aloha, aloha_sim, libero or droid; default: what a LeRobot checkpoint "
            "says, else generic.",
            show_default=False,
        ),
    ] = None,
    steps: options.Steps = 10,
    seed: options.Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the chunk as .npy.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot of the chunk as .png.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="SentencePiece .model or tokenizer.json; default: the checkpoint's, else one in "
            "the caches of openpi and Hugging Face.",
            show_default=False,
        ),
    ] = None,
    norm_stats: Annotated[
        str | None,
        typer.Option(
            help="norm_stats.json, or `none` for states and actions in the model's units; default: "
            "the checkpoint's.",
            show_default=False,
        ),
    ] = None,
    norm_mode: Annotated[
        str | None,
        typer.Option(
            help="mean_std, quantiles or min_max; default: what a LeRobot checkpoint says, else "
            "mean_std.",
            show_default=False,
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="openpi or lerobot; default: the checkpoint's.", show_default=False),
    ] = None,
    prompt_mode: Annotated[
        str | None,
        typer.Option(help="openpi or lerobot; default: the checkpoint's.", show_default=False),
    ] = None,
    image_size: options.ImageSize = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Print the eleven stages, too (one more pass).")
    ] = False,
    engine: options.Engine = "reference",
    device: options.Device = None,
    dtype: options.Dtype = None,
    cache: options.Cache = False,
    as_json: options.Json = False,
) -> None:
    """Compute a chunk of actions from camera images, a prompt and a joint state.

    Camera names are the robot's; an unknown or a missing one is an error.

    **Examples**

        pi0 act demo --image base=base.png --image wrist=wrist.png \\
            --prompt "pick up the red cube" \\
            --state "0,0,0,0,0,0,0,0" --plot chunk.png
        pi0 act pi0_aloha --robot aloha --image cam_high=top.png \\
            --prompt "fold the towel" --state state.npy \\
            --out actions.npy --dtype bfloat16
    """
    import numpy as np
    import torch

    from pi0.checkpoint.files import replacing, require_writable
    from pi0.checkpoint.load import open_checkpoint
    from pi0.cli.forward import print_trace
    from pi0.cli.plot import plot_chunk, require_matplotlib
    from pi0.cli.show import byte_progress, print_json, print_line, step_progress
    from pi0.policy import Policy
    from pi0.policy.policy import choose_robot
    from pi0.trace import trace

    require_writable(out, plot)
    if plot:
        require_matplotlib()
    given = _split(image)
    values = _read_state(state)
    opened = open_checkpoint(checkpoint)
    table = choose_robot(robot, opened.folder)
    images = _read_images(table, given)
    with byte_progress("loading", opened.read_bytes) as progress:
        policy = Policy.from_checkpoint(
            opened,
            robot=table,
            engine=engine,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            norm_stats=norm_stats,
            norm_mode=norm_mode,
            resize=resize,
            prompt=prompt_mode,
            image_size=image_size,
            steps=steps,
            seed=seed,
            progress=progress,
            cache=cache,
        )
    observation = table.observation(images, values, prompt)
    with step_progress("denoising", steps) as on_step:
        result = policy.infer(observation, on_step=on_step)
    actions = result["actions"]
    if out:
        with replacing(out) as temporary, open(temporary, "wb") as file:
            np.save(file, actions)
    if plot:
        with replacing(plot) as temporary:
            plot_chunk(temporary, actions, prompt)
    if as_json:
        print_json({**result, "actions": actions.tolist(), "state": result["state"].tolist()})
        return
    if stages:
        config = policy.engine.config
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, config.horizon, config.action_dim, generator=generator)
        print_trace(trace(policy.engine, policy.prepare(observation), noise))
    print_actions(actions, result["timing"])
    for path in (out, plot):
        if path:
            print_line(f"wrote {path}")


def print_actions(actions: Actions, timing: dict[str, float]) -> None:
    """Prints the first rows of a chunk [H, D] and how long it took."""
    from pi0.cli.show import print_line, table

    table(
        f"Actions {list(actions.shape)}, the first {PRINTED_ROWS}",
        ["step", *(str(i) for i in range(min(actions.shape[1], PRINTED_COLUMNS)))],
        [
            [str(i), *(f"{value:.4f}" for value in row[:PRINTED_COLUMNS])]
            for i, row in enumerate(actions[:PRINTED_ROWS])
        ],
    )
    print_line(
        f"{timing['infer_ms']:.0f} ms for the actions, {timing['total_ms']:.0f} ms with images and "
        "prompt"
    )


def _split(options: list[str]) -> list[tuple[str, Path]]:
    from pi0.checkpoint.files import expand_user
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
        key = _camera_key(robot, name)
        if key in images:
            raise ObservationError(f"camera {name}: expected one picture for {key}, found two.")
        images[key] = _read_image(name, path)
    return images


def _camera_key(robot: Robot, name: str) -> str:
    from pi0.errors import ObservationError

    for camera in robot.cameras:
        if name in (*camera.names, camera.key):
            return camera.key
    known = ", ".join(camera.names[0] for camera in robot.cameras)
    raise ObservationError(
        f"camera {name}: expected one of {known} for robot {robot.name}, found {name!r}."
    )


def _read_image(name: str, path: Path) -> Any:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from pi0.errors import ObservationError

    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BIT_MODES:
                raise ObservationError(
                    f"image {name}: expected a picture of 8 bits a channel in {path}, found mode "
                    f"{image.mode}."
                )
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = "no such file" if not path.exists() else str(error)
        raise ObservationError(
            f"image {name}: expected a picture in {path}, found none ({reason})."
        ) from error


def _read_state(text: str) -> NDArray[np.float64]:
    import numpy as np

    from pi0.checkpoint.files import expand_user
    from pi0.errors import ObservationError

    try:
        if text.endswith(".npy"):
            return np.asarray(np.load(expand_user(text), allow_pickle=False), np.float64)
        words = text.replace(",", " ").split()
        if not words:
            raise ValueError("no number")
        return np.array([float(word) for word in words])
    except (ValueError, FileNotFoundError) as error:
        raise ObservationError(
            f'--state: expected numbers as in "0.1,0.2" or a .npy file, found {text!r} ({error}).'
        ) from error
