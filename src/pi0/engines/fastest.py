"""Which engine is the fastest on this machine: what "auto" means."""

from __future__ import annotations

import logging

import torch

from pi0.checkpoint.load import empty_model
from pi0.config import Pi0Config
from pi0.engines.base import Engine, EngineOptions
from pi0.engines.registry import find_engine
from pi0.engines.spec import EngineSpec, canonical_precision, split_spec
from pi0.errors import ConfigError, EngineError

logger = logging.getLogger("pi0")

# Engines that have float32, from fast to slow, and why one is chosen.
FASTEST = {
    "cuda": "the fastest engine, with a CUDA device",
    "cpu": "the fastest engine without a CUDA device",
    "reference": "no faster engine is available here",
}


def choose_engine(
    engine: str, config: Pi0Config, dtype: str | None, device: str | None, image_size: int | None
) -> EngineSpec:
    """The engine of a spec; for the name "auto" the fastest on this machine that is exact to
    float32, or the fastest of the precision and on the device that are stated.

    Raises:
        EngineError, ConfigError: see `EngineSpec.parse`.
    """
    for option, value in (("engine", engine), ("dtype", dtype), ("device", device)):
        if value is not None and not isinstance(value, str):  # from Python
            raise ConfigError(f"{option}: expected a text, found {value!r}.")
    name, dtype, device = split_spec(engine, dtype, device)
    if name != "auto":
        return EngineSpec.parse(name, dtype, device)
    spec, reason = fastest_engine(config, dtype, device, image_size)
    logger.info("engine %s: %s.", spec.label, reason)
    return spec


def require_options(engine: str | Engine, dtype: str | None, device: str | None) -> None:
    """Raises ConfigError if an engine that is made already has another precision or device."""
    if not isinstance(engine, Engine):
        return
    made = engine.options.precision, engine.info["device"]
    wanted = canonical_precision(dtype), device
    for option, found, expected in zip(("dtype", "device"), made, wanted, strict=True):
        if expected not in (None, found):
            raise ConfigError(
                f"{option}: expected {found}, with which engine {engine.name} was made, found "
                f"{expected!r}. Leave it out, or make the engine with it."
            )


def fastest_engine(
    config: Pi0Config,
    precision: str | None = None,
    device: str | None = None,
    image_size: int | None = None,
) -> tuple[EngineSpec, str]:
    """The fastest engine on this machine within the limits that `pi0 verify` has for float32.

    Args:
        config: the checkpoint's.
        precision, device: what was asked for; the fastest engine that has it is chosen.

    Returns:
        The engine, and why it was chosen: a phrase.

    Raises:
        EngineError: none that has this precision and device is available.
    """
    precision = canonical_precision(precision) or "float32"
    reasons = []
    for name, reason in FASTEST.items():
        engine = find_engine(name)
        options = EngineOptions(precision, device, image_size)
        try:
            if precision not in engine.capabilities.precisions:
                raise EngineError(f"engine {name} has no {precision}.")
            engine.check_available(config, options)
            if name == "cuda":
                _check_cuda_memory(config, precision, device)
        except EngineError as error:
            reasons.append(str(error))
            continue
        return EngineSpec(name, precision, device), reason
    raise EngineError(
        f"engine auto: expected an engine with precision {precision}"
        f"{f' on device {device}' if device else ''}, found none: {' '.join(reasons)}"
    )


def _check_cuda_memory(config: Pi0Config, precision: str, device: str | None) -> None:
    """Raises EngineError if the weights do not fit into a CUDA device's free memory."""
    needed = sum(p.numel() for p in empty_model(config, torch.float32).parameters())
    needed *= {"float32": 4, "bfloat16": 2}.get(precision, 1)
    free, _ = torch.cuda.mem_get_info(torch.device(device or "cuda"))
    if needed > free:
        raise EngineError(
            f"engine cuda: expected {needed / 1e9:.1f} GB of free GPU memory for the weights, "
            f"found {free / 1e9:.1f} GB."
        )
