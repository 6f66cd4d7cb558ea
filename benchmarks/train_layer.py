"""Memory and time of training one layer of each tower at full width, beside what is estimated.

    python benchmarks/train_layer.py [--whole] [--batch 1] [--lora 16] [--bfloat16] [--recompute]

The towers of π0 with one layer each and a small vocabulary, or with --whole all of it; three
cameras of 224 px, 48 tokens: steps are timed, and the peak of memory is compared with
`pi0 train --estimate`. On a CPU the peak is that of the resident set, less what it was before there
was a model.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import replace

import torch

from pi0.config import PRESETS, Pi0Config
from pi0.errors import human_bytes
from pi0.inputs import ModelInputs
from pi0.model import Pi0
from pi0.train.estimate import estimate
from pi0.train.lora import LoraOptions, add_lora
from pi0.train.loss import Batch, TrainingModel
from pi0.train.start import Start
from pi0.train.trainer import TrainerOptions, autocast, keep_float32

CAMERAS, TOKENS, STEPS = 3, 48, 5


def one_layer() -> Pi0Config:
    """The published towers, one layer of each."""
    base = PRESETS["pi0_base"]
    towers = {name: replace(getattr(base, name), depth=1) for name in ("vision", "vlm", "expert")}
    return replace(base, **towers, vocab_size=1000)


def random_batch(config: Pi0Config, size: int, device: torch.device) -> Batch:
    pixels = config.vision.image_size
    inputs = ModelInputs(
        images=torch.rand(size, CAMERAS, 3, pixels, pixels) * 2 - 1,
        image_mask=torch.ones(size, CAMERAS, dtype=torch.bool),
        tokens=torch.randint(config.vocab_size, (size, TOKENS)),
        token_mask=torch.ones(size, TOKENS, dtype=torch.bool),
        state=torch.randn(size, config.state_dim),
    )
    actions = torch.randn(size, config.horizon, config.action_dim, device=device)
    noise, time = torch.randn_like(actions)[:, None], torch.rand(size, 1, device=device)
    return Batch(inputs.to(device), actions, noise, time, columns={})


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", action="store_true", help="every layer")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter alone")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    config = PRESETS["pi0_base"] if arguments.whole else one_layer()
    device = torch.device(arguments.device)
    options = TrainerOptions(bfloat16=arguments.bfloat16, recompute=arguments.recompute)

    def prepare(model: Pi0) -> None:
        if arguments.lora:
            add_lora(model, LoraOptions(arguments.lora), seed=0)

    expected = estimate(config, prepare, options, arguments.batch, CAMERAS, TOKENS, 1, ema=False)
    libraries = peak_bytes(device)
    model = Start("pi0_base", config).model(0, device)
    prepare(model)
    if options.bfloat16:
        keep_float32(model, device.type)
    module = TrainingModel(model, config.action_dim, recompute=options.recompute)
    optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
    batch = random_batch(config, arguments.batch, device)
    made = peak_bytes(device) - libraries
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        with autocast(device.type, options.bfloat16):
            loss = module(batch)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    found = peak_bytes(device) - libraries
    print(f"{device}, batch {arguments.batch}, adapter of rank {arguments.lora}, {options}")
    print(f"step: {min(times[1:]):.3f} s at best of {STEPS - 1}")
    print(f"peak: {human_bytes(found)}; {human_bytes(made)} while the model was made")
    print(f"estimated: {human_bytes(expected.total)}: {expected}")


if __name__ == "__main__":
    main()
