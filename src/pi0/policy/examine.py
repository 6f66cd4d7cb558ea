"""Whether the parts of a policy fit together: its files may be another model's, robot's or
author's, with which it runs and moves a robot wrongly all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pi0.checkpoint.lerobot import EMPTY_CAMERA, POSTPROCESSOR, PREPROCESSOR, complete_features
from pi0.checkpoint.load import Checkpoint
from pi0.findings import Finding, error, warning
from pi0.number import is_count
from pi0.policy import lerobot
from pi0.policy.fit import (
    ADAPT,
    RELATIVE_JOINTS,
    aloha_flags,
    camera_findings,
    image_findings,
    processor_findings,
    relative_findings,
    stated_findings,
    width_findings,
)
from pi0.policy.lerobot import LerobotProgram
from pi0.policy.lerobot.fields import show
from pi0.policy.normalize import Normalizer
from pi0.policy.robot import Robot
from pi0.policy.robots import ROBOTS, robot_of_assets
from pi0.policy.setup import PolicyOptions, PolicySetup
from pi0.policy.statistics import FILE_NAME


def examine(
    setup: PolicySetup, options: PolicyOptions, program: LerobotProgram | None, resize: str | None
) -> list[Finding]:
    """What does not fit among the parts that are known."""
    checkpoint, robot, stats = setup.checkpoint, setup.robot, setup.statistics
    found = [] if program else _action_steps(setup)
    if program and options.norm_stats is None:
        found += _two_origins(checkpoint)
    if robot and stats:
        found += width_findings(checkpoint.config, robot, *stats[:2])
    if robot:
        found += stated_findings(checkpoint.settings, robot)
        cameras = program.cameras if program else _declared_cameras(checkpoint.settings)
        found += camera_findings(cameras, program.rename if program else {}, robot)
    if robot and setup.sources["robot"] == "named":
        found += _another_robot(setup.origin, robot)
    if program and robot:
        flags = aloha_flags(checkpoint.settings)
        if program.relative or RELATIVE_JOINTS not in flags:  # which processors know nothing of
            found += relative_findings(program.relative, robot)
        found += _aloha_of_openpi(checkpoint.settings, robot)
        found += processor_findings(*stats[1:]) if stats else []
    elif robot and (relative := lerobot.unread_relative(checkpoint)):
        differs = relative_findings(relative, robot)
        found += [warning(finding.code, finding.sentence) for finding in differs]
    if program and program.images and robot and resize:
        found += image_findings(program.images, robot, resize)
    return found


def placeholder_findings(setup: PolicySetup) -> list[Finding]:
    """Whether statistics leave all values as they are, as those that `pi0 synth` writes do."""
    pipeline = setup.pipeline
    if not pipeline or setup.sources["statistics"].partition(":")[0] == "none":
        return []
    return _placeholders("state", pipeline.state_stats) + _placeholders(
        "actions", pipeline.action_stats
    )


def _placeholders(what: str, stats: Normalizer) -> list[Finding]:
    if not stats.unchanged.all():
        return []
    return [
        warning(
            "statistics-placeholder",
            f"statistics of {what}: expected those of a data set, found mean 0 and spread 1 "
            f"throughout its {stats.width} values, which change nothing. Name the training run's "
            "with --norm-stats, or `none` if that is meant.",
        )
    ]


def _action_steps(setup: PolicySetup) -> list[Finding]:
    """Whether a chunk has the actions that config.json wants to be carried out."""
    steps, horizon = setup.n_action_steps, setup.checkpoint.config.horizon
    if steps is None or (is_count(steps) and steps <= horizon):
        return []
    return [
        error(
            "action-steps",
            f"config.json n_action_steps: expected 1 to {horizon} actions of a chunk, found "
            f"{show(steps)}.",
        )
    ]


def _two_origins(checkpoint: Checkpoint) -> list[Finding]:
    """LeRobot's files and openpi's statistics: only one of them belongs to the weights."""
    folder = checkpoint.folder_of(PREPROCESSOR, POSTPROCESSOR)
    places = [folder / FILE_NAME, *folder.glob(f"assets/**/{FILE_NAME}")]
    openpis = [path for path in places if path.is_file()]
    if not openpis:
        return []
    return [
        warning(
            "two-origins",
            f"{folder}: expected files of openpi or of LeRobot, found both: LeRobot's count, "
            f"{openpis[0].relative_to(folder)} is not read. Remove those that are not of the "
            "training run, or say --norm-stats and --preprocessing.",
        )
    ]


def _declared_cameras(settings: Mapping[str, Any]) -> list[str]:
    """The cameras of LeRobot's config.json, where its processors are not read."""
    if "input_features" not in settings:
        return []
    return [
        key
        for key, feature in complete_features(settings)[0].items()
        if feature.get("type") == "VISUAL" and not key.startswith(EMPTY_CAMERA)
    ]


def _aloha_of_openpi(settings: Mapping[str, Any], robot: Robot) -> list[Finding]:
    """Whether a robot's table has openpi's conventions of ALOHA; LeRobot's processors have none."""
    if robot.encode_state is not ROBOTS["aloha"].encode_state or ADAPT in aloha_flags(settings):
        return []
    return [
        warning(
            "aloha-differs",
            f"robot {robot.name}: expected a table without joint signs and gripper units of its "
            "own, as LeRobot's processors have none, found openpi's of ALOHA: right only for "
            "weights of openpi. Leave out --robot if LeRobot trained this checkpoint.",
        )
    ]


def _another_robot(origin: str | None, robot: Robot) -> list[Finding]:
    """Whether statistics lie under the name of another robot than the named one."""
    expected = robot_of_assets(origin) if origin else None
    if not expected or robot.name not in ROBOTS or robot.name == "generic":
        return []
    # aloha_sim is an aloha, pi05_libero a libero.
    if expected.partition("_")[0] in robot.name.split("_"):
        return []
    return [
        warning(
            "statistics-of-another-robot",
            f"statistics: expected those of robot {robot.name}, found those of {origin}. Name "
            f"the robot, --robot {expected}, or the right statistics with --norm-stats.",
        )
    ]
