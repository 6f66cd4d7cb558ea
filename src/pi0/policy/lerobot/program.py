"""The program of a LeRobot checkpoint: everything between a robot and the model, as values.

Read are config.json, policy_preprocessor.json, policy_postprocessor.json and the small statistics
files that these name. Every step and every field is carried out as LeRobot 0.6.1 does, or refused
by name in a finding (docs/lerobot.md). Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pi0.checkpoint.lerobot import ACTION, POSTPROCESSOR, PREPROCESSOR, STATE
from pi0.checkpoint.load import Checkpoint
from pi0.errors import Pi0Error
from pi0.findings import Finding, error, warning
from pi0.policy.lerobot.features import Features, read_features
from pi0.policy.lerobot.fields import MODES
from pi0.policy.lerobot.normalization import Given, Normalization, read_normalization
from pi0.policy.lerobot.order import NORMALIZE, UNNORMALIZE, check_order, read_rename
from pi0.policy.lerobot.prompt import read_prompt
from pi0.policy.lerobot.relative import read_relative
from pi0.policy.lerobot.statistics import Floats, without_spread
from pi0.policy.lerobot.steps import Processors, Step, read_processors
from pi0.policy.normalize import Normalizer

CHANNELS = 3
OWN_SETTINGS = ("input_features", "output_features", "normalization_mapping")  # of config.json


@dataclass(frozen=True)
class LerobotProgram:
    """What LeRobot does to an observation, to training targets and to the model's actions.

    In: rename → state: normalise → images: normalise, resize, [-1, 1] → task: state or line break,
    tokens.
    Out: cut to `actions.width` → unnormalise → add the state where `relative`. Training targets:
    subtract the state as the robot gives it where `relative` → `actions_in`.

    With an error among `findings` the program must not be used: what could not be read is then as
    if the step were not there.

    Attributes:
        cameras: keys of the images that the policy knows, in the order of the model's slots and
            after `rename`. An absent one is left out, but one at least must be there.
        rename: key of a robot's observation → key that the policy knows; other keys stay.
        state_key: key of the state, after `rename`.
        state: of the state; its width is the state's length, if that is known.
        state_dim: the state's length. None: neither features nor statistics say, so that it is any
            up to the model's padded one, as in LeRobot.
        actions: unnormalises the model's actions; its width is the length of an action.
        actions_in: normalises training targets: the preprocessor's own statistics and eps. None:
            it has no statistics of actions, and targets cannot be made.
        images: by camera, normalisers of [3] over the channels of pixels in [0, 1], applied before
            resizing. LeRobot cuts what it resizes to [0, 1], but not what has the model's size
            already. Cameras that are not listed are not normalised.
        relative: which dimensions of an action are relative to the state; None: none is. LeRobot's
            two steps for this are refused unless both are enabled or neither is.
        state_in_prompt: whether the prompt holds the normalised state, as in π0.5.
        newline: whether a line break is appended to a task that has none.
        max_tokens: length that tasks are padded and cut to; None: no tokenizer step.
        padding_side: has no effect on actions, since padding is masked.
        truncation: whether longer tasks are cut at the end; else they stay longer.
        chunk_size: actions in a chunk; None: config.json says nothing.
        n_action_steps: of these are carried out before the next chunk is computed.
        findings: errors, warnings and assumptions.
    """

    cameras: tuple[str, ...]
    rename: Mapping[str, str]
    state_key: str
    state: Normalizer
    state_dim: int | None
    actions: Normalizer
    actions_in: Normalizer | None
    images: Mapping[str, Normalizer]
    relative: tuple[bool, ...] | None
    state_in_prompt: bool
    newline: bool
    max_tokens: int | None
    padding_side: Literal["left", "right"]
    truncation: bool
    chunk_size: int | None
    n_action_steps: int | None
    findings: tuple[Finding, ...]

    @property
    def action_dim(self) -> int:
        """The length of an action."""
        return self.actions.width


def is_lerobot(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is LeRobot's: by its processor files, by its config.json, or by
    statistics among its weights."""
    return (
        has_processors(checkpoint.folder_of(PREPROCESSOR, POSTPROCESSOR))
        or bool(checkpoint.names.buffers)
        or any(name in checkpoint.settings for name in OWN_SETTINGS)
    )


def has_processors(folder: Path) -> bool:
    """Whether at least one of LeRobot's two processor files is there."""
    return any((folder / name).is_file() for name in (PREPROCESSOR, POSTPROCESSOR))


def read_program(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    statistics: Mapping[str, Mapping[str, Floats]] | Literal["none"] | None = None,
    norm_mode: str | None = None,
    robot_given: bool = False,
    tokenizer_given: bool = False,
) -> LerobotProgram:
    """The program of a checkpoint folder.

    Args:
        settings: the content of its config.json; empty if there is none.
        statistics: {"state": …, "actions": …}, each by name ("mean", "q01", …), in place of the
            files'; "none": state and actions are in the model's units already; None: the files'.
        norm_mode: for state and actions in place of the files': one of LeRobot's modes in any case
            ("mean_std").
        robot_given: a robot table says which cameras there are and what its conventions are.
        tokenizer_given: the caller names a tokenizer, whatever the tokenizer step says.

    Raises:
        CheckpointError: a file is not JSON, or a statistics file is damaged.
        Pi0Error: norm_mode is none of LeRobot's.
    """
    findings: list[Finding] = []
    given = _given(statistics, norm_mode)
    processors = read_processors(folder, settings, statistics is not None, findings)
    features = read_features(settings, robot_given, findings)
    before = _normalization(processors, NORMALIZE, PREPROCESSOR, given, findings)
    after = _normalization(processors, UNNORMALIZE, POSTPROCESSOR, given, findings)
    action_dim = features.action_dim, features.max_action_dim
    state_dim = features.state_dim, features.max_state_dim
    state = before.normalizer("state", STATE, "STATE", state_dim, findings)
    actions = after.normalizer("actions", ACTION, "ACTION", action_dim, findings)
    targets = None
    if before.has(ACTION, "ACTION"):
        targets = before.normalizer("actions", ACTION, "ACTION", action_dim, findings)
    _check_statistics(features, state, actions, findings)
    check_order(processors, findings)
    prompt = read_prompt(processors, settings, tokenizer_given, findings)
    return LerobotProgram(
        cameras=features.cameras,
        rename=read_rename(processors),
        state_key=STATE,
        state=state,
        state_dim=state.width if features.state_dim or before.width(STATE) else None,
        actions=actions,
        actions_in=targets,
        images=_images(before, features.cameras, findings),
        relative=read_relative(processors, settings, state.width, actions.width, findings),
        state_in_prompt=prompt.state_in_prompt,
        newline=prompt.newline,
        max_tokens=prompt.max_tokens,
        padding_side=prompt.padding_side,
        truncation=prompt.truncation,
        chunk_size=features.chunk_size,
        n_action_steps=features.n_action_steps,
        findings=tuple(findings),
    )


def _given(
    statistics: Mapping[str, Mapping[str, Floats]] | Literal["none"] | None, norm_mode: str | None
) -> Given:
    mode = None if norm_mode is None else norm_mode.upper()
    if mode is not None and mode not in MODES:
        expected = ", ".join(mode.lower() for mode in MODES)
        raise Pi0Error(f"norm_mode: expected one of {expected}, found {norm_mode!r}.")
    if statistics == "none":
        return Given({}, "IDENTITY")
    if statistics is None:
        return Given(None, mode)
    return Given({STATE: statistics["state"], ACTION: statistics["actions"]}, mode)


def _normalization(
    processors: Processors, name: str, file: str, given: Given, findings: list[Finding]
) -> Normalization:
    step = processors.find(name)
    if step is None:
        path = processors.folder / file
        if given.statistics is None:
            sentence = (
                f"{path}: expected a step {name}, found none. Name statistics with --norm-stats."
            )
            findings.append(error("step-missing", sentence))
        return Normalization(Step.with_defaults(path, name), given, given.statistics)
    if given.statistics is None and not step.file.is_file():
        return Normalization(step, given, None)  # that the file is missing was found already
    return read_normalization(step, given, findings)


def _images(
    before: Normalization, cameras: tuple[str, ...], findings: list[Finding]
) -> dict[str, Normalizer]:
    images = {}
    for key in cameras:
        if before.mode(key, "VISUAL") != "IDENTITY":
            widths = CHANNELS, CHANNELS
            images[key] = before.normalizer(f"image {key}", key, "VISUAL", widths, findings)
            if images[key].width != CHANNELS:
                sentence = (
                    f"statistics of image {key}: expected one value per channel ({CHANNELS}), "
                    f"found {images[key].width}."
                )
                findings.append(error("statistics-form", sentence))
    return images


def _check_statistics(
    features: Features,
    state: Normalizer,
    actions: Normalizer,
    findings: list[Finding],
) -> None:
    """Appends warnings of statistics of another length than declared, or without spread."""
    declared = (STATE, features.state_dim, state), (ACTION, features.action_dim, actions)
    for key, length, normalizer in declared:
        if length is not None and length != normalizer.width:
            sentence = (
                f"config.json: expected the feature {key} to be as long as its statistics "
                f"({normalizer.width}), found {length}. The statistics decide."
            )
            findings.append(warning("feature-width", sentence))
    flat = without_spread(state)
    if flat:
        sentence = (
            f"statistics of state: no spread in {', '.join(map(str, flat))}: any deviation there "
            "is blown up a millionfold. Were these joints still in the training data?"
        )
        findings.append(warning("no-spread", sentence))
