"""`pi0 train`: recorded episodes in, a checkpoint out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi0.cli import options

if TYPE_CHECKING:
    from pi0.train.loop import Outcome
    from pi0.train.prepare import TrainOptions


def train(
    start: Annotated[
        str,
        typer.Argument(
            metavar="CKPT|PRESET|SIZES",
            help="What to start from: a checkpoint; or random weights in the sizes of a preset, or "
            "of a .json or .toml file.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="LeRobotDataset v3 folder.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run.", show_default=False)
    ] = None,
    robot: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="The robot that the data were recorded with, as for pi0 act; default: what "
            "config.json of the checkpoint names, else generic.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run.")] = 30_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in each step.")] = 32,
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise and time for each sample.")] = 1,
    learning_rate: Annotated[
        float,
        typer.Option(help="The highest; about 1e-3 for small models from random weights."),
    ] = 2.5e-5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps to the highest learning rate.")] = 1000,
    final: Annotated[
        float, typer.Option(help="Last learning rate, as a fraction of the highest (cosine).")
    ] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Weight decay, of matrices.")] = 1e-10,
    clip: Annotated[float, typer.Option(help="Norm that gradients are clipped to.")] = 1.0,
    ema: Annotated[
        float, typer.Option(help="Decay of the saved moving average of the weights; 0: none.")
    ] = 0.99,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Parameters that are not trained, such as 'vision_tower.*'.",
            show_default=False,
        ),
    ] = None,
    aux: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN[@BLOCK]",
            help="Also predict a column of the dataset from the text tokens of a block of the VLM "
            "(default: the last but one).",
            show_default=False,
        ),
    ] = None,
    aux_weight: Annotated[
        float, typer.Option(help="Weight of the losses of --aux and --point.")
    ] = 1.0,
    lora: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="RANK",
            help="Train a LoRA adapter of this rank; a PEFT folder is written.",
            show_default=False,
        ),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="Alpha of the adapter; default: the rank.", show_default=False),
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Linear layers that the adapter changes, by name; default: attention and MLP of "
            "both trunks, and the projections of state, actions and time.",
            show_default=False,
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN[@BLOCK]",
            help="Also predict which patch of the first camera's picture holds a column's points, "
            "(u, v) in [0, 1]; block as in --aux.",
            show_default=False,
        ),
    ] = None,
    crop: Annotated[
        float, typer.Option(help="Random crops, as a fraction of the image's side; 1: none.")
    ] = 0.95,
    rotate: Annotated[float, typer.Option(help="Random rotation, in degrees; 0: none.")] = 5.0,
    colour: Annotated[
        float, typer.Option(help="Random colours, as a factor of openpi's; 0: none.")
    ] = 1.0,
    image_size: options.ImageSize = None,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="openpi or lerobot: whose files are written, and whose preprocessing; default: "
            "the checkpoint's, else openpi.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="dtype of saved weights: float32 or bfloat16.")
    ] = "float32",
    tokenizer: options.TokenizerFile = None,
    norm_stats: Annotated[
        Path | None,
        typer.Option(help="norm_stats.json; default: measured on the data.", show_default=False),
    ] = None,
    state_in_prompt: options.StateInPrompt = None,
    execute: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Actions of a chunk that are executed by default, n_action_steps of config.json; "
            "default: as the checkpoint says, else all.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of weights, noise, order and augmentation.")
    ] = 0,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N; default: a GPU if there is one.", show_default=False
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of a process; default: 1 for small models.",
            show_default=False,
        ),
    ] = None,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Matrix products in bfloat16; weights stay float32.")
    ] = False,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples computed at once, with gradients accumulated; default: all.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Cut weights and optimizer among the processes of torchrun (FSDP)."
        ),
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Gradient checkpointing: less memory, more time.")
    ] = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile.")] = False,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.")] = 100,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 1000,
    keep: Annotated[int, typer.Option(min=0, help="Newest checkpoints to keep; 0: all.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print the memory that this needs; train nothing.")
    ] = False,
) -> None:
    """Train a policy on recorded episodes.

    Writes OUT/checkpoints/STEP in the form that every command reads, OUT/last, a link to the
    newest, a log, a plot of the losses, and the state from which --resume goes on, bit for bit.
    Ctrl-C and SIGTERM save before the run ends. torchrun trains in several processes.

    **Examples**

        pi0 train pi0_base --data my_data --out my_run --robot libero \\
            --bfloat16 --recompute
        pi0 train tiny --data my_data --out my_run --robot libero \\
            --learning-rate 1e-3 --draws 4
        pi0 train pi0_base --estimate --robot libero --lora 16 \\
            --bfloat16 --batch-size 4
        pi0 act my_run/last --robot libero ...
    """
    from pi0.errors import ConfigError
    from pi0.train.augment import Augmentation
    from pi0.train.loop import LoopOptions
    from pi0.train.lora import TARGETS, LoraOptions
    from pi0.train.optimizer import OptimizerOptions
    from pi0.train.prepare import TrainOptions, parse_head
    from pi0.train.start import find_start, require_weights, set_threads
    from pi0.train.trainer import TrainerOptions

    if lora is None and (lora_alpha, lora_targets) != (None, None):
        raise ConfigError(
            "--lora-alpha, --lora-targets: expected --lora RANK beside them, found none."
        )
    augmentation = Augmentation(crop, rotate, colour)
    wanted = TrainOptions(
        robot=robot,
        layout=layout,
        dtype=dtype,
        tokenizer=tokenizer,
        norm_stats=norm_stats,
        state_in_prompt=state_in_prompt,
        execute=execute,
        heads=tuple(map(parse_head, aux or ())),
        head_weight=aux_weight,
        points=tuple(map(parse_head, point or ())),
        freeze=tuple(freeze or ()),
        lora=LoraOptions(lora, lora_alpha, lora_targets or TARGETS) if lora else None,
        batch_size=batch_size,
        draws=draws,
        seed=seed,
        augmentation=augmentation if augmentation != Augmentation(1, 0, 0) else None,
        optimizer=OptimizerOptions(
            steps=steps,
            learning_rate=learning_rate,
            warmup=warmup,
            final=final,
            weight_decay=weight_decay,
            clip=clip,
            ema=ema,
        ),
        trainer=TrainerOptions(micro_batch, bfloat16, recompute, compile_model, shard),
    )
    found = find_start(start, base, image_size=image_size, horizon=horizon, max_tokens=max_tokens)
    if estimate:
        _print_estimate(found, wanted)
        return
    if data is None or out is None:
        raise ConfigError("--data and --out: expected a folder for each, found none.")
    require_weights(found)
    set_threads(threads, found.config)
    outcome = _run(
        found, data, out, wanted, LoopOptions(log_every, save_every, keep), device, resume
    )
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)


def _run(
    start: Any,
    data: Path,
    out: Path,
    wanted: TrainOptions,
    loop: Any,
    device: str | None,
    resume: bool,
) -> Outcome:
    from pi0.checkpoint.outputs import expand_user
    from pi0.cli.show import print_line
    from pi0.data.read import Dataset
    from pi0.train.loop import keep_folder, require_folder, train
    from pi0.train.prepare import prepare_run, settings_of
    from pi0.train.processes import join_processes

    out = expand_user(out)
    with join_processes(device) as processes, contextlib.ExitStack() as stack:
        require_folder(out, resume)
        dataset = Dataset.open(data)
        stack.enter_context(keep_folder(out, processes.first))
        with _decoding() as decoded:
            run = prepare_run(start, dataset, out, wanted, processes, decoded)
        if processes.first:
            trained = sum(p.numel() for p in run.trainer.parameters.values())
            how = f"resuming {out}, which began from" if resume else "training from"
            begin = "random weights" if start.checkpoint is None else start.checkpoint.path
            on = f"{processes.count} × " * (processes.count > 1) + str(processes.device)
            print_line(
                f"{how} {begin} on {on}: {dataset.num_episodes} episodes, {dataset.num_frames} "
                f"frames, {trained:,} trainable parameters"
            )
        settings = settings_of(start, dataset, wanted)
        with _display(wanted.optimizer.steps, run.trainer, processes.first) as shown:
            outcome = train(run, out, settings, loop, resume, *shown)
        if processes.first:
            _print_outcome(outcome)
        return outcome


@contextlib.contextmanager
def _decoding() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each camera whose pictures are decoded; yields what to call for each."""
    from pi0.cli.show import Advance, step_progress

    bars: dict[str, Advance] = {}
    with contextlib.ExitStack() as shown:

        def advance(camera: str, total: int, done: int) -> None:
            if camera not in bars:
                shown.close()  # of the camera before
                bars[camera] = shown.enter_context(step_progress(f"decoding {camera}", total))
            bars[camera](done)

        yield advance


@contextlib.contextmanager
def _display(
    steps: int, trainer: Any, first: bool
) -> Iterator[tuple[Callable[[dict[str, float]], None], Callable[[dict[str, float]], None]]]:
    """A bar with time left and loss, and a line for every interval; yields what the first process
    calls after a step and after an interval."""
    from pi0.cli.show import print_line, step_progress
    from pi0.train.log import describe

    with step_progress("training", steps) if first else contextlib.nullcontext() as advance:
        if advance:
            advance(trainer.done)

        def on_step(metrics: dict[str, float]) -> None:
            if advance:
                advance(text=f"training, loss {metrics['flow']:.4f}")

        def on_log(entry: dict[str, float]) -> None:
            print_line(describe(entry, steps))

        yield on_step, on_log


def _print_estimate(start: Any, wanted: TrainOptions) -> None:
    """What one process on one device needs, with full prompts from all of the robot's cameras."""
    from pi0.cli.show import human_bytes, print_line, table
    from pi0.train.estimate import estimate
    from pi0.train.prepare import change_model

    config, options = start.config, wanted.trainer
    robot = start.robot(wanted.robot)
    size = min(options.micro_batch or wanted.batch_size, wanted.batch_size)
    memory = estimate(
        config,
        lambda model: change_model(model, wanted, []),
        options,
        batch=size,
        cameras=len(robot.cameras),
        tokens=config.max_tokens,
        draws=wanted.draws,
        ema=wanted.optimizer.ema > 0,
    )
    parts = {name: human_bytes(value) for name, value in vars(memory).items()}
    parts["moving average"] = parts.pop("average")
    parts["forward and backward"] = parts.pop("passes") + f" (batch of {size})"
    print_line(
        f"{start.name}: {len(robot.cameras)} cameras of {config.vision.image_size} px, "
        f"{config.max_tokens} tokens, draws of noise and time: {wanted.draws}"
    )
    table(
        "Memory on one device",
        ["", "bytes"],
        [*([name, text] for name, text in parts.items()), ["total", human_bytes(memory.total)]],
    )


def _print_outcome(outcome: Outcome) -> None:
    """Says where the checkpoint is."""
    from pi0.cli.show import print_line

    if outcome.signal is None:
        print_line(f"wrote {outcome.checkpoint}")
        return
    print_line(
        f"stopped after step {outcome.step}; wrote {outcome.checkpoint}. Go on with the same "
        "command and --resume."
    )
