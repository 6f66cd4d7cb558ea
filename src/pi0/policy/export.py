"""The files beside converted weights: config.json, statistics and tokenizer, in the target's form.

openpi keeps statistics in assets/<id>/norm_stats.json and leaves everything else to the code of its
robots; LeRobot declares features and processors, and keeps statistics beside these. What the target
cannot say, and what it needs and the source does not have, is a finding or an error, never left out
silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pi0.checkpoint.infer import DEFAULT_STEPS, to_config_json
from pi0.checkpoint.lerobot import (
    ACTION,
    OLD_FIELDS,
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
from pi0.number import is_count
from pi0.policy.fit import RELATIVE_ACTIONS, length_findings, settings_findings
from pi0.policy.lerobot import is_lerobot
from pi0.policy.lerobot.fields import show
from pi0.policy.lerobot.statistics import NEEDED
from pi0.policy.normalize import NEEDED as MODES
from pi0.policy.normalize import OPENPI_MODES, Floats, make_normalizer
from pi0.policy.sources import (
    KEYS,
    STEPS,
    Source,
    Tables,
    find_aloha_loss,
    find_losses,
    find_robot_loss,
    read_source,
    read_steps,
)
from pi0.policy.statistics import (
    FILE_NAME,
    find_norm_stats,
    stated_mode,
    statistics_folder,
)
from pi0.policy.tokenizer import FILE_NAMES, load_tokenizer_of, own_tokenizers

KEPT = ("mean", "std", "q01", "q99", "min", "max")
# Of our own in config.json.
KEPT_FIELDS = ("robot", "n_action_steps", "preprocessing", "norm_mode", RELATIVE_ACTIONS)
ASSETS = "assets/lerobot"  # of statistics from LeRobot, which name no robot
# In place of what an adapter declares, and a model that was merged with peft.
MERGED = {"use_peft": False, "pretrained_path": None}
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


def export_files(
    checkpoint: Checkpoint,
    target: str,
    dtype: str,
    norm_stats: Path | str | None = None,
    tokenizer: Path | None = None,
    norm_mode: str | None = None,
    state_in_prompt: bool | None = None,
) -> Export:
    """The files to be written beside the weights.

    Args:
        target: "openpi", "lerobot" or "jax".
        dtype: of the weights, for config.json.
        norm_stats: a norm_stats.json, or "none" to write no statistics; None: the checkpoint's.
        tokenizer: a file to copy; None: the checkpoint's, if it has one.
        norm_mode: "mean_std", "quantiles" or "min_max", as LeRobot is told how openpi's policy
            normalises; None: as openpi does for this model.
        state_in_prompt: whether the prompts of a π0.5 hold the state; None: as files say.

    Raises:
        Pi0Error: a file cannot be read, a statistic that the target needs is missing, or an
            argument has no place in the target.
    """
    if state_in_prompt is not None:
        checkpoint = _with_state_in_prompt(checkpoint, target, state_in_prompt)
    source = read_source(checkpoint, norm_stats)
    if target == "lerobot" and norm_mode is None and not source.is_lerobot:
        norm_mode = stated_mode(checkpoint)
    _check_norm_mode(source, target, norm_mode)
    _check_values(source)
    copied = target == "lerobot" and source.is_lerobot  # whose fields say them themselves
    if not copied or checkpoint.settings.keys() & OLD_FIELDS:
        for finding in settings_findings(checkpoint.settings, checkpoint.config):
            raise Pi0Error(finding.sentence)
    steps, horizon = checkpoint.settings.get("n_action_steps"), checkpoint.config.horizon
    if steps is not None and not (is_count(steps) and steps <= horizon):
        raise Pi0Error(
            f"config.json n_action_steps: expected 1 to {horizon} actions of a chunk, found "
            f"{show(steps)}. Correct it in {checkpoint.path}."
        )
    export = Export(findings=list(checkpoint.findings))
    if source.program and source.program.max_tokens:
        export.findings = [f for f in export.findings if f.code != "max-tokens-assumed"]
        export.findings += length_findings(checkpoint, source.program.max_tokens)
    if target == "lerobot":
        _lerobot(source, export, norm_mode)
    else:
        _openpi(source, export, dtype)
    path = tokenizer.expanduser() if tokenizer else _own_tokenizer(checkpoint)
    if path is not None:
        load_tokenizer_of(path, checkpoint.config.vocab_size)  # says what is wrong with it
        export.files[tokenizer_name(path)] = path
    return export


def _with_state_in_prompt(checkpoint: Checkpoint, target: str, stated: bool) -> Checkpoint:
    """The checkpoint as if its config.json said so."""
    if not checkpoint.config.adaptive_norm:
        found = "a π0, which has a token of the state"
    elif target == "lerobot" and is_lerobot(checkpoint):
        found = "LeRobot's own files, which say it"
    else:
        return replace(checkpoint, settings={**checkpoint.settings, "discrete_state_input": stated})
    raise Pi0Error(
        "state_in_prompt (--state-in-prompt): expected a π0.5 with files of openpi, found "
        f"{found}. Leave it out."
    )


def _check_norm_mode(source: Source, target: str, norm_mode: str | None) -> None:
    if norm_mode is None:
        return
    if norm_mode not in MODES:
        raise Pi0Error(f"norm_mode: expected one of {', '.join(MODES)}, found {norm_mode!r}.")
    if target != "lerobot" or source.is_lerobot:
        found = (
            "LeRobot's own files" if target == "lerobot" else f"target {target}, which states none"
        )
        raise Pi0Error(
            f"norm_mode (--norm-mode): expected target lerobot from openpi's files, found {found}. "
            "Leave it out, and say it where the result is used."
        )


def _check_values(source: Source) -> None:
    """Raises Pi0Error if statistics are too wide for the model, or such that nobody can use them:
    other projects would read them and say nothing."""
    config = source.checkpoint.config
    for what, width in (("state", config.state_dim), ("actions", config.action_dim)):
        table = (source.tables or {}).get(what, {})
        for mode, names in MODES.items():
            if not table.keys() >= set(names):
                continue
            found = make_normalizer(what, mode, "openpi", table).width
            if found > width:
                raise Pi0Error(
                    f"statistics of {what}: expected at most the {width} values of the model, "
                    f"found {found}. Name others with --norm-stats."
                )


# openpi's form


def _openpi(source: Source, export: Export, dtype: str) -> None:
    checkpoint = source.checkpoint
    export.findings += find_losses(source)
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
    for what in KEYS.values():
        _require(source, what, tuple(dict.fromkeys(("mean", "std", *NEEDED[mode]))), "openpi")
    tables = {
        what: {name: _vector(source, what, table[name]) for name in KEPT if name in table}
        for what, table in source.tables.items()
    }
    export.files[f"{ASSETS}/{FILE_NAME}"] = _json({"norm_stats": tables})


def _vector(source: Source, what: str, values: Floats) -> list[float]:
    """A statistic [D] of LeRobot's; where there is one value, it stands for every dimension."""
    assert source.program
    stats = source.program.state if what == "state" else source.program.actions
    numbers: list[float] = values.tolist()
    return numbers * (stats.width if len(numbers) == 1 else 1)


def _openpi_config(source: Source, dtype: str) -> dict[str, Any]:
    """config.json as openpi's converter writes it, and what only we read."""
    checkpoint = source.checkpoint
    config = checkpoint.config
    ours = to_config_json(config)
    published = (config.vision, config.vlm, config.expert) == (SO400M, GEMMA_2B, GEMMA_300M)
    settings = {
        "action_dim": config.action_dim,
        "action_horizon": config.horizon,
        "max_token_len": (source.program and source.program.max_tokens) or config.max_tokens,
        "precision": dtype,
        "pi05": config.adaptive_norm,
        **(VARIANTS if published else {n: ours[n] for n in ("vision", "vlm", "expert")}),
    }
    if config.adaptive_norm and config.state_dim != config.action_dim:  # no tensor tells it
        settings["state_dim"] = config.state_dim
    names = {"horizon": "action_horizon", "max_tokens": "max_token_len"}
    for name in checkpoint.inferred.assumed:  # it would no longer be said that it is assumed
        if name != "max_tokens" or not (source.program and source.program.max_tokens):
            del settings[names[name]]
    for name in KEPT_FIELDS:
        if checkpoint.settings.get(name) is not None:
            settings[name] = checkpoint.settings[name]
    if source.is_lerobot:
        settings["preprocessing"] = "lerobot"
        if source.program and any(source.program.relative or ()):
            settings[RELATIVE_ACTIONS] = [*(source.program.relative or ())]
        modes = [source.mode(kind).lower() for kind in STEPS]
        if set(modes) != {OPENPI_MODES[config.adaptive_norm].lower()}:
            settings["norm_mode"] = " and ".join(dict.fromkeys(modes))
    if checkpoint.steps != DEFAULT_STEPS:
        settings["num_inference_steps"] = checkpoint.steps
    stated = checkpoint.settings.get("discrete_state_input")
    if stated is None and config.adaptive_norm and source.has_processors and source.program:
        stated = source.program.state_in_prompt
    return settings if stated is None else {**settings, "discrete_state_input": stated}


# LeRobot's form


def _lerobot(source: Source, export: Export, norm_mode: str | None) -> None:
    checkpoint = source.checkpoint
    settings = make_config_json(checkpoint.config)
    if norm_mode:
        settings["normalization_mapping"] |= dict.fromkeys(("STATE", "ACTION"), norm_mode.upper())
    if source.is_lerobot:
        fields = {k: v for k, v in checkpoint.settings.items() if k not in OLD_FIELDS}
        settings |= fields | (MERGED if checkpoint.adapter or fields.get("use_peft") else {})
        if "num_steps" in checkpoint.settings:
            settings["num_inference_steps"] = checkpoint.steps
        export.findings += find_aloha_loss(source, "LeRobot")
    else:
        settings |= {"num_inference_steps": checkpoint.steps}
        if "n_action_steps" in checkpoint.settings:
            settings["n_action_steps"] = checkpoint.settings["n_action_steps"]
    if source.processors:
        for finding in source.program.findings if source.program else ():
            if finding.code == "step-form":  # which LeRobot cannot read either
                raise Pi0Error(finding.sentence)
            if finding.code == "statistics-missing":
                export.findings.append(warning(finding.code, finding.sentence))
        export.files[CONFIG] = _json(settings)
        _copy_processors(source.processors, export)
        return
    if source.has_processors:
        raise Pi0Error(
            f"norm_stats (--norm-stats): expected none for {checkpoint.path}, whose processors "
            "are copied as they are, found one. Leave it out, or name it where the result is used."
        )
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
        export.findings += find_robot_loss(source)
        export.findings.append(
            warning(
                "features-assumed",
                f"{checkpoint.path}: expected cameras and relative joints, which LeRobot declares, "
                "found none in openpi's files. Written are three cameras, of which those that a "
                "robot lacks may be absent, and absolute actions. Where that is not so, correct "
                "input_features and use_relative_actions in config.json, and in the processor "
                "files the cameras and `enabled` of the two steps for relative actions.",
            )
        )
    stated = checkpoint.settings.get("discrete_state_input")
    if stated is None and checkpoint.config.adaptive_norm and not source.is_lerobot:
        export.findings.append(
            warning(
                "state-in-prompt-assumed",
                f"{checkpoint.path}: no file says whether its prompts hold the state, which "
                "LeRobot's π0.5 always writes. Was it trained so? openpi's pi05_libero was not. "
                "Say it with --state-in-prompt or --no-state-in-prompt.",
            )
        )
    if stated is False:
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
        for step in read_steps(folder, name):
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


def _require(source: Source, what: str, names: tuple[str, ...], project: str) -> None:
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
    return next(iter(own_tokenizers(checkpoint.folder_of(*FILE_NAMES))), None)


def tokenizer_name(path: Path) -> str:
    """A name under which the tokenizer is found beside the weights."""
    if path.name in FILE_NAMES:
        return path.name
    return "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"  # as they are loaded


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
