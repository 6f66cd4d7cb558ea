"""Renames, and orders of steps under which LeRobot would compute something else than is done here.

LeRobot's own order is rename, line break, tokenizer, relative actions, normalizer; in π0.5 rename,
relative actions, normalizer, state in the prompt, tokenizer; and unnormalizer, absolute actions.
Steps that do not touch the same values may stand in any order.
"""

from __future__ import annotations

from pi0.findings import Finding, error
from pi0.policy.lerobot.prompt import ADD_STATE
from pi0.policy.lerobot.steps import Processors, Step

RENAME = "rename_observations_processor"
NORMALIZE, UNNORMALIZE = "normalizer_processor", "unnormalizer_processor"
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"


def read_rename(processors: Processors) -> dict[str, str]:
    """All renames in one: key of a robot's observation → key that the policy knows."""
    renames: dict[str, str] = {}
    for step in processors.before:
        if step.name == RENAME:
            own: dict[str, str] = dict(step.config["rename_map"])
            chained = {key: own.get(name, name) for key, name in renames.items()}
            renames = own | chained
    return {key: name for key, name in renames.items() if key != name}


def check_order(processors: Processors, findings: list[Finding]) -> None:
    """Appends an error for each pair of steps in an order that is not carried out."""
    steps = {step.name: step for step in (*processors.before, *processors.after)}
    normalize, relative = steps.get(NORMALIZE), steps.get(RELATIVE)
    for step in processors.before:
        if step.name == RENAME and step.config["rename_map"]:
            _expect_order(step, relative, findings)
            _expect_order(step, normalize, findings)
    # Else the prompt would hold the state as the robot gives it.
    _expect_order(normalize, steps.get(ADD_STATE), findings)
    absolute = steps.get(ABSOLUTE)
    if relative and (relative.config["enabled"] or (absolute and absolute.config["enabled"])):
        # Else the state that is subtracted and added would be a normalised one.
        _expect_order(relative, normalize, findings)
    if absolute and absolute.config["enabled"]:
        _expect_order(steps.get(UNNORMALIZE), absolute, findings)


def _expect_order(first: Step | None, second: Step | None, findings: list[Finding]) -> None:
    if first and second and first.index > second.index:
        findings.append(
            error(
                "step-order",
                f"{first.file}: expected {first.name} before {second.name} as in LeRobot's own "
                "files, found it after, which is not carried out here.",
            )
        )
