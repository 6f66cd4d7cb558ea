"""Which dimensions of an action are relative to the state, by LeRobot's rules.

Source: LeRobot 0.6.1, `processor/relative_action_processor.py`. Names and exclusions are compared
in lower case, an excluded word anywhere in a name excludes it, and what has no name is relative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pi0.findings import Finding, error, warning
from pi0.policy.lerobot.order import ABSOLUTE, RELATIVE
from pi0.policy.lerobot.steps import Processors


def relative_mask(
    names: list[Any] | None, excluded: list[Any] | None, action_dim: int
) -> tuple[bool, ...]:
    """True for each dimension of an action that is relative.

    Args:
        names: of the dimensions; fewer: the rest is relative; more: cut; None: all are relative.
        excluded: words; empty ones are dropped.
    """
    words = [str(word).lower() for word in excluded or () if word]
    known = [str(name).lower() for name in (names or ())[:action_dim]]
    named = [not any(word in name for word in words) for name in known]
    return (*named, *[True] * (action_dim - len(named)))


def read_relative(
    processors: Processors,
    settings: Mapping[str, Any],
    state_dim: int,
    action_dim: int,
    findings: list[Finding],
) -> tuple[bool, ...] | None:
    """The mask of the relative actions of a checkpoint; None: actions are absolute.

    config.json's use_relative_actions decides nothing: in LeRobot, training and inference both
    follow the processors.

    Args:
        settings: the content of config.json.
        findings: what is found is appended.
    """
    relative, absolute = processors.find(RELATIVE), processors.find(ABSOLUTE)
    subtracts = bool(relative and relative.config["enabled"])
    adds = bool(absolute and absolute.config["enabled"])
    if subtracts != adds:
        on, off = (RELATIVE, ABSOLUTE) if subtracts else (ABSOLUTE, RELATIVE)
        findings.append(
            error(
                "relative-one-sided",
                f"{processors.folder}: expected {RELATIVE} and {ABSOLUTE} to be enabled both or "
                f"neither, found {on} enabled and {off} not: the robot would be sent "
                f"{'relative actions as absolute ones' if subtracts else 'the state twice'}. "
                "Correct `enabled` in the two processor files.",
            )
        )
    declared = settings.get("use_relative_actions")
    if isinstance(declared, bool) and subtracts == adds != declared:
        findings.append(
            warning(
                "relative-declared",
                f"config.json use_relative_actions: expected {str(adds).lower()}, since "
                f"{RELATIVE} and {ABSOLUTE}, which count, are {'' if adds else 'not '}enabled, "
                f"found {str(declared).lower()}. Correct config.json, or `enabled` in the "
                "processor files.",
            )
        )
    if relative is None or not (subtracts and adds):
        return None
    if state_dim < action_dim:
        findings.append(
            error(
                "relative-width",
                f"{relative}: expected a state at least as long as an action ({action_dim}), found "
                f"{state_dim}.",
            )
        )
    return relative_mask(
        relative.config["action_names"], relative.config["exclude_joints"], action_dim
    )
