"""Pre- and post-processing of `pi0rt`: LeRobot's own, of π0 or of π0.5.

A checkpoint with processor files needs none of this: LeRobot reads the files. It is for one
without them, for which LeRobot makes processors from the statistics of a dataset.
"""

from __future__ import annotations

from typing import Any

from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors

from lerobot_policy_pi0rt.configuration_pi0rt import Pi0rtConfig
from pi0.errors import ConfigError

MAKERS = {"pi0": make_pi0_pre_post_processors, "pi05": make_pi05_pre_post_processors}


def make_pi0rt_pre_post_processors(
    config: Pi0rtConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """The processors that LeRobot makes for a checkpoint of this kind.

    Args:
        config: of a policy that was made, so that it says what the checkpoint is.
        dataset_stats: by feature and name, as in LeRobot.

    Raises:
        ConfigError: the policy was not made yet.
    """
    if config.model not in MAKERS:
        raise ConfigError(
            f"model: expected one of {', '.join(MAKERS)}, which the checkpoint says when the "
            f"policy is made, found {config.model!r}. Make the policy first, or name it with "
            "--policy.model."
        )
    return MAKERS[config.model](config, dataset_stats=dataset_stats)
