"""Random checkpoints in exactly the real format, for tests, demos and benchmarks.

The values are drawn so that activations keep a sane scale through all layers: matrices from
N(0, 1/fan_in), the last matrix of every residual branch divided by √(2·depth). Every tensor has a
generator of its own, seeded by seed and name, so that its values depend neither on the layout nor
on the order of writing.

Such weights attend to all tokens nearly alike, and move actions by a third of the noise they start
from; so a single token, or an error in what the model moves, hardly counts. `TRAINED_LIKE` weights
have two statistics of trained models: attention is peaked (with logits of standard deviation s a
query attends to exp(−s²) of the tokens it sees, by the inverse of Σp²), and what the model moves
is as large as the noise, as in flow matching with normalised actions, whose velocity is noise less
actions.

Trained models also have outliers: a few channels of their norms are tens of times as large as the
others. On request every hundredth channel of the blocks' norms is; the matrices that read them are
smaller as a whole, so that their results keep their scale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pi0.checkpoint.files import DTYPE_NAMES, TensorInfo, write
from pi0.checkpoint.infer import to_config_json
from pi0.checkpoint.layouts import Layout, their_names
from pi0.checkpoint.lerobot import make_config_json, processor_files, unit_statistics
from pi0.checkpoint.load import empty_model
from pi0.checkpoint.outputs import replacing, require_writable
from pi0.config import PALIGEMMA_VOCABULARY, Pi0Config
from pi0.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORM_STD = 0.1
BIAS_STD = 0.02
RESIDUAL_ENDS = ("out_proj", "fc2", "o_proj", "down_proj")
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")  # of a block's norms
OUTLIERS_EVERY = 100  # channels
UNREAD = "unread"  # our name for the expert's head, which no model has


@dataclass(frozen=True)
class WeightStatistics:
    """What sizes of weights depend on.

    Attributes:
        logits: standard deviation of attention's logits, in the trunks and in the vision tower.
        projection: what the last projection, which makes velocities, is multiplied by.
        outliers: how many times as large as the others every hundredth channel of norms is.
    """

    logits: float
    projection: float
    outliers: float = 1.0


FLAT = WeightStatistics(logits=1.0, projection=1.0)
TRAINED_LIKE = WeightStatistics(logits=2.0, projection=3.0)
STATISTICS = {"trained-like": TRAINED_LIKE, "flat": FLAT}


def synthesise(
    folder: Path,
    config: Pi0Config,
    layout: Layout,
    seed: int,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda _: None,
    statistics: WeightStatistics = FLAT,
) -> None:
    """Writes model.safetensors, config.json and assets/synthetic/norm_stats.json; in LeRobot's
    layout also its processors and their statistics.

    Args:
        folder: made if need be; its other files stay.
        progress: called with the number of parameters drawn since the last call.
        statistics: how large weights are.

    Raises:
        CheckpointError: the folder holds a model already.
        Pi0Error: the folder cannot be written, or has too little room.
    """
    path = folder / "model.safetensors"
    _refuse_models(folder)
    sources = tensor_list(config, layout)
    headers = {
        theirs: TensorInfo(path, shape, DTYPE_NAMES[dtype])
        for theirs, (_, shape) in sources.items()
    }
    require_writable(path, size=sum(info.bytes for info in headers.values()))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for theirs, (ours, shape) in sources.items():
            yield theirs, random_tensor(ours, shape, config, seed, statistics).to(dtype)
            progress(headers[theirs].parameters)

    settings = make_config_json(config) if layout.name == "lerobot" else to_config_json(config)
    if config.adaptive_norm and layout.name != "lerobot":  # where a processor step says it
        settings["discrete_state_input"] = True
    with contextlib.ExitStack() as files:  # all take their places together, or none does

        def beside(*names: str) -> Path:
            return files.enter_context(replacing(folder.joinpath(*names)))

        _write_json(beside("config.json"), settings)
        if layout.name == "lerobot":
            for name, content in processor_files(settings, unit_statistics(settings)).items():
                beside(name).write_bytes(content)
        else:
            _write_json(beside("assets", "synthetic", "norm_stats.json"), _unit_statistics(config))
        if config.vocab_size < PALIGEMMA_VOCABULARY:
            byte_tokenizer().save(str(beside("tokenizer.json")))
        write(path, tensors(), headers)


def tensor_list(config: Pi0Config, layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a checkpoint as a layout stores it: their name → (our name, shape)."""
    sources: dict[str, tuple[str, tuple[int, ...]]] = {}
    for ours, value in empty_model(config, torch.float32).state_dict().items():
        for theirs in their_names(layout, ours):
            sources[theirs] = (ours, tuple(value.shape))
    for name in layout.unread:
        sources[layout.root + name] = (UNREAD, (config.vocab_size, config.expert.width))
    return sources


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with PaliGemma's special pieces and one piece a byte, for small vocabularies."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))


def random_tensor(
    name: str,
    shape: tuple[int, ...],
    config: Pi0Config,
    seed: int,
    statistics: WeightStatistics = FLAT,
) -> Tensor:
    """The float32 values of one of our tensors."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    module, _, kind = name.rpartition(".")
    vision_norm = name.startswith("vision_tower") and "norm" in module
    mean = 1.0 if vision_norm and kind == "weight" else 0.0
    conditioned = module.endswith(".dense")  # the linear layer of an adaptive norm
    if "norm" in module and kind == "weight" and not conditioned:
        std = NORM_STD
    elif kind in ("bias", "position"):
        std = BIAS_STD
    else:
        std = math.prod(shape[1:]) ** -0.5
        if module.endswith(("q_proj", "k_proj")):
            std *= statistics.logits**0.5
        elif module == "action_out_proj":
            std *= statistics.projection
    if module.endswith(RESIDUAL_ENDS):
        depth = config.vision.depth if name.startswith("vision_tower") else config.vlm.depth
        std *= (2 * depth) ** -0.5
    values = torch.empty(shape).normal_(mean, std, generator=generator)
    if conditioned and kind == "bias":
        values.chunk(3)[2].add_(1)  # gates near 1, as branches have without them
    factor = statistics.outliers
    return values if factor == 1 else _with_outliers(name, values, factor)


def _with_outliers(name: str, values: Tensor, factor: float) -> Tensor:
    """A norm's channels, some `factor` times as large, or the columns that read them."""
    if ".blocks." not in name:
        return values
    block, kind = name.split(".blocks.")[1].split(".")[1], name.rpartition(".")[2]
    vision, conditioned = name.startswith("vision_tower"), ".dense." in name
    if block in READERS and kind == "weight":
        sizes = torch.ones(values.shape[1])
        sizes[::OUTLIERS_EVERY] = factor
        return values / sizes.square().mean().sqrt()
    if "norm" in block and not (vision and kind == "bias"):
        # Of a conditioned norm only the scale, which comes first; all but SigLIP's are 1 + this.
        scale = values.chunk(3)[0] if conditioned else values
        scale[::OUTLIERS_EVERY] *= factor
        if not vision and not (conditioned and kind == "weight"):
            scale[::OUTLIERS_EVERY] += factor - 1
    return values


def _unit_statistics(config: Pi0Config) -> dict[str, Any]:
    """Statistics that leave values as they are, in openpi's form."""

    def unit(width: int) -> dict[str, list[float]]:
        values = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
        return {name: [value] * width for name, value in values.items()}

    return {"norm_stats": {"state": unit(config.state_dim), "actions": unit(config.action_dim)}}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _refuse_models(folder: Path) -> None:
    present = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.index.json"))
    if present:
        raise CheckpointError(
            f"{present[0]}: expected a folder without a model, found one. Name another folder or "
            "remove the file."
        )
