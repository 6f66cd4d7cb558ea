"""The robot that a LeRobot checkpoint describes, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pi0.checkpoint.lerobot import EMPTY_CAMERA, POSTPROCESSOR, PREPROCESSOR, complete_features
from pi0.checkpoint.load import Checkpoint
from pi0.errors import Pi0Error
from pi0.policy.lerobot.program import LerobotProgram, has_processors, read_program
from pi0.policy.observation import PROMPT_KEYS
from pi0.policy.robot import Camera, Robot


def robot_of(program: LerobotProgram, settings: Mapping[str, Any]) -> Robot:
    """The robot that a LeRobot checkpoint describes. As in LeRobot, one camera at least must be
    there, the others may be absent, and features that π0 does not read may be there."""
    names: dict[str, list[str]] = {key: [_short(key)] for key in program.cameras}
    for source, key in program.rename.items():
        if key in names:
            names[key] += [source, _short(source)]
    # A short name that two cameras would have is nobody's.
    every = [name for key, own in names.items() for name in {key, *own}]
    names = {k: [n for n in own if n == k or every.count(n) == 1] for k, own in names.items()}
    actions = settings.get("action_feature_names")
    named = list(map(str, actions)) if isinstance(actions, list) else []
    known = len({*named}) == len(named) == program.action_dim  # others say nothing of an action
    inputs, _ = complete_features(settings)
    read = {program.state_key, *program.cameras, *PROMPT_KEYS}
    unread = [key for key in inputs if key not in read and not key.startswith(EMPTY_CAMERA)]
    return Robot(
        name="lerobot",
        cameras=tuple(Camera(key, tuple(names[key]), required=False) for key in program.cameras),
        state=((program.state_key, program.state_dim),),
        ignored=tuple(unread),
        action_dim=program.action_dim,
        delta=tuple(1 if relative else -1 for relative in program.relative or ()),
        action_names=tuple(named) if known else (),
    )


def unread_relative(checkpoint: Checkpoint) -> tuple[bool, ...] | None:
    """Which actions LeRobot's processors make relative, of a checkpoint with which they are not
    carried out; None: none, or there are no processors that can be read."""
    folder = checkpoint.folder_of(PREPROCESSOR, POSTPROCESSOR)
    if not has_processors(folder):
        return None
    try:
        return read_program(
            folder,
            checkpoint.settings,
            statistics="none",
            robot_given=True,
            tokenizer_given=True,
        ).relative
    except Pi0Error:
        return None


def _short(key: str) -> str:
    """The name that `--image` takes for a camera: what comes after LeRobot's prefix."""
    return key.removeprefix("observation.").removeprefix("images.")
