"""What users get wrong around a model and `prepare` lets pass, as findings.

`prepare` finds what a policy needs and lacks. Here is what runs and moves a robot wrongly all the
same: files that belong to another model, robot or author.
"""

from __future__ import annotations

from pi0.checkpoint.lerobot import EMPTY_CAMERA, POSTPROCESSOR, PREPROCESSOR, complete_features
from pi0.checkpoint.load import Checkpoint
from pi0.findings import Finding, error, warning
from pi0.number import is_count
from pi0.policy import lerobot
from pi0.policy.fit import last_part
from pi0.policy.lerobot.fields import show
from pi0.policy.normalize import Normalizer
from pi0.policy.pipeline import Pipeline
from pi0.policy.robot import Robot
from pi0.policy.robots import ROBOTS, robot_of_assets
from pi0.policy.setup import PolicySetup
from pi0.policy.statistics import FILE_NAME


def examine(setup: PolicySetup) -> list[Finding]:
    """The findings of a set-up, and what else does not fit together; reads small files only."""
    checkpoint, pipeline, robot = setup.checkpoint, setup.pipeline, setup.robot
    found = [*setup.findings, *_two_origins(checkpoint)]
    if not any(finding.code == "action-steps" for finding in found):
        found += _action_steps(setup)
    if robot and setup.sources.get("robot") == "named":
        if not any(finding.code.startswith("cameras-") for finding in found):
            found += _cameras(checkpoint, robot)
        found += _another_robot(setup.origin, robot)
    if pipeline:
        found += _lengths_differ(checkpoint, pipeline)
    if pipeline and setup.sources["statistics"].partition(":")[0] != "none":
        found += _placeholders("state", pipeline.state_stats)
        found += _placeholders("actions", pipeline.action_stats)
    return found


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
    if not openpis or not lerobot.is_lerobot(checkpoint):
        return []
    return [
        warning(
            "two-origins",
            f"{folder}: expected files of openpi or of LeRobot, found both: LeRobot's count, "
            f"{openpis[0].relative_to(folder)} is not read. Remove those that are not of the "
            "training run, or say --norm-stats and --preprocessing.",
        )
    ]


def _cameras(checkpoint: Checkpoint, robot: Robot) -> list[Finding]:
    """Whether a named robot has the cameras that LeRobot's config.json declares."""
    if "input_features" not in checkpoint.settings:
        return []
    inputs, _ = complete_features(checkpoint.settings)
    declared = [
        key
        for key, feature in inputs.items()
        if feature.get("type") == "VISUAL" and not key.startswith(EMPTY_CAMERA)
    ]
    known = {name for c in robot.cameras for name in (*c.names, last_part(c.key))}
    strange = [key for key in declared if last_part(key) not in known]
    if not strange:
        return []
    names = ", ".join(camera.key for camera in robot.cameras)
    return [
        warning(
            "cameras-differ",
            f"cameras: expected those of config.json, {', '.join(declared)}, in this order, found "
            f"{names} of robot {robot.name}: their order alone decides which picture takes whose "
            "place. Leave out --robot, or write a robot file with these cameras.",
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


def _lengths_differ(checkpoint: Checkpoint, pipeline: Pipeline) -> list[Finding]:
    """Whether config.json declares another length of prompts than LeRobot's tokenizer step."""
    declared, counts = checkpoint.settings.get("tokenizer_max_length"), pipeline.prompt.max_tokens
    if declared in (None, counts):
        return []
    return [
        warning(
            "max-tokens-declared",
            f"config.json tokenizer_max_length: expected {counts} as LeRobot's tokenizer step "
            f"says, which counts, found {declared}. Copy all files of one checkpoint.",
        )
    ]


def _placeholders(what: str, stats: Normalizer) -> list[Finding]:
    """Whether statistics leave all values as they are."""
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
