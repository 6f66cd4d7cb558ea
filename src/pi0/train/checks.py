"""What is wrong with a dataset for a model and a robot, said before training starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.data.schema import ACTION, SERVED_SECONDS, STATE
from pi0.errors import Pi0Error
from pi0.findings import Finding, error, warning
from pi0.policy.fit import relative_findings, stated_findings
from pi0.policy.lerobot import unread_relative
from pi0.policy.normalize import OUTLIER_SIGMA, Statistics, make_normalizer
from pi0.policy.robot import Robot
from pi0.policy.robots import robot_names
from pi0.policy.statistics import (
    find_norm_stats,
    find_origin,
    read_norm_stats,
    statistics_folder,
)
from pi0.train.samples import Samples

if TYPE_CHECKING:
    from pi0.data.read import Dataset

PREFIX = "observation.images."
# Of statistics, from which a fine-tuned policy has to learn anew: the mean, in standard deviations,
# and how many times the standard deviation is another. docs/training.md has what it costs.
MOVED, SCALED = 0.15, 2.0


def match_cameras(dataset: Dataset, robot: Robot) -> dict[str, str]:
    """The robot's camera keys, in its order → the dataset's."""
    found: dict[str, str] = {}
    for key in dataset.cameras:
        ours = robot.camera_key(key) or robot.camera_key(key.removeprefix(PREFIX))
        if ours is not None:
            found.setdefault(ours, key)
    return {camera.key: found[camera.key] for camera in robot.cameras if camera.key in found}


def examine(
    dataset: Dataset,
    robot: Robot,
    config: Pi0Config,
    columns: dict[str, int],
    stated: bool = True,
) -> list[Finding]:
    """What does not fit between a dataset, a robot's table and a model.

    Args:
        columns: that auxiliary heads predict → the block of the VLM that each reads.
        stated: whether the user or the checkpoint said which robot it is.
    """
    missing = [
        error(
            "column-missing",
            f"{name}: expected this column in the dataset, found "
            f"{', '.join(dataset.names)}. Leave out --aux {name}, or record it."
            if name in columns
            else f"{name}: expected this column in the dataset, found {', '.join(dataset.names)}.",
        )
        for name in (STATE, ACTION, *columns)
        if name not in dataset.names
    ]
    found = [*missing, *_cameras(dataset, robot), *_rates(dataset, robot), *_served(dataset)]
    if not stated:
        found += _robots(dataset, robot)
    if not missing:
        found += _widths(dataset, robot, config)
    depth = config.vlm.depth
    found += [
        error("block", f"{name}@{block}: expected a block from 0 to {depth - 1}, found {block}.")
        for name, block in columns.items()
        if not 0 <= block < depth
    ]
    return found


def examine_conventions(checkpoint: Checkpoint, robot: Robot, named: bool) -> list[Finding]:
    """Whether a robot's actions are those that a checkpoint has learnt, as far as its files say.

    Args:
        named: whether the user said which robot it is; then what differs is a warning.
    """
    remedy = (
        "what it has learnt means other actions then. Name with --robot a robot with the same "
        "`relative` (`delta`), which needs --layout openpi, or one whose actions it is to learn "
        "anew."
    )
    found = stated_findings(checkpoint.settings, robot, remedy)
    if relative := unread_relative(checkpoint):
        found += relative_findings(relative, robot, remedy)
    return [warning(finding.code, finding.sentence) for finding in found] if named else found


def examine_values(dataset: Dataset, samples: Samples) -> list[Finding]:
    """States and actions that are far from all others by the statistics in use."""
    pipeline, chunks = samples.pipeline, samples.chunks
    actions = pipeline.encode_actions(chunks.actions[:, None], chunks.states)[:, 0]
    found = []
    for key, values in ((STATE, samples.states), (ACTION, actions)):
        row, place = divmod(int(np.abs(values).argmax()), values.shape[1])
        value = abs(float(values[row, place]))
        if value > OUTLIER_SIGMA:
            found.append(
                warning(
                    "outlier",
                    f"{dataset.place(row)}: {key}, value {place}: expected at most "
                    f"{OUTLIER_SIGMA:g} when normalised, found {value:.2g}: it differs from what "
                    "nearly all frames have, and outweighs them in the loss. Leave out such "
                    "episodes, or state wider statistics (--norm-stats).",
                )
            )
    return found


def examine_statistics(
    checkpoint: Checkpoint, measured: Mapping[str, Statistics], robot: Robot
) -> list[Finding]:
    """Whether those measured on the data are far from those that the checkpoint was trained with:
    its states and actions then mean others before the first step."""
    origin = checkpoint.settings.get("robot") or find_origin(checkpoint, None) or robot.name
    try:
        file = find_norm_stats(statistics_folder(checkpoint))
        tables = read_norm_stats(file)
        own = {what: make_normalizer(what, "mean_std", "openpi", tables[what]) for what in measured}
    except Pi0Error:  # none, several or damaged ones, which training does not need
        return []
    found = []
    for what, old in own.items():
        new = make_normalizer(what, "mean_std", "openpi", measured[what])
        if origin != robot.name or old.width != new.width or old.unchanged.all():
            continue  # another robot's, or of no data at all
        moved = np.abs(new.offset - old.offset) / old.scale
        scaled = np.abs(np.log(new.scale / old.scale))
        place = int(np.maximum(moved / MOVED, scaled / math.log(SCALED)).argmax())
        if moved[place] > MOVED or scaled[place] > math.log(SCALED):
            found.append(
                warning(
                    "statistics-moved",
                    f"{what}, value {place}: expected statistics like the checkpoint's, mean "
                    f"{old.offset[place]:.3g} and std {old.scale[place]:.3g}, found "
                    f"{new.offset[place]:.3g} and {new.scale[place]:.3g} in the data: what it "
                    "has learnt means other states and actions now. With little data of the same "
                    f"robot, keep its statistics: --norm-stats {file}.",
                )
            )
    return found


def _cameras(dataset: Dataset, robot: Robot) -> list[Finding]:
    matched = match_cameras(dataset, robot)
    known = ", ".join((*camera.names, camera.key)[0] for camera in robot.cameras)
    have = ", ".join(dataset.cameras) or "none"
    missing = [c.key for c in robot.cameras if c.required and c.key not in matched]
    if missing or not matched:
        return [
            error(
                "cameras",
                f"cameras: expected {PREFIX}NAME for the cameras {known} of robot {robot.name}, "
                f"found {have}. Name the robot that the data are of, or describe it in a file "
                "(docs/robots.md).",
            )
        ]
    unused = sorted(set(dataset.cameras) - set(matched.values()))
    return [
        warning(
            "camera-unused",
            f"camera {key}: expected one of {known}, which robot {robot.name} has, found another "
            "name. It is not used.",
        )
        for key in unused
    ]


def _robots(dataset: Dataset, robot: Robot) -> list[Finding]:
    """The dataset may say whose it is where nobody else does."""
    if dataset.robot == robot.name or dataset.robot not in robot_names():
        return []
    return [
        error(
            "robot",
            f"robot: expected --robot, since the dataset is of {dataset.robot}, found none. Add "
            f"--robot {dataset.robot}, or --robot {robot.name} to train without its conventions.",
        )
    ]


def _served(dataset: Dataset) -> list[Finding]:
    """A recording of `pi0 serve` has a frame for each observation: at every tick, or less often."""
    if SERVED_SECONDS not in dataset.names:
        return []
    gaps = np.diff(dataset.column(SERVED_SECONDS).ravel())
    gaps = gaps[gaps > 0]  # within episodes
    if not gaps.size or 2 / 3 < (gap := float(np.median(gaps))) * dataset.fps < 3 / 2:
        return []
    return [
        warning(
            "served-rate",
            f"dataset: expected an observation at every tick, {1 / dataset.fps:.3g} s after the "
            f"one before, found a median of {gap:.3g} s in {SERVED_SECONDS}. Actions that the "
            "robot executed between two observations are not in it: the policy will move at "
            "another speed.",
        )
    ]


def _rates(dataset: Dataset, robot: Robot) -> list[Finding]:
    if robot.control_hz is None or abs(robot.control_hz - dataset.fps) <= 0.01 * dataset.fps:
        return []
    return [
        warning(
            "rate",
            f"dataset: expected {robot.control_hz:g} frames a second, at which robot {robot.name} "
            f"executes actions, found {dataset.fps:g}. The policy will move at another speed.",
        )
    ]


def _widths(dataset: Dataset, robot: Robot, config: Pi0Config) -> list[Finding]:
    found = []
    for key, table, model in (
        (STATE, robot.state_dim, config.state_dim),
        (ACTION, robot.action_dim, config.action_dim),
    ):
        width = int(np.prod(dataset.column(key).shape[1:]))
        if table is not None and width != table:
            found.append(
                error(
                    "width",
                    f"{key}: expected {table} values for robot {robot.name}, found {width}. Name "
                    "the robot that the data are of with --robot.",
                )
            )
        elif width > model:
            found.append(
                error(
                    "width",
                    f"{key}: expected at most the {model} values of the model, found {width}. "
                    "Train a model with a wider state_dim and action_dim.",
                )
            )
    return found
