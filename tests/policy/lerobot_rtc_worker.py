"""Runs LeRobot's RTCProcessor on given numbers; started in LeRobot's environment.

    python lerobot_rtc_worker.py IN.npz OUT.npz

The denoiser is tanh(A x + b) over all of a chunk's numbers, in LeRobot's Euler loop.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor


def main(given: str, answer: str) -> None:
    arrays = {name: torch.from_numpy(value) for name, value in np.load(given).items()}
    matrix, bias, noise, previous = (arrays[n] for n in ("matrix", "bias", "noise", "previous"))
    steps = int(arrays["steps"])

    def velocity(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1) @ matrix.T + bias).view(x.shape)

    results = {}
    for schedule in RTCAttentionSchedule:
        for delay, horizon in arrays["cases"].tolist():
            processor = RTCProcessor(
                RTCConfig(prefix_attention_schedule=schedule, max_guidance_weight=10.0)
            )
            x = noise
            for i in range(steps):
                time = torch.tensor(1 - i / steps)
                v = processor.denoise_step(x, previous, delay, time, velocity, horizon)
                x = x - v / steps
            results[f"{schedule.value}-{delay}-{horizon}"] = x.numpy()
    np.savez(answer, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
