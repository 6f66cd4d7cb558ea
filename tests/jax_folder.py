"""JAX checkpoints to do as one likes with: made from random weights, or from what openpi wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tensorstore as ts
import torch

from pi0.checkpoint.jax import write_params
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS, GemmaConfig, Pi0Config, SiglipConfig

ORACLES = Path(__file__).parent / "oracles"
PREFIX = "params.PaliGemma.llm.layers."


def odd_config(adaptive_norm: bool) -> Pi0Config:
    """Sizes that differ from each other: no width is heads × head_dim, several key-value heads."""
    heads = {"depth": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 10}
    return replace(
        PRESETS["pi05_tiny" if adaptive_norm else "tiny"],
        vision=SiglipConfig(
            width=30, depth=2, mlp_dim=44, num_heads=5, patch_size=7, image_size=21
        ),
        vlm=GemmaConfig(width=52, mlp_dim=72, **heads),
        expert=GemmaConfig(width=36, mlp_dim=40, **heads),
        vocab_size=300,
        action_dim=24,
        state_dim=24 if adaptive_norm else 20,
    )


def synthesise_jax(folder: Path, config: Pi0Config, dtype: torch.dtype) -> Path:
    """A JAX checkpoint with the weights that `synthesise` gives to seed 0; returns the same in
    openpi's PyTorch layout."""
    same = folder.with_name(folder.name + "-pytorch")
    synthesise(same, config, LAYOUTS["openpi"], 0, dtype)
    checkpoint = open_checkpoint(same)
    dtypes = dict.fromkeys(checkpoint.names.ours.values(), dtype)
    write_params(folder / "params", config, dtypes, checkpoint.stream())
    shutil.copy(same / "config.json", folder)
    return same


def copy_oracle(case: str, folder: Path) -> Path:
    """A copy of an oracle's checkpoint with its config.json inside."""
    shutil.copytree(ORACLES / case / "checkpoint", folder)
    shutil.copy(ORACLES / case / "config.json", folder)
    return folder


def edit(folder: Path, change: Callable[[ts.KvStore], object]) -> None:
    """Changes the database of a checkpoint."""
    base = {"driver": "file", "path": f"{folder / 'params'}/"}
    change(ts.KvStore.open({"driver": "ocdbt", "base": base}).result())


def remove(store: ts.KvStore, prefix: str) -> None:
    keys = [key for key in store.list().result() if key.decode().startswith(prefix)]
    assert keys, prefix
    for key in keys:
        store.write(key, None).result()


def put(folder: Path, key: str, values: torch.Tensor) -> None:
    """Writes an array under a key, in place of what is there."""
    base = {"driver": "file", "path": f"{folder / 'params'}/"}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"},
    }
    array = values.numpy()
    store = ts.open(
        spec, create=True, delete_existing=True, dtype=array.dtype, shape=list(array.shape)
    ).result()
    store.write(array).result()
