"""Which files make up a checkpoint, and what to say of a path that is something else.

People have folders of training runs, hub ids, addresses of buckets, adapters and pickles: each gets
its own hint. Reads names only, and shard indexes.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pi0.checkpoint.files import read_json
from pi0.checkpoint.outputs import expand_user
from pi0.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, "adapter_model.bin")
PRETRAINED = "pretrained_model"  # the folder inside each checkpoint of a LeRobot training run
PARAMS = "params"  # the folder with the weights in a JAX checkpoint of openpi
JAX_FILES = ("_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA")
# Any of them shows that a folder holds a checkpoint.
CHECKPOINT_FILES = (
    WEIGHTS, INDEX, f"{PRETRAINED}/{WEIGHTS}", f"{PRETRAINED}/{INDEX}",
    ADAPTER_WEIGHTS, f"{PRETRAINED}/{ADAPTER_WEIGHTS}",
    *(f"{PARAMS}/{name}" for name in JAX_FILES),
)  # fmt: skip
# Safetensors files that are no weights: adapters, and what a LeRobot run needs to go on.
NO_WEIGHTS = (*ADAPTER_FILES, "optimizer_state.safetensors", "rng_state.safetensors")
MOST_FOLDERS = 1000  # that are looked into for something to name
SHIPPED = Path(__file__).parents[1] / "shipped"
SHIPPED_POLICIES = ("tabletop",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ARCHIVES = (".tar", ".tgz", ".gz", ".zst", ".xz", ".bz2", ".zip", ".7z")
TOKENIZER = (
    "The tokenizer is a file of its own: paligemma_tokenizer.model from gs://big_vision, or "
    "google/paligemma-3b-pt-224 on the hub, where Gemma's licence has to be accepted."
)
ADAPTER = "found a PEFT adapter. Name the full model that it changes."
EXPECTED = "expected a checkpoint folder or a .safetensors file"
ADDRESS = re.compile(r"(gs|s3|hf|https?):/+(.+)")  # a Path has only one slash there
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Sources:
    """The files of a checkpoint.

    Attributes:
        path: what was asked for, or the folder inside it that holds the checkpoint.
        files: its safetensors files.
        shards: tensor → file, as a shard index lists them; None: there is no index.
        params: the folder of JAX parameters in place of such files.
    """

    path: Path
    files: list[Path]
    shards: dict[str, Path] | None = None
    params: Path | None = None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def find_files(path: Path | str) -> Sources:
    """The weights of a checkpoint: a file, a folder, a shard index, or the name of a policy that
    comes with the package.

    In a folder: model.safetensors; else the shards of model.safetensors.index.json; else every
    other *.safetensors but the statistics of a LeRobot processor and adapters; else JAX parameters,
    in its folder `params` or in itself; else what the folder `pretrained_model` in it holds.

    Raises:
        CheckpointError: nothing there, a shard is missing, or it is no checkpoint that is read.
    """
    path = _shipped(expand_user(path))
    if address := ADDRESS.fullmatch(str(path)):
        raise CheckpointError(f"{address[1]}://{address[2]}: {_download(*address.groups())}")
    try:
        return _find(path)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{error.filename or path}: expected files that can be read, found: {reason}."
        ) from error


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return any((folder / name).exists() for name in ADAPTER_FILES)


def find_adapter(path: Path | str, named: bool) -> Path | None:
    """The folder of the PEFT adapter that a path means; None: it means something else.

    Args:
        named: its base is named; else an adapter beside a full model is not meant.

    Raises:
        CheckpointError: a file of the adapter is missing, or is one that is not read.
    """
    path = expand_user(path)
    place = path.parent if path.name in ADAPTER_FILES else path
    try:
        for folder in (place, place / PRETRAINED):
            if has_adapter(folder) and (named or not _has_weights(folder)):
                _require_adapter(folder)
                return folder
    except OSError:
        return None  # `find_files` says why
    return None


def find_base(folder: Path, declared: object, named: Path | str | None) -> Path:
    """The full model of an adapter.

    Args:
        folder: the adapter's.
        declared: base_model_name_or_path in adapter_config.json: a folder as it was called where
            the adapter was trained, or a hub id.
        named: by the caller, in place of that.

    Raises:
        CheckpointError: there is none.
    """
    if named is not None:
        return find_files(named).path
    remedy = "Name it with --base DIR."
    if not isinstance(declared, str) or not declared:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: expected base_model_name_or_path, the model that the "
            f"adapter changes, found none. {remedy}"
        )
    above = folder.absolute().parent
    base = Path(declared)
    # Last from where the command runs, where peft and LeRobot look for it.
    for place in (folder / base, above / base, above / base.name, Path.cwd() / base):
        # Another step of the same adapter may have the name of the base's.
        if place.exists() and (_has_weights(place) or not has_adapter(place)):
            return find_files(place).path
    cached = next(_cached(declared), None) if HUB_ID.fullmatch(declared) else None
    raise CheckpointError(
        f"{folder}: expected its base model {declared} beside it, found none. "
        + (f"The hub's cache has it: --base {cached}." if cached else remedy)
    )


def _shipped(path: Path) -> Path:
    """Where a policy of that name lies in the package, unless something here has that name."""
    inside = SHIPPED / path.name
    is_name = path.name in SHIPPED_POLICIES and str(path) == path.name
    return inside if is_name and not os.path.lexists(path) else path


def _has_weights(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (WEIGHTS, INDEX)) or bool(_loose(folder))


def _loose(folder: Path) -> list[Path]:
    """Safetensors files of a folder that may be weights, whatever they are called."""
    return sorted(
        file
        for file in folder.glob("*.safetensors")
        # macOS puts ._NAME beside a file that it packs.
        if not file.name.startswith(("policy_", ".")) and file.name not in NO_WEIGHTS
    )


def _require_adapter(folder: Path) -> None:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            pickle = folder / ADAPTER_FILES[2]
            found = _pickle(pickle) if pickle.is_file() else "found it missing. Copy both files."
            raise CheckpointError(f"{folder}: expected {name} of a PEFT adapter, {found}")


def _find(path: Path) -> Sources:
    if not path.exists():
        raise CheckpointError(f"{path}: {_nothing_there(path)}")
    if not path.is_dir():
        return _single(path)
    for file in (path / WEIGHTS, path / INDEX):
        if file.is_dir():
            raise CheckpointError(f"{file}: expected a file, found a folder.")
        if file.exists():
            return _shards(path, file) if file.name == INDEX else Sources(path, [file])
        if file.is_symlink():
            raise CheckpointError(
                f"{file}: expected weights, found a link to a file that is not there. Download or "
                "copy the file that it names."
            )
    if files := _loose(path):
        _require_all_shards(path, files)
        return Sources(path, files)
    if (path / PARAMS).is_dir():
        return Sources(path, [], params=path / PARAMS)
    if any((path / name).exists() for name in JAX_FILES):
        whole = path if path.name == PARAMS else path.resolve()  # `.` or a link
        return Sources(whole.parent if whole.name == PARAMS else path, [], params=path)
    if (path / PRETRAINED).is_dir():
        return _find(path / PRETRAINED)
    raise CheckpointError(
        f"{path}: expected {WEIGHTS}, a shard index or another .safetensors file, "
        f"{_other_contents(path)}"
    )


def _single(path: Path) -> Sources:
    if path.name.endswith(".index.json"):
        return _shards(path, path)
    if path.suffix == ".json":
        raise CheckpointError(
            f"{path}: {EXPECTED}, found a JSON file. Name the folder that it lies in: "
            f"{path.parent}."
        )
    if path.name in ADAPTER_FILES:
        raise CheckpointError(f"{path}: {EXPECTED}, {ADAPTER}")
    if path.name in JAX_FILES:
        raise CheckpointError(
            f"{path}: {EXPECTED}, found a part of a JAX checkpoint. Name its folder: {path.parent}."
        )
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: {EXPECTED}, {_pickle(path)}")
    if path.suffix in ARCHIVES:
        raise CheckpointError(f"{path}: {EXPECTED}, {_archive(path)}")
    if (shard := SHARD.fullmatch(path.name)) and int(shard["count"]) > 1:
        raise CheckpointError(
            f"{path}: {EXPECTED}, found one of {int(shard['count'])} shards. Name the folder that "
            f"it lies in: {path.parent}."
        )
    return Sources(path, [path])


def _require_all_shards(folder: Path, files: list[Path]) -> None:
    """Raises CheckpointError if the names of shards without an index say that one is missing."""
    for shard in filter(None, (SHARD.fullmatch(file.name) for file in files)):
        count = int(shard["count"])
        names = [f"{shard['stem']}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder}: expected {count} shards as {shard[0]} says, found no "
                f"{', '.join(missing)}. Copy or download the rest, and {INDEX}."
            )


def _shards(path: Path, index: Path) -> Sources:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object `weight_map` of tensors, found none.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(
                f"{index}: expected the names of files beside it, found {name!r}. Copy the shards "
                "into its folder and write their names into it."
            )
    shards = {tensor: index.parent / name for tensor, name in weight_map.items()}
    files = sorted(set(shards.values()))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: expected {len(files)} shards as {index.name} lists them, found no "
            f"{', '.join(missing)}. Copy or download the rest."
        )
    return Sources(path, files, shards)


def _download(scheme: str, rest: str) -> str:
    """What to do with an address."""
    local = Path(rest).name
    hub = re.match(r"huggingface\.co/([\w.-]+/[\w.-]+)", rest)
    if scheme == "hf" or hub:
        return f"{EXPECTED}, found an address. {_hub_download(hub[1] if hub else rest)}"
    command = {
        "gs": f"gsutil -m cp -r gs://{rest} .",
        "s3": f"aws s3 cp --recursive s3://{rest} {local}",
    }.get(scheme)
    how = f": {command} (then name the folder {local})" if command else ""
    return f"{EXPECTED} on this machine, found an address. Download it first{how}."


def _hub_download(repository: str) -> str:
    folder = Path(repository).name
    return (
        f"Download it first: hf download {repository} --local-dir {folder} (older: "
        f"huggingface-cli download), then name the folder {folder}."
    )


def _nothing_there(path: Path) -> str:
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            which = "a link" if link == path else f"that {link} is a link"
            return f"{EXPECTED}, found {which} to {os.readlink(link)}, which is not there."
    found = f"{EXPECTED}, found nothing there."
    if str(path) == path.name and not path.suffix:  # a bare name, as in the examples of the docs
        return (
            f"{found} docs/checkpoints.md says where checkpoints come from; pi0 synth {path} "
            "writes a random one there."
        )
    if not HUB_ID.fullmatch(str(path)) or path.parent.exists() or path.suffix == ".safetensors":
        return found
    cached = next(_cached(str(path)), None)
    how = (
        f"The hub's cache has it: name {cached}."
        if cached
        else f"Is it a model of the Hugging Face hub? {_hub_download(str(path))}"
    )
    return (
        f"{EXPECTED}, found nothing there, and no folder {path.parent} either. {how} openpi's own "
        f"are in a bucket: gsutil -m cp -r gs://openpi-assets/checkpoints/pi0_base . {TOKENIZER}"
    )


def _cached(repository: str) -> Iterator[Path]:
    """Snapshots of a hub repository in the local cache that hold weights."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = expand_user(os.environ.get("HF_HUB_CACHE", f"{home}/hub"))
    for snapshot in sorted(hub.glob(f"models--{repository.replace('/', '--')}/snapshots/*")):
        if any((snapshot / name).exists() for name in (WEIGHTS, INDEX)):
            yield snapshot


def _other_contents(path: Path) -> str:
    """What a folder without weights holds instead, and what to do."""
    names = sorted(entry.name for entry in path.iterdir())
    if has_adapter(path):
        return ADAPTER
    inner = sorted(_checkpoints_in(path), key=_by_number)
    if inner:
        return f"found none, but {len(inner)} in folders below. Name one, such as {inner[-1]}."
    for kind, hint in ((PICKLES, _pickle), (ARCHIVES, _archive)):
        for name in names:
            if Path(name).suffix in kind:
                return hint(path / name)
    above = next((f for f in path.absolute().parents[:2] if _is_checkpoint(f)), None)
    if above:
        return f"found none. Name the checkpoint that it is a part of: {above}."
    return "found none." if names else "found none: the folder is empty."


def _is_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in CHECKPOINT_FILES)


def _checkpoints_in(folder: Path) -> Iterator[Path]:
    """Folders below that are worth naming: steps of training runs, snapshots of the hub; the
    nearest first, in as many folders as can be looked into at once."""
    waiting, known = deque([folder]), {folder.resolve()}
    while waiting and len(known) < MOST_FOLDERS:
        for inner in sorted(waiting.popleft().iterdir()):
            if not (inner.is_dir() and os.access(inner, os.R_OK | os.X_OK)):
                continue
            if _is_checkpoint(inner):
                yield inner
            elif inner.resolve() not in known:  # a link may lead back
                known.add(inner.resolve())
                waiting.append(inner)


def _by_number(path: Path) -> tuple[tuple[int, str], ...]:
    """A key that sorts step 10000 after step 5000."""
    parts = re.split(r"(\d+)", str(path))
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


def _archive(path: Path) -> str:
    return f"found the archive {path.name}. Unpack it, and name the folder that was packed."


def _pickle(path: Path) -> str:
    target = ADAPTER_WEIGHTS if path.name in ADAPTER_FILES else WEIGHTS
    return (
        f"found {path.name}. Pickled weights are not read, since they can run code: save them as "
        f"safetensors first, with safetensors.torch.save_file(torch.load({path.name!r}, "
        f"map_location='cpu', weights_only=True), {target!r})."
    )
