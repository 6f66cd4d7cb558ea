"""Making an engine for a verb: its memory is compared with what is free, then its weights load."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pi0.checkpoint.load import Checkpoint
    from pi0.engines.base import Engine
    from pi0.engines.spec import EngineSpec


def load_engine(
    opened: Checkpoint,
    spec: EngineSpec,
    cameras: int,
    tokens: int,
    image_size: int | None = None,
    batch: int = 1,
    weight_cache: bool = False,
) -> Engine:
    """The engine of a spec, loaded with a progress bar, for inputs of these sizes."""
    from pi0.cli.show import byte_progress
    from pi0.engines.base import make_engine
    from pi0.engines.memory import require_memory

    # Those of a weight cache are mapped from a file.
    require_memory(opened, spec, cameras, tokens, image_size, batch, loaded=weight_cache)
    with byte_progress("loading", opened.read_bytes) as progress:
        return make_engine(
            spec, opened, image_size=image_size, weight_cache=weight_cache, progress=progress
        )
