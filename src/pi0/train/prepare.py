"""From what a user says to a trainer: dataset, robot, pipeline, statistics, tokenizer, model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pi0.checkpoint.infer import DEFAULT_STEPS
from pi0.checkpoint.layouts import LEROBOT, OPENPI
from pi0.config import PALIGEMMA_VOCABULARY, Pi0Config
from pi0.data.schema import ACTION, STATE
from pi0.data.statistics import OPENPI as OPENPI_STATISTICS
from pi0.dtypes import parse_dtype
from pi0.errors import ConfigError, Pi0Error
from pi0.findings import enforce
from pi0.model import Pi0
from pi0.number import is_count
from pi0.policy.normalize import OPENPI_MODES, Statistics, identity, make_normalizer
from pi0.policy.pipeline import Pipeline
from pi0.policy.robot import Robot
from pi0.policy.statistics import read_norm_stats
from pi0.policy.tokenizer import (
    FILE_NAMES,
    PromptFormat,
    Tokenizer,
    find_tokenizer,
    load_tokenizer_of,
)
from pi0.train import checks
from pi0.train.augment import Augmentation
from pi0.train.lora import LoraOptions, add_lora
from pi0.train.loss import AuxiliaryHead, PointingHead
from pi0.train.optimizer import OptimizerOptions
from pi0.train.processes import Processes
from pi0.train.samples import (
    Chunks,
    SampleOptions,
    Samples,
    measure_statistics,
    normalised_columns,
    points_of,
)
from pi0.train.save import ACTION_STEPS, STATE_FILE, Export
from pi0.train.start import Start, hash_files
from pi0.train.trainer import Trainer, TrainerOptions, freeze
from pi0.train.vocabulary import write_vocabulary

if TYPE_CHECKING:
    from pi0.data.read import Dataset

LAYOUTS = {"openpi": OPENPI, "lerobot": LEROBOT}
VOCABULARY = "tokenizer.json"
Progress = Callable[[str, int, int], None]  # what is done, of how many, how many more


@dataclass(frozen=True)
class TrainOptions:
    """What a user may say about a run, besides the dataset and what it starts from.

    Attributes:
        robot: a name, a `Robot`, or the path of a TOML file; None: `Start.robot`.
        layout: "openpi" or "lerobot", whose files and preprocessing; None: as the checkpoint that
            training starts from, else openpi's.
        dtype: of written weights, "float32" or "bfloat16".
        tokenizer: a file; None: the checkpoint's, or a vocabulary of the dataset's sentences.
        norm_stats: a norm_stats.json; None: measured on the dataset.
        state_in_prompt: of a π0.5; None: as the files of the checkpoint or the robot say, else yes.
        execute: actions of a chunk that a policy carries out by default; None: as the checkpoint
            that training starts from, else all.
        heads: (column, block) of auxiliary heads; a block of None: the last but one.
        head_weight: of their losses.
        points: as `heads`, of pointing heads.
        freeze: patterns of parameters that stay as they are.
        lora: train an adapter of a checkpoint; None: the model.
        seed: of random weights, of the order of frames, noise and augmentation.

    Raises:
        ConfigError: a value that has no meaning.
    """

    robot: str | Path | Robot | None = None
    layout: str | None = None
    dtype: str = "float32"
    tokenizer: Path | None = None
    norm_stats: Path | None = None
    state_in_prompt: bool | None = None
    execute: int | None = None
    heads: tuple[tuple[str, int | None], ...] = ()
    head_weight: float = 1.0
    points: tuple[tuple[str, int | None], ...] = ()
    freeze: tuple[str, ...] = ()
    lora: LoraOptions | None = None
    batch_size: int = 32
    draws: int = 1
    seed: int = 0
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed: expected 0 to {2**63 - 1}, found {self.seed}.")
        if not 0 <= self.head_weight < float("inf"):
            raise ConfigError(f"--aux-weight: expected 0 or more, found {self.head_weight:g}.")
        columns = [column for column, _ in (*self.heads, *self.points)]
        for column in columns:
            if columns.count(column) > 1:
                raise ConfigError(
                    f"--aux, --point: expected different columns, found {column} more than once."
                )


@dataclass(frozen=True)
class Run:
    """A trainer, and how its weights are written."""

    trainer: Trainer
    export: Export


def prepare_run(
    start: Start,
    dataset: Dataset,
    out: Path,
    options: TrainOptions,
    processes: Processes,
    progress: Progress = lambda *_: None,
) -> Run:
    """Everything that a run needs; a vocabulary that is made for it is written into `out`.

    Raises:
        Pi0Error: something is missing or does not fit.
    """
    config = start.config
    if options.lora and (start.checkpoint is None or start.checkpoint.adapter):
        raise ConfigError(
            f"--lora: expected the checkpoint of a full model to start from, found {start.name}."
        )
    robot = start.robot(options.robot)
    layout = LAYOUTS[_layout(start, options)]
    blocks, pointing = (
        {
            column: max(config.vlm.depth - 2, 0) if block is None else block
            for column, block in asked
        }
        for asked in (options.heads, options.points)
    )
    cameras = checks.match_cameras(dataset, robot)
    used = {STATE, ACTION, *blocks, *pointing, *cameras.values()}
    findings = dataset.check(decode=False, used=used)
    stated = bool(options.robot or start.declared_robot)
    findings += checks.examine(dataset, robot, config, blocks | pointing, stated)
    if start.checkpoint:
        findings += checks.examine_conventions(start.checkpoint, robot, bool(options.robot))
    enforce(findings)
    tokenizer = _tokenizer(start, dataset, out, options, processes)
    state = _state_in_prompt(start, robot, layout.name, options.state_in_prompt)
    pipeline = _pipeline(config, robot, tokenizer, layout.name, state)
    execute = _execute(start, options.execute)
    chunks = Chunks(dataset, config.horizon)
    statistics = _statistics(chunks, pipeline, options)
    pipeline = with_statistics(pipeline, statistics)
    with processes.first_alone():
        frames = {
            ours: dataset.frames(
                theirs, config.vision.image_size, pipeline.resize,
                progress=partial(progress, theirs, dataset.num_frames),
            )
            for ours, theirs in cameras.items()
        }  # fmt: skip
    columns = normalised_columns(dataset, list(blocks)) | points_of(dataset, list(pointing))
    samples = Samples(
        dataset,
        chunks,
        pipeline,
        frames,
        columns,
        SampleOptions(options.batch_size, options.draws, options.seed, options.augmentation),
    )
    enforce(checks.examine_values(dataset, samples))
    if start.checkpoint and options.norm_stats is None:
        enforce(checks.examine_statistics(start.checkpoint, statistics, robot))
    model = start.model(options.seed, processes.device)
    change_model(model, options, [*blocks.values(), *pointing.values()])
    heads = [
        AuxiliaryHead(name, columns[name].shape[1], block, options.head_weight, config.vlm)
        for name, block in blocks.items()
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # their weights are drawn
        pointers = [
            PointingHead(name, columns[name].shape[1] // 2, block, options.head_weight, config)
            for name, block in pointing.items()
        ]
    trainer = Trainer(
        model, samples, [*heads, *pointers], options.optimizer, options.trainer, processes
    )
    names = tuple(key.rpartition(".")[2] for key in cameras.values())
    export = Export(
        layout,
        parse_dtype(options.dtype),
        pipeline,
        names,
        statistics,
        execute,
        start.checkpoint.steps if start.checkpoint else DEFAULT_STEPS,
        options.lora,
        start.checkpoint.path if start.checkpoint else None,
    )
    return Run(trainer, export)


def parse_head(text: str) -> tuple[str, int | None]:
    """COLUMN[@BLOCK]."""
    column, at, block = text.partition("@")
    if not column or (at and not block.isdecimal()):
        raise ConfigError(f"--aux: expected COLUMN or COLUMN@BLOCK, found {text!r}.")
    return column, int(block) if at else None


def change_model(model: Pi0, options: TrainOptions, read_blocks: list[int]) -> None:
    """Adds the adapter that is asked for, and freezes what is not trained.

    Args:
        read_blocks: see `freeze`.

    Raises:
        Pi0Error: see `add_lora` and `freeze`.
    """
    if options.lora:
        add_lora(model, options.lora, options.seed)
    freeze(model, options.freeze, read_blocks)


def settings_of(start: Start, dataset: Dataset, options: TrainOptions) -> dict[str, str]:
    """What a run was asked for, as plain data: a run resumes only as itself. Of files and data
    there is a hash, since a name may mean something else by then."""
    robot = start.robot_name(options.robot)
    named = dict(_by_name(options)) | {
        "robot": robot.name if isinstance(robot, Robot) else str(robot),
        "start": start.name,
    }
    files = {
        name: [Path(named[name]).expanduser()] for name in ("robot", "tokenizer", "norm_stats")
    } | {"start": start.checkpoint.files if start.checkpoint else []}
    hashes = {
        name: f"{named[name]} with content {hash_files(paths)}"
        for name, paths in files.items()
        if paths and all(path.is_file() for path in paths)
    }
    columns = (STATE, ACTION, *(name for name, _ in (*options.heads, *options.points)))
    return (named | hashes) | {
        "config": repr(start.config),
        "frames": str(dataset.num_frames),
        "episodes": str(dataset.num_episodes),
        "data": f"{', '.join(columns)} and sentences with content {_hash_data(dataset, columns)}",
    }


def _hash_data(dataset: Dataset, columns: Sequence[str]) -> str:
    out = hashlib.sha256(dataset.episode_starts.tobytes())
    for name in columns:
        out.update(np.ascontiguousarray(dataset.column(name)).tobytes())
    out.update("\n".join(map(str, dataset.tasks)).encode())
    return out.hexdigest()[:8]


def _by_name(options: Any) -> Iterator[tuple[str, str]]:
    """Every option as text, also those of tables inside."""
    for each in fields(options):
        value = getattr(options, each.name)
        if is_dataclass(value):
            yield from _by_name(value)
        else:
            yield each.name, str(value)


def with_statistics(pipeline: Pipeline, statistics: Mapping[str, Statistics]) -> Pipeline:
    """The pipeline as `pi0.policy.prepare` makes it for a checkpoint with these statistics."""
    mode = OPENPI_MODES[pipeline.config.adaptive_norm].lower()
    state, actions = (
        make_normalizer(what, mode, pipeline.resize, statistics[what])
        for what in ("state", "actions")
    )
    return replace(pipeline, state_stats=state, action_stats=actions, target_stats=actions)


def _execute(start: Start, stated: int | None) -> int | None:
    horizon = start.config.horizon
    if stated is not None:
        if stated > horizon:
            raise ConfigError(
                f"--execute: expected at most the {horizon} actions of a chunk, found {stated}."
            )
        return stated
    declared = start.checkpoint.settings.get(ACTION_STEPS) if start.checkpoint else None
    if declared is None:
        return None
    if not (is_count(declared) and declared <= horizon):
        raise ConfigError(
            f"{start.name}: config.json {ACTION_STEPS}: expected 1 to {horizon} actions of a "
            f"chunk, found {declared!r}. Say how many with --execute."
        )
    return int(declared)


def _state_in_prompt(start: Start, robot: Robot, convention: str, stated: bool | None) -> bool:
    if start.config.state_tokens:
        if stated:
            raise ConfigError(
                "--state-in-prompt: expected a π0.5, whose prompt holds the state, found "
                f"{start.name}, a π0, which has a token of the state."
            )
        return False
    settings = start.checkpoint.settings if start.checkpoint else {}
    declared = settings.get("discrete_state_input")
    trained = robot.state_in_prompt if convention == "openpi" else None
    known = next((value for value in (stated, declared, trained) if value is not None), True)
    if convention == "lerobot" and not known:
        raise ConfigError(
            "--layout lerobot: expected prompts that hold the state, as LeRobot's π0.5 has them, "
            "found that they are to be without. Use --layout openpi, or --state-in-prompt."
        )
    return known


def _pipeline(
    config: Pi0Config, robot: Robot, tokenizer: Tokenizer, convention: str, state: bool
) -> Pipeline:
    """A pipeline without statistics; `state`: whether the prompt holds the state."""
    if convention == "lerobot" and robot.has_conventions:
        raise ConfigError(
            "--layout lerobot: expected a robot whose actions are absolute and without conventions "
            f"of its own, found {robot.name}: LeRobot's files would be written without them. "
            "Use --layout openpi, which also trains with openpi's preprocessing."
        )
    nothing = identity("state", config.state_dim), identity("actions", config.action_dim)
    return Pipeline(
        config=config,
        robot=robot,
        tokenizer=tokenizer,
        resize=convention,
        prompt=PromptFormat(convention, config.max_tokens, newline=not state, state=state),
        state_stats=nothing[0],
        action_stats=nothing[1],
        target_stats=nothing[1],
    )


def _statistics(
    chunks: Chunks, pipeline: Pipeline, options: TrainOptions
) -> Mapping[str, Statistics]:
    if options.norm_stats is None:
        return measure_statistics(chunks, pipeline)
    tables = read_norm_stats(options.norm_stats)
    for what, table in tables.items():
        missing = [name for name in OPENPI_STATISTICS if name not in table]
        if missing:
            raise Pi0Error(
                f"{options.norm_stats}: {what}: expected {', '.join(OPENPI_STATISTICS)}, found no "
                f"{missing[0]}. Leave out --norm-stats to measure them on the data."
            )
    return tables


def _layout(start: Start, options: TrainOptions) -> str:
    if options.layout is None:
        checkpoint = start.checkpoint
        return "lerobot" if checkpoint and checkpoint.names.layout == "lerobot" else "openpi"
    if options.layout not in LAYOUTS:
        raise ConfigError(
            f"--layout: expected one of {', '.join(LAYOUTS)}, found {options.layout!r}."
        )
    return options.layout


def _tokenizer(
    start: Start, dataset: Dataset, out: Path, options: TrainOptions, processes: Processes
) -> Tokenizer:
    vocabulary = start.config.vocab_size
    path = options.tokenizer
    if path is None and start.checkpoint is not None:
        path = find_tokenizer(start.checkpoint.folder_of(*FILE_NAMES))
    elif path is None and vocabulary >= PALIGEMMA_VOCABULARY:
        path = find_tokenizer(out)
    elif path is None:
        path = out / VOCABULARY
        with processes.first_alone():
            # Without a state to resume from it is of a run that never began, perhaps on other data.
            if not (path.is_file() and (out / STATE_FILE).is_file()):
                write_vocabulary(path, map(str, set(dataset.tasks)), vocabulary)
    return load_tokenizer_of(path.expanduser(), vocabulary)
