"""What `pi0 inspect` says of a checkpoint: layout, modules, configuration, sizes, memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from pi0.checkpoint.estimate import estimate
from pi0.checkpoint.files import stream
from pi0.checkpoint.infer import MODEL_TYPES
from pi0.checkpoint.layouts import EMBEDDING
from pi0.checkpoint.load import Checkpoint, check
from pi0.config import Pi0Config
from pi0.dtypes import DTYPES

MODULES = {
    "vision tower": ("vision_tower.",),
    "projector": ("projector.",),
    "token embedding": (EMBEDDING,),
    "VLM": ("vlm.",),
    "action expert": ("expert.",),
    "state, action and time": ("state_proj.", "action_", "time_mlp_"),
}


def report(checkpoint: Checkpoint, cameras: int, tokens: int, image_size: int) -> dict[str, Any]:
    """Everything that `pi0 inspect` prints, as plain data.

    Raises:
        CheckpointError: the checkpoint does not fit in every tensor.
    """
    config = checkpoint.config.with_image_size(image_size)
    check(checkpoint)
    names = checkpoint.names
    prefix = config.prefix_len(cameras, tokens)
    return {
        "path": str(checkpoint.path),
        "layout": names.layout,
        "layout_explanation": names.explanation,
        "model": next(n for n, adaptive in MODEL_TYPES.items() if adaptive == config.adaptive_norm),
        "tensors": len(checkpoint.tensors),
        "modules": _modules(checkpoint),
        "embedding": _embedding(checkpoint),
        "adapter": _adapter(checkpoint),
        "config": asdict(config),
        "assumed": checkpoint.inferred.assumed,
        "sequence": {
            "cameras": cameras,
            "image_size": image_size,
            "patches_per_camera": config.vision.num_patches,
            "text_tokens": tokens,
            "prefix": prefix,
            "suffix": config.suffix_len,
            "total": prefix + config.suffix_len,
        },
        "memory": _memory(config, cameras, tokens),
    }


def _modules(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    rows = []
    names = checkpoint.names
    groups = {
        module: [theirs for theirs, ours in names.ours.items() if ours.startswith(prefixes)]
        for module, prefixes in MODULES.items()
    } | {
        "not read": names.unread + names.embeddings[1:],
        "statistics": list(names.buffers),
        "unexpected": names.unexpected,
    }
    for module, tensors in groups.items():
        infos = [checkpoint.tensors[name] for name in tensors]
        if infos:
            rows.append(
                {
                    "module": module,
                    "tensors": len(infos),
                    "parameters": sum(info.parameters for info in infos),
                    "bytes": sum(info.bytes for info in infos),
                    "dtypes": sorted({info.dtype for info in infos}),
                }
            )
    return rows


def _adapter(checkpoint: Checkpoint) -> dict[str, Any] | None:
    adapter = checkpoint.adapter
    if adapter is None:
        return None
    return {
        "base": str(adapter.base),
        "ranks": adapter.ranks,
        "merged": sorted(adapter.pairs),
        "replaced": sorted(adapter.replaced),
    }


def _embedding(checkpoint: Checkpoint) -> str:
    """Where the token embedding comes from, and whether its twin, if any, agrees."""
    first, *others = checkpoint.names.embeddings
    if not others:
        return f"read from {first}, its only copy"
    twins = [
        f"{other}, {'which is the same' if _same(checkpoint, first, other) else 'which DIFFERS'}"
        for other in others
    ]
    return f"read from {first}; not from {'; '.join(twins)}"


def _same(checkpoint: Checkpoint, a: str, b: str) -> bool:
    if checkpoint.tensors[a].shape != checkpoint.tensors[b].shape:
        return False
    pairs = zip(stream({a: checkpoint.tensors[a]}), stream({b: checkpoint.tensors[b]}), strict=True)
    return all(torch.equal(x.float(), y.float()) for (_, _, x), (_, _, y) in pairs)


def _memory(config: Pi0Config, cameras: int, tokens: int) -> list[dict[str, Any]]:
    rows = []
    for name, dtype in DTYPES.items():
        need = estimate(config, dtype, cameras, tokens)
        rows.append({"engine": "reference", "dtype": name, **asdict(need), "total": need.total})
    return rows
