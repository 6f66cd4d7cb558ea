"""What lies beside the weights of a checkpoint, and what of it openpi's files cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pi0.checkpoint.files import read_json
from pi0.checkpoint.infer import DEFAULT_STEPS, STEPS_KEYS
from pi0.checkpoint.lerobot import ACTION, POSTPROCESSOR, PREPROCESSOR, STATE
from pi0.checkpoint.load import Checkpoint
from pi0.errors import ConfigError, Pi0Error
from pi0.findings import Finding, warning
from pi0.policy.fit import RELATIVE_ACTIONS, aloha_flags, processor_findings
from pi0.policy.lerobot import LerobotProgram, has_processors, is_lerobot, read_program
from pi0.policy.lerobot.normalization import Given, Normalization
from pi0.policy.lerobot.order import NORMALIZE, UNNORMALIZE
from pi0.policy.lerobot.statistics import read_statistics
from pi0.policy.lerobot.steps import Processors, Step, read_processors
from pi0.policy.normalize import OPENPI_EPS, OPENPI_MODES, Statistics
from pi0.policy.robots import find_robot
from pi0.policy.statistics import (
    FILE_NAME,
    find_origin,
    list_norm_stats,
    read_norm_stats,
    statistics_folder,
)

Tables = Mapping[str, Statistics]  # of "state" and "actions"
KEYS = {STATE: "state", ACTION: "actions"}  # LeRobot's name → openpi's
STEPS = {"STATE": NORMALIZE, "ACTION": UNNORMALIZE}
# Findings of what is not carried out here, so that nobody could say what is lost.
UNKNOWN = ("step-unknown", "step-form", "field-unknown", "field-value", "step-order")
REMEDIES = {
    "preprocessing": "--robot for its cameras; `pi0` finds the rest in config.json",
    "relative-actions": "--robot with the relative actions that config.json has for `pi0`",
    "renames": "--robot with the robot's own keys",
    "image-statistics": "nothing does, so that the result is of no use",
    "norm-mode": "use_quantile_norm of openpi's data; `pi0` finds it in config.json",
    "newline": "nothing does, so that prompts end otherwise",
    "eps": "nothing does, so that values with a small spread become others",
    "targets": "nothing does, so that it should be trained further in LeRobot's form",
    "steps": "num_steps of openpi's sample_actions; `pi0` finds it in config.json",
    "executed": "execute so many actions of each chunk; `pi0` finds it in config.json",
    "aloha": "--robot aloha or aloha_sim",
    "robot": "renames to its keys, and relative actions in both processors if it has them",
}


@dataclass(frozen=True)
class Source:
    """What lies beside the weights of a checkpoint.

    Attributes:
        norm_stats: openpi's files, by their path in a target.
        processors: the folder of LeRobot's processors, if the statistics are theirs.
        tables: the statistics; None: there are none, or several files of openpi's.
    """

    checkpoint: Checkpoint
    norm_stats: dict[str, Path]
    processors: Path | None
    tables: Tables | None

    @property
    def folder(self) -> Path:
        """Where LeRobot's processors lie, if there are any."""
        return self.checkpoint.folder_of(PREPROCESSOR, POSTPROCESSOR)

    @property
    def has_processors(self) -> bool:
        return has_processors(self.folder)

    @property
    def is_lerobot(self) -> bool:
        return is_lerobot(self.checkpoint)

    @cached_property
    def _steps(self) -> Processors:
        """LeRobot's steps; without its processors those that it builds."""
        return read_processors(self.folder, self.checkpoint.settings, True, [])

    def step(self, kind: str) -> Step | None:
        """LeRobot's step that normalises STATE or ACTION, if there is one."""
        return self._steps.find(STEPS[kind])

    def mode(self, kind: str) -> str:
        """LeRobot's mode of normalisation for STATE or ACTION."""
        step, key = self.step(kind), {"STATE": STATE, "ACTION": ACTION}[kind]
        mode = Normalization(step, Given(None, None), {}).mode(key, kind) if step else None
        return mode or "IDENTITY"

    @cached_property
    def program(self) -> LerobotProgram | None:
        """What LeRobot's files say; None: the source is openpi's."""
        settings = self.checkpoint.settings
        if not self.is_lerobot:
            return None
        given: Any = None if self.processors else (self.tables or "none")
        return read_program(self.folder, settings, statistics=given, tokenizer_given=True)


def read_source(checkpoint: Checkpoint, norm_stats: Path | str | None) -> Source:
    if norm_stats == "none":
        return Source(checkpoint, {}, None, None)
    if norm_stats is not None:
        path = Path(norm_stats).expanduser()
        path = path / FILE_NAME if path.is_dir() else path
        tables = read_norm_stats(path)
        name = find_origin(checkpoint, path) or path.absolute().parent.name
        return Source(
            checkpoint, {f"assets/{name.removesuffix('.json')}/{FILE_NAME}": path}, None, tables
        )
    folder = checkpoint.folder_of(PREPROCESSOR, POSTPROCESSOR)
    if has_processors(folder):
        return Source(checkpoint, {}, folder, _processor_tables(folder))
    if buffers := checkpoint.statistics_buffers:
        named: dict[str, dict[str, Any]] = {what: {} for what in KEYS.values()}
        for name, values in buffers.items():
            key, _, kind = name.rpartition(".")
            if key in KEYS:
                named[KEYS[key]][kind] = values.numpy()
        return Source(checkpoint, {}, None, {what: _vectors(named[what]) for what in named})
    return _openpi_source(checkpoint)


def _openpi_source(checkpoint: Checkpoint) -> Source:
    folder = statistics_folder(checkpoint)
    found = list_norm_stats(folder)
    files = {}
    for path in found:
        inner = path.relative_to(folder)
        inner = inner if inner.parts[0] == "assets" else "assets" / inner
        if len(inner.parts) < 3:  # not under the checkpoint's own name, which tells no robot
            inner = Path("assets", "own", FILE_NAME)
        files[inner.as_posix()] = path
    tables = read_norm_stats(found[0]) if len(found) == 1 else None
    return Source(checkpoint, files, None, tables)


def _processor_tables(folder: Path) -> Tables:
    """The statistics of LeRobot's processors: those of the state are the preprocessor's, those of
    actions the postprocessor's, which moves the robot."""
    tables: dict[str, Statistics] = {}
    for name, key in ((PREPROCESSOR, STATE), (POSTPROCESSOR, ACTION)):
        for step in read_steps(folder, name):
            file = step.get("state_file")
            if isinstance(file, str) and (folder / file).is_file():
                tables[KEYS[key]] = _vectors(read_statistics(folder / file).get(key, {}))
    return tables


def _vectors(table: Statistics) -> Statistics:
    """Statistics [D] of a key; one value beside longer ones stands for every dimension."""
    longest = max((values.size for values in table.values()), default=1)
    flat = {name: values.reshape(-1) for name, values in table.items()}
    return {n: np.broadcast_to(v, longest) if len(v) == 1 else v for n, v in flat.items()}


def read_steps(folder: Path, name: str) -> list[dict[str, Any]]:
    steps = read_json(folder / name).get("steps") if (folder / name).is_file() else None
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def find_losses(source: Source) -> list[Finding]:
    """What the files beside the weights say and openpi's cannot.

    Raises:
        Pi0Error: a step or a field is one that nobody here knows, so that its loss would be unsaid.
    """
    checkpoint, settings = source.checkpoint, source.checkpoint.settings
    lost = {}
    for code, usual in (
        ("steps", dict.fromkeys(STEPS_KEYS, DEFAULT_STEPS)),
        ("executed", {"n_action_steps": checkpoint.config.horizon}),
    ):
        stated = {k: settings[k] for k in usual if settings.get(k) not in (None, usual[k])}
        lost[code] = (f"states {stated}", bool(stated))
    if source.program:
        lost |= _lerobot_losses(source, source.program)
    found = [_loss(source, code, what, "openpi") for code, (what, lost) in lost.items() if lost]
    return [*found, *find_aloha_loss(source, "openpi")]


def find_aloha_loss(source: Source, target: str) -> list[Finding]:
    """That older LeRobot files ask for ALOHA's conventions, which no target can say."""
    flags = aloha_flags(source.checkpoint.settings) if source.is_lerobot else []
    return [_loss(source, "aloha", f"sets {' and '.join(flags)}", target)] if flags else []


def find_robot_loss(source: Source) -> list[Finding]:
    """That config.json names a robot, as `pi0 train` writes it, which LeRobot's cannot.

    Raises:
        Pi0Error: its actions would be others without its conventions, or the relative ones that
            config.json states.
    """
    checkpoint = source.checkpoint
    if RELATIVE_ACTIONS in checkpoint.settings:
        raise ConfigError(
            f"{checkpoint.path}: expected absolute actions, found {RELATIVE_ACTIONS} in "
            "config.json, as LeRobot's processors had them. Use the LeRobot checkpoint that it was "
            "converted from."
        )
    name = checkpoint.settings.get("robot")
    if not name:
        return []
    try:
        robot = find_robot(str(name), checkpoint.config.adaptive_norm)
    except Pi0Error:  # somebody's own, whose table is not at hand
        robot = None
    if robot and robot.has_conventions:
        raise ConfigError(
            f"{checkpoint.path}: expected a robot whose actions are absolute and without "
            f"conventions of its own, found {name} in config.json, which LeRobot's files cannot "
            "say. Convert it to openpi or jax."
        )
    return [_loss(source, "robot", f"names robot {name}", "LeRobot")]


def _loss(source: Source, code: str, what: str, target: str) -> Finding:
    return warning(
        f"{code}-lost",
        f"{source.checkpoint.path}: it {what}, which {target}'s files cannot say. Say it where the "
        f"result is used: {REMEDIES[code]}.",
    )


def _lerobot_losses(source: Source, program: LerobotProgram) -> dict[str, tuple[str, bool]]:
    unknown = [f.sentence for f in program.findings if f.code in UNKNOWN]
    if unknown:
        raise Pi0Error(unknown[0])
    adaptive = source.checkpoint.config.adaptive_norm
    modes = {kind: source.mode(kind) for kind in STEPS}
    eps = max((step.config["eps"] for kind in STEPS if (step := source.step(kind))), default=0)
    other_targets = program.actions_in and processor_findings(program.actions, program.actions_in)
    return {
        "preprocessing": ("resizes images and cleans prompts in LeRobot's way", True),
        # Ours end prompts with one, unless they hold the state.
        "newline": (
            f"ends prompts with{'' if program.newline else 'out'} a line break",
            program.newline == program.state_in_prompt,
        ),
        "relative-actions": ("has actions relative to the state", any(program.relative or ())),
        "renames": (f"renames {dict(program.rename)}", bool(program.rename)),
        "image-statistics": ("normalises images", bool(program.images)),
        "norm-mode": (f"normalises with {modes}", set(modes.values()) != {OPENPI_MODES[adaptive]}),
        "eps": (f"adds {eps} to spreads", eps > OPENPI_EPS),
        "targets": ("normalises the actions of training otherwise", bool(other_targets)),
    }
