"""Statistics that older LeRobot releases stored among the weights.

Their policies had modules `normalize_inputs`, `normalize_targets` and `unnormalize_outputs`, whose
buffers went into model.safetensors; LeRobot 0.4 moved them into processor files. A buffer that no
data set ever filled holds infinities.

Knows nothing of what the statistics are used for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pi0.checkpoint.files import TensorInfo, stream
from pi0.errors import CheckpointError

MIGRATION = "lerobot/processor/migrate_policy_normalization.py"


def read_buffers(
    tensors: Mapping[str, TensorInfo], buffers: Mapping[str, str]
) -> dict[str, Tensor]:
    """The statistics, float64, by names such as "action.std".

    Args:
        tensors: of the checkpoint, by their names.
        buffers: names of tensors → the statistics they hold.

    Raises:
        CheckpointError: a buffer was never filled, or two that hold the same statistic differ.
    """
    statistics: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    infos = {name: tensors[name] for name in buffers}
    for name, _, values in stream(infos, check_finite=False):
        file = infos[name].file
        if not torch.isfinite(values).all():
            raise CheckpointError(
                f"{file}: {name}: expected statistics, found infinite placeholders: this "
                "checkpoint was saved without those of a data set. Name some with --norm-stats, or "
                f"convert a checkpoint that has them with LeRobot's {MIGRATION}."
            )
        statistic, value = buffers[name], values.double()
        if statistic in statistics and not torch.equal(statistics[statistic], value):
            raise CheckpointError(
                f"{file}: {name}: expected the same {statistic} as in {sources[statistic]}, found "
                "another. Name statistics with --norm-stats."
            )
        statistics[statistic], sources[statistic] = value.clone(), name
    return statistics
