"""From a checkpoint on disk to a model in memory: strictly, or not at all.

`open_checkpoint` reads headers only and understands them; `load_model` goes on to check every
tensor and streams the values into a model. A checkpoint that does not fit in every name, shape and
dtype is one error that lists what is wrong.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0.checkpoint.buffers import read_buffers
from pi0.checkpoint.files import (
    TORCH_DTYPES,
    TensorInfo,
    read_headers,
    read_json,
    require_finite,
    stream,
)
from pi0.checkpoint.infer import (
    Inferred,
    MissingTensorError,
    declared_lora,
    infer_config,
    read_types,
    stated_steps,
    unfit_flow,
)
from pi0.checkpoint.jax import JaxParams, open_params
from pi0.checkpoint.layouts import LAYOUTS, UNMERGED, NameMap, map_names, their_names
from pi0.checkpoint.locate import PARAMS, find_files, has_adapter
from pi0.checkpoint.lora import Adapter, open_adapter
from pi0.checkpoint.memory import require_memory
from pi0.checkpoint.orbax import MANIFEST
from pi0.config import Pi0Config
from pi0.errors import CheckpointError, ConfigError, Pi0Error
from pi0.findings import Finding, warning
from pi0.model import Pi0
from pi0.model.precision import set_dtype

POSITION = "vision_tower.patch_embedding.position"
LISTED = 20
CONFIG = "config.json"
ASSUMPTIONS = {
    "horizon": "how long a chunk of actions is; {value} is assumed, but fine-tunes with 10, 15 and "
    "16 exist. Name it with --horizon N.",
    "max_tokens": "how many tokens a prompt may have; {value} is assumed, as in openpi and "
    "LeRobot. Name it with --max-tokens N.",
}

Progress = Callable[[int], None]  # called with the bytes read since the last call


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were read and understood.

    Attributes:
        path: a folder or a file: what was asked for, or `pretrained_model` in it.
        tensors: every tensor of its files, by their names; with an adapter, those of the base, but
            for the ones that the adapter replaces.
        names: whose layout it is and which tensor is which.
        inferred: the configuration.
        settings: the content of config.json; empty if there is none.
        adapter: the LoRA adapter at `path`, merged into its base as the weights are read.
        params: the JAX parameters that the tensors are parts of; None: they lie in safetensors.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    names: NameMap
    inferred: Inferred
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None
    params: JaxParams | None = None

    @property
    def config(self) -> Pi0Config:
        return self.inferred.config

    @property
    def steps(self) -> int:
        """The denoising steps that config.json states, else 10."""
        return stated_steps(self.settings)

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def base(self) -> Path | None:
        """The full model that the adapter changes; None: there is no adapter."""
        return self.adapter.base if self.adapter else None

    def folder_of(self, *patterns: str) -> Path:
        """The folder whose files count: the adapter's if it has one that matches, else its base's
        if that has, else `folder`."""
        base = [self.base if self.base.is_dir() else self.base.parent] if self.base else []
        folders = [self.folder, *base]
        return next((f for f in folders if any(any(f.glob(p)) for p in patterns)), self.folder)

    @property
    def files(self) -> list[Path]:
        """Every file that the weights depend on, an adapter's first."""
        weights = dict.fromkeys(info.file for info in self.tensors.values())
        files = [*(self.adapter.files if self.adapter else ()), *weights]
        if self.params and self.params.lora and (self.folder / CONFIG).exists():
            files.append(self.folder / CONFIG)  # it may state LoRA's alpha
        return list(dict.fromkeys(files))

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which `stream` yields a tensor, by our names: bfloat16 where it is stored
        so, else float32."""
        merged = self.adapter.pairs if self.adapter else {}
        return {
            ours: torch.bfloat16
            if self.tensors[theirs].dtype == "BF16" and ours not in merged
            else torch.float32
            for theirs, ours in self.names.ours.items()
        }

    @property
    def read_bytes(self) -> int:
        """Bytes of the tensors that the model reads, as `stream` yields them."""
        dtypes = self.dtypes
        return sum(
            self.tensors[theirs].parameters * dtypes[ours].itemsize
            for theirs, ours in self.names.ours.items()
        )

    def stream(
        self, names: Container[str] | None = None, check_finite: bool = True
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """Yields (our name, rows, values) of every tensor that the model reads, in slabs of rows.

        The values are as they are stored, or float32 where they are in float16 or an adapter is
        merged into them; they may be a view of the file: copy them before asking for the next slab.

        Args:
            names: ours, of the tensors to be read; None: all.

        Raises:
            CheckpointError: a tensor holds NaN or infinite values, unless `check_finite` is False.
        """
        wanted = {
            theirs: self.tensors[theirs]
            for theirs, ours in self.names.ours.items()
            if names is None or ours in names
        }
        read = {self.names.ours[theirs] for theirs in wanted}
        added = self.adapter.read(read) if self.adapter else {}
        for theirs, rows, values in self._read(wanted, check_finite):
            ours = self.names.ours[theirs]
            if values.dtype == torch.float16:  # which nothing here computes in
                values = values.float()
            if ours in added:
                values = added[ours].add_to(rows, values)
                if check_finite:
                    require_finite(self.path, ours, values)
            yield ours, rows, values

    def _read(
        self, wanted: Mapping[str, TensorInfo], check_finite: bool
    ) -> Iterator[tuple[str, slice, Tensor]]:
        if self.params:
            yield from self.params.stream(wanted, check_finite)
            manifest = self.params.source.manifest
            wanted = {name: info for name, info in wanted.items() if info.file != manifest}
        yield from stream(wanted, check_finite)

    @property
    def findings(self) -> list[Finding]:
        """What is assumed about this checkpoint, and what lies beside it and is not read."""
        found = list(self.params.findings) if self.params else []
        for name in self.inferred.assumed:
            what = ASSUMPTIONS[name].format(value=getattr(self.config, name))
            sentence = f"{name}: neither the tensors nor config.json say {what}"
            found.append(warning(f"{name.replace('_', '-')}-assumed", sentence))
        if self.params is None and (self.folder / PARAMS / MANIFEST).is_file():
            found.append(
                warning(
                    "params-ignored",
                    f"{self.folder}: JAX parameters lie beside the safetensors files and are not "
                    f"read. If they are meant, name them: {self.folder / PARAMS}.",
                )
            )
        if self.adapter is None and has_adapter(self.folder):
            found.append(
                warning(
                    "adapter-ignored",
                    f"{self.folder}: a PEFT adapter lies beside the full model and is not read. "
                    f"If the model lacks it, name the model as its base: --base {self.folder}.",
                )
            )
        field, merged = declared_lora(self.settings), self.params and self.params.lora
        if field and self.adapter is None and not merged:
            found.append(
                warning(
                    "lora-lost",
                    f"{self.folder}: expected LoRA among the weights, as config.json {field} says, "
                    "found none. openpi's converter to PyTorch drops it: unless it was merged, "
                    "convert the JAX folder with pi0 convert.",
                )
            )
        return found

    @property
    def statistics_buffers(self) -> dict[str, Tensor]:
        """Statistics that older LeRobot files hold among the weights, float64, by names such as
        "observation.state.mean" and "action.std"; read at each call, empty if there are none.

        Raises:
            CheckpointError: they were never filled, or contradict each other.
        """
        return read_buffers(self.tensors, self.names.buffers)


def open_checkpoint(
    path: Path | str,
    horizon: int | None = None,
    max_tokens: int | None = None,
    base: Path | str | None = None,
) -> Checkpoint:
    """Reads the headers of a checkpoint: a folder, a .safetensors file, a shard index, a folder of
    openpi's JAX parameters, or one of a PEFT adapter.

    Args:
        path: `~` is the home directory.
        horizon, max_tokens: of a checkpoint that does not declare them; None: as declared, else
            assumed, which `Checkpoint.findings` says.
        base: the full model of an adapter; None: the one that adapter_config.json names, beside it.

    Raises:
        CheckpointError: no such files, a damaged file, names of no known layout, an adapter that
            does not fit its base.
        ConfigError: config.json contradicts the tensors or the arguments.
    """
    adapter = open_adapter(path, base)
    sources = find_files(adapter.base if adapter else path)
    config_json = sources.folder / CONFIG
    if adapter and os.path.lexists(adapter.folder / CONFIG):
        config_json = adapter.folder / CONFIG
    settings = read_json(config_json) if os.path.lexists(config_json) else {}
    with _naming(config_json.parent):
        read_types(settings)  # of another model the tensors need no explanation
    with _naming(sources.path):
        params = open_params(sources.params, settings) if sources.params else None
        tensors = params.tensors if params else read_headers(sources.files, sources.shards)
        names = params.names if params else map_names(tensors)
    if adapter:
        tensors, names = adapter.apply(tensors, names)
    shapes = {ours: tensors[theirs].shape for theirs, ours in names.ours.items()}
    stated = {"horizon": horizon, "max_tokens": max_tokens}
    try:
        with _naming(config_json.parent):
            inferred = infer_config(shapes, settings, stated, params.heads if params else {})
    except MissingTensorError as error:
        layout = LAYOUTS.get(names.layout, LAYOUTS["openpi"])
        raise CheckpointError(
            f"{sources.path}: expected {' or '.join(their_names(layout, error.name))}, from which "
            "the configuration is read, found it missing. The file is incomplete: copy or "
            "download it again."
        ) from error
    where = adapter.folder if adapter else sources.path
    return Checkpoint(where, tensors, names, inferred, settings, adapter, params)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds to an error which checkpoint it is about, since a command may read several."""
    try:
        yield
    except Pi0Error as error:
        if not str(error).startswith(str(path.parent if path.is_file() else path)):
            error.args = (f"{path}: {error}",)
        raise


def empty_model(config: Pi0Config, dtype: torch.dtype) -> Pi0:
    """A model without memory (on torch's meta device), its parameters in the dtypes they get."""
    with torch.device("meta"):
        model = Pi0(config)
    set_dtype(model, dtype)
    return model.requires_grad_(False).eval()


def check(checkpoint: Checkpoint) -> None:
    """Compares every tensor with what the model needs.

    Raises:
        CheckpointError: lists what is missing, unexpected, misshapen or of a wrong dtype.
    """
    expected = {
        name: tuple(value.shape)
        for name, value in empty_model(checkpoint.config, torch.float32).state_dict().items()
    }
    names = checkpoint.names
    layout = LAYOUTS.get(names.layout, LAYOUTS["openpi"])
    present = set(names.ours.values())
    problems = [
        f"missing: {' or '.join(their_names(layout, ours))} {list(shape)}"
        for ours, shape in expected.items()
        if ours not in present
    ]
    for theirs, ours in names.ours.items():
        info = checkpoint.tensors[theirs]
        if ours not in expected:
            problems.append(f"unexpected: {theirs} {list(info.shape)}")
        elif info.shape != expected[ours]:
            problems.append(
                f"shape: {theirs}: expected {list(expected[ours])}, found {list(info.shape)}"
            )
        elif info.dtype not in TORCH_DTYPES:
            problems.append(f"dtype: {theirs}: expected BF16, F32 or F16, found {info.dtype}")
    problems += [
        f"unexpected: {name} {list(checkpoint.tensors[name].shape)}" for name in names.unexpected
    ]
    if problems:
        more = [f"... and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        if any("lora_" in name for name in names.unexpected):
            more.append(UNMERGED)
        model = "π0.5" if checkpoint.config.adaptive_norm else "π0"
        raise CheckpointError(
            f"{checkpoint.path}: expected the {len(expected)} tensors of this {model} in layout "
            f"{names.layout}, found {len(problems)} that do not fit:\n  "
            + "\n  ".join(problems[:LISTED] + more)
        )


def require_flow(checkpoint: Checkpoint) -> None:
    """Raises ConfigError if config.json asks for another way of sampling than the model's, of which
    tensors say nothing."""
    for sentence in unfit_flow(checkpoint.settings):
        raise ConfigError(f"{checkpoint.path}: {sentence}")


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    progress: Progress = lambda _: None,
) -> Pi0:
    """A model with the checkpoint's weights.

    Args:
        dtype: of the trunks, torch.float32 or torch.bfloat16.
        image_size: pixels; if it is not the checkpoint's, position embeddings are interpolated.
        progress: called with the number of bytes read.

    Raises:
        CheckpointError: the checkpoint does not fit in every tensor, or holds NaN or infinities.
        ConfigError: an image size that cannot be, or too little memory.
    """
    check(checkpoint)
    config = checkpoint.config
    native = config.vision.grid
    if image_size is not None:
        config = config.with_image_size(image_size)
    model = empty_model(config, dtype)
    if torch.device(device).type == "cpu":
        size = sum(parameter.nbytes for parameter in model.parameters())
        require_memory(size, f"the weights in {str(dtype).removeprefix('torch.')}")
    model = model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for ours, rows, values in checkpoint.stream():
        if ours == POSITION and config.vision.grid != native:
            # One slab: even So400m's table is far smaller.
            parameters[ours].copy_(resize_positions(values, config.vision.grid))
        else:
            parameters[ours][rows].copy_(values)
        progress(values.nbytes)
    return model


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A position embedding [P, E] for another square grid, [grid², E] float32.

    Bicubic, align_corners=False, no antialiasing: the interpolation that transformers applies to
    SigLIP. Done once, when a checkpoint is loaded.
    """
    old = round(table.shape[0] ** 0.5)
    if old == grid:
        return table.float()
    square = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(grid * grid, -1)
