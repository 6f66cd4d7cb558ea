"""The pictures in an observation that a policy has read, for the live page and for recording."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.policy import Pipeline
from pi0.policy.images import channels_last, eight_bit
from pi0.policy.observation import check_observation, lookup, read_image


def present_cameras(observation: Mapping[str, Any], pipeline: Pipeline) -> list[str]:
    """The keys of `read_pictures`, without the work on pictures."""
    return [key for key, _ in _present(observation, pipeline)]


def read_pictures(
    observation: Mapping[str, Any], pipeline: Pipeline
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Camera keys and pictures [H, W, 3] in the order of the robot's table, without absent ones."""
    for key, image in _present(observation, pipeline):
        yield key, eight_bit(channels_last(key, read_image(key, image)))


def _present(observation: Mapping[str, Any], pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
    observation = check_observation(observation, pipeline.robot, pipeline.rename)
    for camera in pipeline.robot.cameras:
        image = lookup(observation, camera.key)
        if image is not None:
            yield camera.key, image
