"""What a timestep is to the network.

In π0 the bias of the layer on the actions, in π0.5 scale, shift and gate of the expert's norms.
They depend on nothing else, so they are computed on the host, in float32, and uploaded once for all
steps of a schedule. Each is a tensor of its own: to cut it out of a larger one would cost an
operation each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pi0.engines.tenstorrent.backend import Handle, Upload
from pi0.engines.tenstorrent.precision import F32, Precision
from pi0.engines.tenstorrent.weights import (
    AdaptiveNorms,
    Put,
    RmsNorm,
    StateAndTime,
    TrunkNorms,
    pairs_of,
)
from pi0.model import Tap
from pi0.model.flow import embed_time
from pi0.model.pi0 import no_tap


@dataclass(frozen=True)
class Timestep:
    """One timestep on the device.

    Attributes:
        bias: [1, 1, 1, E] float32, added to the actions before their activation; None in π0.5.
        norms: of the expert.
    """

    bias: Handle | None
    norms: TrunkNorms


def put_timesteps(
    time: StateAndTime | AdaptiveNorms,
    t: Tensor,
    precision: Precision,
    put: Put,
    tap: Tap = no_tap,
) -> list[Timestep]:
    """Uploads times t [N], one timestep each; the tap sees π0.5's condition [N, E]."""
    if isinstance(time, StateAndTime):
        biases = F.linear(embed_time(t, len(time.time[0])), *time.time)  # [N, E]
        return [Timestep(put(Upload(bias[None, None, None], F32)), time.norms) for bias in biases]
    first, second = time.mlp
    embedded = embed_time(t, len(first[0]))
    condition = F.silu(F.linear(F.silu(F.linear(embedded, *first)), *second))
    condition = tap("suffix.condition", condition)
    modulations = [F.linear(condition, *dense) for dense in time.dense]  # each [N, 3E]
    timesteps = []
    for i in range(len(t)):
        *norms, final = (_put_norm(rows[i : i + 1], precision, put) for rows in modulations)
        timesteps.append(Timestep(None, TrunkNorms(pairs_of(norms), final)))
    return timesteps


def _put_norm(modulation: Tensor, precision: Precision, put: Put) -> RmsNorm:
    scale, shift, gate = modulation[None, None].chunk(3, dim=-1)  # each [1, 1, 1, E]
    weight, shift = (precision.rounded(x, precision.norm) for x in (1 + scale, shift))
    return RmsNorm(
        put(Upload(weight, precision.norm)),
        put(Upload(gate, precision.residual)),  # multiplied with the branch in one dtype
        put(Upload(shift, precision.norm)),
    )
