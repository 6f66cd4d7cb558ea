"""The files beside converted weights: config.json, statistics and tokenizer, in the target's form.

openpi keeps statistics in assets/<id>/norm_stats.json and leaves everything else to the code of its
robots; LeRobot declares features and processors, and keeps statistics beside these. What the target
cannot say, and what it needs and the source does not have, is a finding or an error, never left out
silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pi0.checkpoint.files import read_json
from pi0.checkpoint.infer import to_config_json
from pi0.checkpoint.lerobot import (
    ACTION,
    NORM_MAPS,
    POSTPROCESSOR,
    PREPROCESSOR,
    STATE,
    make_config_json,
    processor_files,
)
from pi0.checkpoint.load import CONFIG, Checkpoint
from pi0.config import GEMMA_2B, GEMMA_300M, SO400M
from pi0.errors import Pi0Error
from pi0.findings import Finding, warning
from pi0.policy.lerobot import has_processors, is_lerobot
from pi0.policy.lerobot.statistics import NEEDED, read_statistics
from pi0.policy.normalize import Statistics
from pi0.policy.statistics import (
    FILE_NAME,
    PLACES,
    find_norm_stats,
    read_norm_stats,
    statistics_folder,
)
from pi0.policy.tokenizer import FILE_NAMES

Tables = Mapping[str, Statistics]  # of "state" and "actions"
KEYS = {STATE: "state", ACTION: "actions"}  # LeRobot's name → openpi's
KEPT = ("mean", "std", "q01", "q99", "min", "max")
OPENPI_MODES = {False: "MEAN_STD", True: "QUANTILES"}  # by adaptive_norm
ASSETS = "assets/lerobot"  # of statistics from LeRobot, which name no robot
STATE_STEP = "pi05_prepare_state_tokenizer_processor_step"
MERGED = {"use_peft": False, "pretrained_path": None}  # in place of what an adapter declares
VARIANTS = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}


@dataclass
class Export:
    """What to write beside the weights.

    Attributes:
        files: contents, or files to copy, by their path in the folder.
        findings: what was assumed, and what the target cannot say.
    """

    files: dict[str, Path | bytes] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """What lies beside the weights of a checkpoint.

    Attributes:
        norm_stats: openpi's files, by their path in a target.
        processors: the folder of LeRobot's processors.
        tables: the statistics; None: there are none, or several files of openpi's.
    """

    checkpoint: Checkpoint
    norm_stats: dict[str, Path]
    processors: Path | None
    tables: Tables | None

    @property
    def is_lerobot(self) -> bool:
        checkpoint = self.checkpoint
        return is_lerobot(self.processors or checkpoint.folder, checkpoint.settings)

    def mode(self, kind: str) -> str | None:
        """LeRobot's mode of normalisation for STATE or ACTION; None: the source is openpi's."""
        if not self.is_lerobot:
            return None
        settings = self.checkpoint.settings
        model = "pi05" if self.checkpoint.config.adaptive_norm else "pi0"
        norm_map = settings.get("normalization_mapping") or NORM_MAPS[model]
        return str(norm_map.get(kind, "IDENTITY"))


def export_files(
    checkpoint: Checkpoint,
    target: str,
    dtype: str,
    norm_stats: Path | str | None = None,
    tokenizer: Path | None = None,
) -> Export:
    """The files to be written beside the weights.

    Args:
        target: "openpi", "lerobot" or "jax".
        dtype: of the weights, for config.json.
        norm_stats: a norm_stats.json, or "none" to write no statistics; None: the checkpoint's.
        tokenizer: a file to copy; None: the checkpoint's, if it has one.

    Raises:
        Pi0Error: a file cannot be read, or a statistic that the target needs is missing.
    """
    source = _read_source(checkpoint, norm_stats)
    export = Export(findings=list(checkpoint.findings))
    if target == "lerobot":
        _lerobot(source, export)
    else:
        _openpi(source, export, dtype)
    path = tokenizer.expanduser() if tokenizer else _own_tokenizer(checkpoint)
    if path is not None:
        if not path.is_file():
            raise Pi0Error(f"tokenizer {path}: expected a file, found none.")
        export.files[_tokenizer_name(path)] = path
    return export


def _read_source(checkpoint: Checkpoint, norm_stats: Path | str | None) -> _Source:
    if norm_stats == "none":
        return _Source(checkpoint, {}, None, None)
    if norm_stats is not None:
        path = Path(norm_stats).expanduser()
        path = path / FILE_NAME if path.is_dir() else path
        tables = read_norm_stats(path)
        return _Source(checkpoint, {f"assets/{path.parent.name}/{FILE_NAME}": path}, None, tables)
    folder = checkpoint.folder_of(PREPROCESSOR, POSTPROCESSOR)
    if has_processors(folder):
        return _Source(checkpoint, {}, folder, _processor_tables(folder))
    if buffers := checkpoint.statistics_buffers:
        named: dict[str, dict[str, Any]] = {what: {} for what in KEYS.values()}
        for name, values in buffers.items():
            key, _, kind = name.rpartition(".")
            if key in KEYS:
                named[KEYS[key]][kind] = values.numpy()
        return _Source(checkpoint, {}, None, named)
    return _openpi_source(checkpoint)


def _openpi_source(checkpoint: Checkpoint) -> _Source:
    folder = statistics_folder(checkpoint)
    found = next((hits for place in PLACES if (hits := sorted(folder.glob(place + FILE_NAME)))), [])
    files = {}
    for path in found:
        inner = path.relative_to(folder)
        inner = inner if inner.parts[0] == "assets" else "assets" / Path(*inner.parts[-2:])
        if len(inner.parts) < 3:
            inner = Path("assets", folder.resolve().name, FILE_NAME)
        files[inner.as_posix()] = path
    tables = read_norm_stats(found[0]) if len(found) == 1 else None
    return _Source(checkpoint, files, None, tables)


def _processor_tables(folder: Path) -> Tables:
    """The statistics of LeRobot's processors: those of the state are the preprocessor's, those of
    actions the postprocessor's, which moves the robot."""
    tables: dict[str, Statistics] = {}
    for name, key in ((PREPROCESSOR, STATE), (POSTPROCESSOR, ACTION)):
        for step in _steps(folder, name):
            file = step.get("state_file")
            if isinstance(file, str) and (folder / file).is_file():
                tables[KEYS[key]] = read_statistics(folder / file).get(key, {})
    return tables


def _steps(folder: Path, name: str) -> list[dict[str, Any]]:
    steps = read_json(folder / name).get("steps") if (folder / name).is_file() else None
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


# openpi's form


def _openpi(source: _Source, export: Export, dtype: str) -> None:
    checkpoint = source.checkpoint
    export.files[CONFIG] = _json(_openpi_config(source, dtype))
    mode = OPENPI_MODES[checkpoint.config.adaptive_norm]
    if source.norm_stats:
        export.files |= source.norm_stats
        for what in source.tables or {}:
            _require(source, what, NEEDED[mode], "openpi")
        return
    if source.tables is None:
        export.findings.append(_without_statistics(checkpoint))
        return
    for what, kind in (("state", "STATE"), ("actions", "ACTION")):
        _require(source, what, tuple(dict.fromkeys(("mean", "std", *NEEDED[mode]))), "openpi")
        if source.mode(kind) not in (None, mode):
            export.findings.append(
                warning(
                    "norm-mode-lost",
                    f"{checkpoint.path}: {what}: normalised with {source.mode(kind)}, found that "
                    f"openpi's files do not say so and that its model is read with {mode}. Name "
                    "the mode where the result is used: --norm-mode.",
                )
            )
    tables = {
        what: {name: table[name].tolist() for name in KEPT if name in table}
        for what, table in source.tables.items()
    }
    export.files[f"{ASSETS}/{FILE_NAME}"] = _json({"norm_stats": tables})
    if checkpoint.settings.get("use_relative_actions"):
        export.findings.append(
            warning(
                "relative-actions-lost",
                f"{checkpoint.path}: its actions are relative to the state, which openpi's files "
                "do not say. Name a robot with relative actions where the result is used.",
            )
        )


def _openpi_config(source: _Source, dtype: str) -> dict[str, Any]:
    """config.json as openpi's converter writes it, and what only we read."""
    checkpoint = source.checkpoint
    config = checkpoint.config
    ours = to_config_json(config)
    published = (config.vision, config.vlm, config.expert) == (SO400M, GEMMA_2B, GEMMA_300M)
    settings = {
        "action_dim": config.action_dim,
        "action_horizon": config.horizon,
        "max_token_len": config.max_tokens,
        "precision": dtype,
        "pi05": config.adaptive_norm,
        **(VARIANTS if published else {n: ours[n] for n in ("vision", "vlm", "expert")}),
    }
    names = {"horizon": "action_horizon", "max_tokens": "max_token_len"}
    for name in checkpoint.inferred.assumed:  # it would no longer be said that it is assumed
        del settings[names[name]]
    stated = checkpoint.settings.get("discrete_state_input")
    if stated is None and config.adaptive_norm and source.processors:
        steps = _steps(source.processors, PREPROCESSOR)
        stated = any(step.get("registry_name") == STATE_STEP for step in steps)
    return settings if stated is None else {**settings, "discrete_state_input": stated}


# LeRobot's form


def _lerobot(source: _Source, export: Export) -> None:
    checkpoint = source.checkpoint
    settings = make_config_json(checkpoint.config)
    if source.is_lerobot:
        settings |= dict(checkpoint.settings) | (MERGED if checkpoint.adapter else {})
    if source.processors:
        export.files[CONFIG] = _json(settings)
        _copy_processors(source.processors, export)
        return
    tables = source.tables
    if tables is None and len(source.norm_stats) > 1:
        find_norm_stats(statistics_folder(checkpoint))  # says which there are
    if tables is None:
        export.findings.append(_without_statistics(checkpoint))
        tables = {}
    else:
        for what, kind in (("state", "STATE"), ("actions", "ACTION")):
            mode = settings["normalization_mapping"].get(kind, "IDENTITY")
            _require(source, what, NEEDED.get(mode, ()), "LeRobot")
    if not source.is_lerobot:
        _declare_widths(settings, tables)
        export.findings.append(
            warning(
                "features-assumed",
                f"{checkpoint.path}: expected cameras and relative joints, which LeRobot declares, "
                "found none in openpi's files. Written are three cameras, of which those that a "
                "robot lacks may be absent, and absolute actions: see input_features and "
                "use_relative_actions in config.json.",
            )
        )
    if checkpoint.settings.get("discrete_state_input") is False:
        export.findings.append(
            warning(
                "state-in-prompt",
                f"{checkpoint.path}: its prompts do not hold the state (discrete_state_input), "
                "which LeRobot's π0.5 always writes. Expect other actions there.",
            )
        )
    statistics = {
        f"{key}.{name}": torch.tensor(tables[what][name], dtype=torch.float32)
        for key, what in KEYS.items()
        for name in KEPT
        if name in tables.get(what, {})
    }
    export.files[CONFIG] = _json(settings)
    export.files |= processor_files(settings, statistics)


def _copy_processors(folder: Path, export: Export) -> None:
    for name in (PREPROCESSOR, POSTPROCESSOR):
        if not (folder / name).is_file():
            raise Pi0Error(f"{folder}: expected {name}, found none. Copy all of its files.")
        export.files[name] = folder / name
        for step in _steps(folder, name):
            file = step.get("state_file")
            if isinstance(file, str):
                if Path(file).name != file or not (folder / file).is_file():
                    raise Pi0Error(
                        f"{folder / name}: expected the state file {file} beside it, found none. "
                        "Copy all of its files."
                    )
                export.files[file] = folder / file


def _declare_widths(settings: dict[str, Any], tables: Tables) -> None:
    """State and action are as long as their statistics."""
    for features, key in (("input_features", STATE), ("output_features", ACTION)):
        table = tables.get(KEYS[key], {})
        for values in list(table.values())[:1]:
            settings[features][key]["shape"] = [len(values)]


# Both


def _require(source: _Source, what: str, names: tuple[str, ...], project: str) -> None:
    table = (source.tables or {}).get(what, {})
    missing = [name for name in names if name not in table]
    if missing:
        raise Pi0Error(
            f"{source.checkpoint.path}: statistics of {what}: expected {' and '.join(names)}, "
            f"which {project} needs for this model, found no {' and no '.join(missing)}. Name a "
            "file that has them with --norm-stats, or pass --norm-stats none to write none."
        )


def _without_statistics(checkpoint: Checkpoint) -> Finding:
    return warning(
        "statistics-missing",
        f"{checkpoint.path}: expected normalisation statistics, found none, so none are written. "
        "Name a file with --norm-stats.",
    )


def _own_tokenizer(checkpoint: Checkpoint) -> Path | None:
    folder = checkpoint.folder_of(*FILE_NAMES)
    return next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)


def _tokenizer_name(path: Path) -> str:
    """A name under which the tokenizer is found beside the weights."""
    if path.name in FILE_NAMES:
        return path.name
    return next(name for name in FILE_NAMES if Path(name).suffix == (path.suffix or ".model"))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
