"""Two linear layers of π0 on the actions as one, for engines that compute them so."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Linear = tuple[Tensor, Tensor]  # weight [out, in] and bias [out]


class FoldedActions(NamedTuple):
    """`action_in_proj` and `action_time_mlp_in`, with nothing between them, as one linear layer:
    actions · actionsᵀ + embedded time · timeᵀ + bias. All float32."""

    actions: Tensor  # [E, action_dim]
    time: Tensor  # [E, E]
    bias: Tensor  # [E]


def fold_actions(first: Linear, second: Linear) -> FoldedActions:
    """Folds weight and bias of `action_in_proj` into those of `action_time_mlp_in`, in float64."""
    (weight, bias), (mix, offset) = first, second
    width = len(mix)
    of_actions = mix[:, :width].double()
    return FoldedActions(
        (of_actions @ weight.double()).float(),
        mix[:, width:].float().contiguous(),
        (of_actions @ bias.double() + offset.double()).float(),
    )
