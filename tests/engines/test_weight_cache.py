"""Packed weights kept beside the checkpoint: the same bits, or packed anew and said."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pi0 import Pi0Error, Policy, make_engine, open_checkpoint
from pi0.checkpoint.files import CACHE_LINE
from pi0.checkpoint.locate import find_files
from pi0.engines.fast import weight_cache
from pi0.engines.fast.cpu.int8 import Int8Kernels
from pi0.engines.fast.kernels import Kernels
from pi0.engines.fast.weight_cache import load_weights
from pi0.engines.fast.weights import PackedWeights, Scheme
from pi0.engines.registry import BUILT_IN
from pi0.errors import CheckpointError, EngineError
from pi0.inputs import random_inputs

INT8 = Scheme(torch.float32, {".*": torch.int8})
EVERY_KIND = Scheme(
    torch.bfloat16, {"expert.*": torch.float8_e4m3fn, "vlm.*": torch.int8, "projector": torch.float}
)


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to write beside."""
    return Path(shutil.copytree(tiny_path, tmp_path / "tiny"))


@pytest.fixture
def each_folder(each_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, then one of π0.5."""
    return Path(shutil.copytree(each_path, tmp_path / "each"))


def load(folder: Path, scheme: Scheme = INT8, kernels: Kernels | None = None) -> PackedWeights:
    kernels = kernels or Int8Kernels()
    return load_weights(open_checkpoint(folder), scheme, kernels, cache_name="cpu-int8")


def kept(folder: Path) -> Path:
    return folder / "model.cpu-int8-28.pi0"


def refuse_to_pack(*_: object) -> None:
    raise AssertionError("packed anew")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8))
        for name in a
    )


@pytest.mark.parametrize("scheme", [INT8, EVERY_KIND, Scheme(torch.float32)])
def test_second_start_takes_what_the_first_kept(
    each_folder: Path, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(each_folder, scheme)
    read = []
    monkeypatch.setattr(weight_cache, "pack", refuse_to_pack)
    checkpoint = open_checkpoint(each_folder)
    second = load_weights(checkpoint, scheme, Int8Kernels(), None, read.append, "cpu-int8")
    assert same(first.state(), second.state())
    assert second.config == first.config
    assert read == [checkpoint.read_bytes]
    assert find_files(each_folder).files == [each_folder / "model.safetensors"]  # no checkpoint


def test_vectors_start_at_cache_lines(folder: Path) -> None:
    load(folder)
    for name, tensor in load(folder).state().items():
        whole = tensor.nbytes % CACHE_LINE == 0
        assert tensor.data_ptr() % (CACHE_LINE if whole else tensor.itemsize) == 0, name


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.filterwarnings("ignore:engine cpu. slower")
def test_actions_are_the_same_bits(each_folder: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(each_folder)
    inputs, noise = random_inputs(checkpoint.config, 2, 16, 0)
    plain, packing, mapped = (
        make_engine(f"cpu:{dtype}", checkpoint, weight_cache=cache).sample(inputs, noise, 2)
        for cache in (False, True, True)
    )
    assert (each_folder / f"model.cpu-{dtype}-28.pi0").exists()
    assert torch.equal(plain, packing)
    assert torch.equal(plain, mapped)


def test_policy_hands_it_on(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Policy.from_checkpoint(folder, robot="generic", engine="cpu:int8", weight_cache=True)
    assert kept(folder).exists()


class OtherKernels(Int8Kernels):
    """Stands for kernels with another form."""


@pytest.mark.parametrize("change", ["checkpoint", "scheme", "kernels", "version", "engine code"])
def test_anything_changed_packs_anew(
    folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    scheme, kernels = INT8, Int8Kernels()
    if change == "checkpoint":
        os.utime(folder / "model.safetensors", (1, 1))
    elif change == "scheme":
        scheme = Scheme(torch.float32, INT8.dtype_by_pattern, mlp_chunk=64)
    elif change == "kernels":
        kernels = OtherKernels()
    elif change == "version":
        monkeypatch.setattr(weight_cache, "__version__", "0.0.0")
    else:
        source = folder / "weight_cache.py"
        source.write_text("another")
        monkeypatch.setattr(weight_cache, "__file__", str(source))
    with pytest.warns(UserWarning, match=f"found those of another {change}. Packing anew."):
        anew = load(folder, scheme, kernels)
    assert anew.scheme == scheme
    load(folder, scheme, kernels)  # without a warning


def test_layouts_of_pi0_and_pi05_are_told_apart(folder: Path) -> None:
    """By the configuration, even if the files were alike."""
    checkpoint = open_checkpoint(folder)
    configs = (replace(checkpoint.config, adaptive_norm=adaptive) for adaptive in (False, True))
    pi0, pi05 = (
        weight_cache._made_from(checkpoint.files, PackedWeights(config, INT8), Int8Kernels())
        for config in configs
    )
    assert {key for key in pi0 if pi0[key] != pi05[key]} == {"configuration"}


def test_image_sizes_have_files_of_their_own(folder: Path) -> None:
    load(folder)
    weights = load_weights(open_checkpoint(folder), INT8, Int8Kernels(), 42, cache_name="cpu-int8")
    assert weights.config.vision.image_size == 42
    assert (folder / "model.cpu-int8-42.pi0").exists()
    load(folder)  # without a warning


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff" * 1000),
        lambda file: file.write_bytes(file.read_bytes().replace(b'{\\"', b'[\\"', 1)),
    ],
)
def test_damaged_file_is_replaced(folder: Path, damage) -> None:
    weights = load(folder)
    damage(kept(folder))
    with pytest.warns(UserWarning, match="found a damaged file .*Packing anew."):
        assert same(load(folder).state(), weights.state())
    assert same(load(folder).state(), weights.state())


@pytest.mark.parametrize("bits", [1, 255])
@pytest.mark.parametrize("place", [0.001, 0.3, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("piece", [64 << 20, 1000])
def test_damaged_data_are_replaced(
    folder: Path, place: float, bits: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit or byte anywhere in the data; the warning names file and tensor."""
    monkeypatch.setattr(weight_cache, "PIECE_BYTES", piece)
    weights = load(folder)
    data = bytearray(kept(folder).read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int((len(data) - header) * place)] ^= bits
    kept(folder).write_bytes(data)
    with pytest.warns(
        UserWarning,
        match=r"model.cpu-int8-28.pi0: .* found a damaged tensor [\w.:]+. Packing anew.",
    ):
        assert same(load(folder).state(), weights.state())
    load(folder)  # without a warning


def test_overwritten_block_is_replaced(folder: Path) -> None:
    weights = load(folder)
    with open(kept(folder), "r+b") as file:
        file.seek(kept(folder).stat().st_size // 2)
        file.write(os.urandom(4000))
    with pytest.warns(UserWarning, match="found a damaged tensor"):
        assert same(load(folder).state(), weights.state())


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


ODD = [
    "[]",
    "3",
    "null",
    '"x"',
    "NaN",
    "{}",
    "{",
    '{"actions:weight": []}',
    "[" * 100_000,
    "\ud800",
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("entry", [weight_cache.CHECKSUMS, weight_cache.MADE_FROM])
def test_odd_metadata_are_replaced(folder: Path, entry: str, odd: str) -> None:
    weights = load(folder)
    edit_header(kept(folder), lambda header: header["__metadata__"].update({entry: odd}))
    with pytest.warns(UserWarning, match="Packing anew."):
        assert same(load(folder).state(), weights.state())
    load(folder)  # without a warning


@pytest.mark.parametrize("value", [[], 3, None, "x", {}, {"0": []}, {"0": "x"}])
def test_odd_checksums_of_a_tensor_are_replaced(folder: Path, value: object) -> None:
    def edit(header: dict[str, Any]) -> None:
        checksums = json.loads(header["__metadata__"][weight_cache.CHECKSUMS])
        checksums[next(iter(checksums))] = value
        header["__metadata__"][weight_cache.CHECKSUMS] = json.dumps(checksums)

    weights = load(folder)
    edit_header(kept(folder), edit)
    with pytest.warns(UserWarning, match="found a damaged .*Packing anew."):
        assert same(load(folder).state(), weights.state())


def test_a_file_without_one_tensor_is_replaced(folder: Path) -> None:
    weights = load(folder)
    with safe_open(kept(folder), framework="pt") as handle:
        first, *rest = sorted(handle.keys())
        tensors = {name: handle.get_tensor(name).clone() for name in rest}
        metadata = handle.metadata()
    save_file(tensors, kept(folder), metadata)
    with pytest.warns(UserWarning, match=f"found a damaged tensor {first}. Packing anew."):
        assert same(load(folder).state(), weights.state())


def test_any_damaged_byte_of_the_header_is_noticed(folder: Path) -> None:
    """Or it changes nothing that is read."""
    load(folder)
    data = kept(folder).read_bytes()
    checkpoint = open_checkpoint(folder)
    fresh = PackedWeights(checkpoint.config, INT8)
    made_from = weight_cache._made_from(checkpoint.files, fresh, Int8Kernels())
    state = weight_cache._read(kept(folder), made_from)
    rng = random.Random(0)
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(end)] = rng.choice((rng.randrange(256), *b'0[]{}":,'))
        place = folder / "damaged.pi0"
        place.write_bytes(damaged[: rng.choice((len(data), len(data), rng.randrange(end)))])
        with contextlib.suppress(weight_cache.Stale):
            assert same(weight_cache._read(place, made_from), state)


def test_file_without_our_metadata_is_replaced(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", kept(folder))
    with pytest.warns(UserWarning, match="found those of another checkpoint, another config"):
        load(folder)
    with safe_open(kept(folder), framework="pt") as handle:
        assert weight_cache.MADE_FROM in handle.metadata()


def test_full_disk_leaves_nothing(folder: Path) -> None:
    """A size limit stands for a full disk: writing fails half way."""
    import resource

    before = sorted(folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            EngineError,
            match="room for .* kB, found: File too large.*--weight-cache",
        ):
            load(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(folder.iterdir()) == before


def test_nothing_is_written_into_the_package() -> None:
    shipped = find_files("tabletop").folder
    before = sorted(shipped.iterdir())
    with pytest.raises(EngineError, match="found the package's own"):
        make_engine("cpu:int8", open_checkpoint("tabletop"), weight_cache=True)
    assert sorted(shipped.iterdir()) == before


def test_read_only_folder_is_refused_before_packing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with monkeypatch.context() as patch:
        patch.setattr(weight_cache, "pack", refuse_to_pack)
        with pytest.raises(EngineError, match="found one that is read-only"):
            load(folder)
    monkeypatch.undo()
    load(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    load(folder)  # what is there can be read


def test_folder_of_that_name(folder: Path) -> None:
    kept(folder).mkdir()
    with pytest.raises(Pi0Error, match="expected the name of a file to write, found a folder"):
        load(folder)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "cpu"])
def test_others_refuse_before_loading(folder: Path, name: str) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        EngineError, match=f"expected an engine that keeps packed weights, found {name}."
    ):
        make_engine(name, checkpoint, weight_cache=True)


def test_kept_weights_do_not_hide_a_missing_checkpoint(folder: Path) -> None:
    load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found none"):
        load(folder)
