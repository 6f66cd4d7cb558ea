"""Whether an engine has the memory that it needs, asked before the work."""

from __future__ import annotations

from pi0.checkpoint import memory
from pi0.checkpoint.estimate import required_bytes
from pi0.checkpoint.load import Checkpoint
from pi0.engines.registry import find_engine
from pi0.engines.spec import EngineSpec


def require_memory(
    checkpoint: Checkpoint,
    spec: EngineSpec,
    cameras: int,
    tokens: int,
    image_size: int | None = None,
    batch: int = 1,
    loaded: bool = False,
    replicas: int = 1,
) -> None:
    """Refuses what an engine that computes on the host cannot hold, before its weights are loaded.

    Args:
        image_size: pixels; None: the checkpoint's.
        loaded: its weights are in memory already, or mapped from a file.
        replicas: how many engines of that kind, each in a process of its own.

    Raises:
        ConfigError: less memory is free than is needed at least; an image size that cannot be.
    """
    can = find_engine(spec.name).capabilities
    if (spec.device or can.devices[0]) != "cpu":
        return
    config = checkpoint.config
    if image_size is not None:
        config = config.with_image_size(image_size)
    sizes = cameras, tokens, batch, loaded, can.whole_logits
    memory.require_memory(
        replicas * required_bytes(config, spec.precision, *sizes),
        f"{f'{replicas} replicas of ' * (replicas > 1)}engine {spec.name} in {spec.precision} with "
        f"{cameras} images of {config.vision.image_size} px and {tokens} tokens, chunks of "
        f"{config.horizon} actions{f', {batch} at a time' * (batch > 1)}",
    )
