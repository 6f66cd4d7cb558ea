"""Whether an engine has the memory that it needs, asked before the work."""

from __future__ import annotations

from pi0.checkpoint.estimate import require_memory_for
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
) -> None:
    """Refuses what an engine that computes on the host cannot hold.

    Args:
        image_size: pixels; None: the checkpoint's.
        loaded: its weights are in memory already, or mapped from a file.

    Raises:
        ConfigError: it needs more memory than is free.
    """
    device = spec.device or find_engine(spec.name).capabilities.devices[0]
    if device == "cpu":
        sizes = cameras, tokens, image_size, batch, loaded
        require_memory_for(checkpoint, spec.name, spec.precision, *sizes)
