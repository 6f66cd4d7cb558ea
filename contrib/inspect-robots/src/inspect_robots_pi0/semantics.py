"""What the actions of a robot mean, which its table does not say."""

from __future__ import annotations

from inspect_robots import ActionSemantics

# Of the robots in pi0's tables whose meaning is certain.
SEMANTICS = {
    "tabletop": ActionSemantics(
        control_mode="eef_delta_pos",
        gripper="binary",
        frame="base",
        dim_labels=("x", "y", "z", "gripper"),
    )
}


def semantics_of(
    robot: str | None, names: tuple[str, ...], control_mode: str | None
) -> ActionSemantics | None:
    """The meaning of a robot's actions, if it is known or named."""
    if control_mode is not None:
        return ActionSemantics(control_mode=control_mode, dim_labels=names or None)
    return SEMANTICS.get(robot or "")
