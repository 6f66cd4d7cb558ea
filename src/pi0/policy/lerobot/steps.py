"""Processor files as lists of steps, complete and checked: nothing in them is passed over.

Format: LeRobot 0.6.1, `processor/pipeline.py`. A file is {"name": …, "steps": [{"registry_name": …,
"config": {…}, "state_file": …}]}. What is not carried out is an error among the findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0.checkpoint.files import read_json
from pi0.checkpoint.lerobot import NORM_MAP, POSTPROCESSOR, PREPROCESSOR, make_processors
from pi0.findings import Finding, error, warning
from pi0.policy.lerobot.fields import (
    POSTPROCESSOR_STEPS,
    PREPROCESSOR_STEPS,
    Field,
    show,
)

KNOWN_STEPS = {**PREPROCESSOR_STEPS, **POSTPROCESSOR_STEPS}
ONCE = ("tokenizer_processor", "relative_actions_processor", "absolute_actions_processor",
        "normalizer_processor", "unnormalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step")  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step of a processor.

    Attributes:
        file: the processor file, which may not be there (see `read_processors`).
        name: as registered in LeRobot.
        index: position in the file, from 0.
        config: every field of the step; those that the file leaves out at LeRobot's defaults.
        state_file: with statistics; None: the step names none.
    """

    file: Path
    name: str
    index: int
    config: Mapping[str, Any]
    state_file: Path | None

    def __str__(self) -> str:
        return f"{self.file}, {self.name}"

    @classmethod
    def with_defaults(cls, file: Path, name: str) -> Step:
        """A normaliser that a file lacks, for the caller's statistics."""
        config = {key: field.default for key, field in KNOWN_STEPS[name].items()}
        config |= {"features": {}, "norm_map": NORM_MAP}
        return cls(file, name, 0, config, None)


@dataclass(frozen=True)
class Processors:
    """Both files of a checkpoint: `before` and `after` the model."""

    folder: Path
    before: Sequence[Step]
    after: Sequence[Step]

    def find(self, name: str) -> Step | None:
        """The first step of a name, of either file."""
        return next((step for step in (*self.before, *self.after) if step.name == name), None)


def read_processors(
    folder: Path, settings: Mapping[str, Any], has_statistics: bool, findings: list[Finding]
) -> Processors:
    """The steps of both processor files.

    Where neither is there, the steps are those that LeRobot builds for the config.json.

    Args:
        settings: the content of config.json.
        has_statistics: the caller has statistics, without which the files are indispensable.
        findings: what is found is appended.

    Raises:
        CheckpointError: a file is not JSON.
    """
    paths = folder / PREPROCESSOR, folder / POSTPROCESSOR
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        findings.append(_missing(folder, missing, has_statistics))
    known = (PREPROCESSOR_STEPS, POSTPROCESSOR_STEPS)
    before, after = (
        _read_steps(path, read_json(path) if path.is_file() else made, steps, findings)
        for path, made, steps in zip(paths, make_processors(settings), known, strict=True)
    )
    return Processors(folder, before, after)


def _missing(folder: Path, names: list[str], has_statistics: bool) -> Finding:
    if len(names) == 1:
        return error(
            "processor-missing",
            f"{folder}: expected {names[0]} beside the other LeRobot processor file, found none. "
            "Copy all files of the checkpoint.",
        )
    both = " and ".join(names)
    if has_statistics:
        return warning(
            "processors-assumed",
            f"{folder}: expected {both}, found neither: preprocessing is what LeRobot 0.6.1 builds "
            "for this config.json.",
        )
    return error(
        "processors-missing",
        f"{folder}: expected {both}, since its config.json is LeRobot's, found neither. Copy them, "
        "or name statistics with --norm-stats and whose way of preprocessing to use with "
        "--preprocessing.",
    )


def _read_steps(
    path: Path,
    content: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Field]],
    findings: list[Finding],
) -> list[Step]:
    entries = content.get("steps")
    if not isinstance(entries, list):
        findings.append(
            error("step-form", f"{path}: expected a list `steps`, found {show(entries)}.")
        )
        return []
    steps: list[Step] = []
    for index, entry in enumerate(entries):
        name = _step_name(entry)
        if name is None:
            findings.append(
                error(
                    "step-form",
                    f"{path}, step {index}: expected an object with a registry_name, found "
                    f"{show(entry)}.",
                )
            )
        elif name not in known:
            findings.append(error("step-unknown", _unknown(path, name)))
        elif name in ONCE and any(step.name == name for step in steps):
            findings.append(
                error("step-repeated", f"{path}: expected one step {name}, found several.")
            )
        else:
            steps.append(_read_step(path, index, name, entry, known[name], findings))
    return steps


def _step_name(entry: Any) -> str | None:
    if not isinstance(entry, Mapping):
        return None
    name = entry.get("registry_name", entry.get("class"))
    return name if isinstance(name, str) else None


def _unknown(path: Path, name: str) -> str:
    return (
        f"{path}: expected steps that are carried out here, found {name}. Without it the policy "
        "would not see what it was trained on (docs/lerobot.md lists the steps that are)."
    )


def _read_step(
    path: Path,
    index: int,
    name: str,
    entry: Mapping[str, Any],
    fields: Mapping[str, Field],
    findings: list[Finding],
) -> Step:
    given = entry.get("config", {})
    if not isinstance(given, Mapping):
        found = f"{path}, {name}: expected an object config, found {show(given)}."
        findings.append(error("field-value", found))
        given = {field: value.default for field, value in fields.items()}
    for unknown in sorted(set(given) - set(fields)):
        findings.append(
            error(
                "field-unknown",
                f"{path}, {name}: expected the fields {', '.join(fields) or 'of none'}, found "
                f"{unknown}, which is not carried out here.",
            )
        )
    config = {}
    for key, field in fields.items():
        value = given.get(key, field.default)
        problem = field.check(value)
        if problem is not None:
            findings.append(error("field-value", f"{path}, {name} {key}: {problem}."))
            value = field.default
        config[key] = value
    state_file = entry.get("state_file")
    named = isinstance(state_file, str) and state_file
    return Step(path, name, index, config, path.parent / str(state_file) if named else None)
