"""Arrays of one chunk, read from front to back: the same values, little memory, damage noticed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tensorstore as ts
import torch
from jax_folder import ORACLES, copy_oracle
from torch import Tensor

from pi0.checkpoint import jax, orbax
from pi0.checkpoint.chunk import find_places, find_zstd
from pi0.checkpoint.jax_leaves import expected_shape, leaves
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.orbax import open_folder
from pi0.config import PRESETS
from pi0.errors import CheckpointError

needs_zstd = pytest.mark.skipif(find_zstd() is None, reason="needs: backports.zstd, Python < 3.14")
CASES = ["jax_pi0", "jax_pi05", "jax_pi0_lora"]
SHAPE = (3, 2, 5, 7)

# Prints the growth of the largest memory in use while a checkpoint's tensors are read.
READ = """
import sys, torch, tensorstore
from pi0.checkpoint.jax_leaves import expected_shape, leaves
from pi0.checkpoint.load import open_checkpoint
torch.set_num_threads(1)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10
opened = open_checkpoint(sys.argv[1])
before = peak()
for _ in opened.stream():
    pass
print(peak() - before)
"""


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax, "STREAMED_BYTES", 1)


def write(folder: Path, values: Tensor, codec: str, chunks: tuple[int, ...] | None = None) -> None:
    """One array `a`, in a chunk if `chunks` is None."""
    base = {"driver": "file", "path": f"{folder}/"}
    metadata = {
        "shape": list(values.shape),
        "chunks": list(chunks or values.shape),
        "dtype": "bfloat16" if values.dtype == torch.bfloat16 else "<f4",
        "compressor": {"id": "zstd", "level": 1} if codec == "zstd" else None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "zarr_format": 2,
    }
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": "params.a/"},
        "metadata": metadata,
    }
    array = ts.open(spec, create=True).result()
    array.write(orbax._to_numpy(values, array.dtype)).result()


def places_are_right(folder: Path) -> None:
    places = find_places(ts, folder)
    base = {"driver": "file", "path": f"{folder}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key, place in places.items():
        with open(place.file, "rb") as file:
            file.seek(place.offset)
            assert file.read(place.length) == store.read(key).result().value
    assert {key for key in store.list().result() if len(store[key]) > 2000} <= {
        key.encode() for key in places
    }


@pytest.mark.parametrize("case", CASES)
def test_places_as_orbax_writes_them(case: str) -> None:
    places_are_right(ORACLES / case / "checkpoint" / "params")


def test_places_in_a_tree_of_several_levels(tmp_path: Path) -> None:
    config = {"max_decoded_node_bytes": 400, "max_inline_value_bytes": 10}
    base = {"driver": "file", "path": f"{tmp_path}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "config": config, "base": base}).result()
    with ts.Transaction() as transaction:
        for i in range(60):
            store.with_transaction(transaction)[f"params.abc.{i:03d}/.zarray"] = bytes([i]) * 250
    store["params.abc.007/.zarray"] = b"newer" * 50
    places_are_right(tmp_path)
    assert len(find_places(ts, tmp_path)) == 60


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", ["raw", pytest.param("zstd", marks=needs_zstd)])
def test_parts_in_any_order(codec: str, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(SHAPE).to(dtype)
    write(tmp_path, values, codec)
    with open_folder(tmp_path).open("a") as array:
        assert type(array).__name__ == "ChunkReader"
        for index in ((0, 0), (0, 1), (2, 0), (1,), (), (slice(1, 3),), (2, 1, 4)):
            assert torch.equal(array.read(index), values[index] if index else values)


@pytest.mark.usefixtures("streamed")
def test_other_arrays_are_read_by_tensorstore(tmp_path: Path) -> None:
    values = torch.randn(SHAPE)
    write(tmp_path, values, "zstd", chunks=(2, 2, 5, 7))
    with open_folder(tmp_path).open("a") as array:
        assert type(array).__name__ == "ArrayReader"
        assert torch.equal(array.read((2,)), values[2])


@needs_zstd
@pytest.mark.parametrize("case", CASES)
def test_same_weights(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_oracle(case, tmp_path / "jax")
    expected = load_model(open_checkpoint(folder)).state_dict()
    monkeypatch.setattr(orbax, "STREAMED_BYTES", 1)
    whole: list[int] = []
    read = orbax.ArrayReader.read

    def note(reader: orbax.ArrayReader, index: tuple[int | slice, ...] = ()) -> Tensor:
        whole.append(reader.array.size)
        return read(reader, index)

    monkeypatch.setattr(orbax.ArrayReader, "read", note)
    found = load_model(open_checkpoint(folder)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert max(whole, default=0) < 1024  # values inside the tree


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("codec", ["raw", pytest.param("zstd", marks=needs_zstd)])
@pytest.mark.parametrize("keep", [0, 9, -9])
def test_a_truncated_chunk(codec: str, keep: int, tmp_path: Path) -> None:
    write(tmp_path, torch.randn(SHAPE), codec)
    place = find_places(ts, tmp_path)["params.a/0.0.0.0"]

    def cut_and_read() -> None:
        with open_folder(tmp_path).open("a") as array:
            # Cut once it is open, since the tree's nodes may lie behind it in the file.
            end = place.offset + (keep if keep >= 0 else place.length + keep)
            place.file.write_bytes(place.file.read_bytes()[:end])
            array.read()

    with pytest.raises(CheckpointError, match="a: expected a complete JAX checkpoint, found a"):
        cut_and_read()


@needs_zstd
@pytest.mark.usefixtures("streamed")
def test_a_damaged_chunk(tmp_path: Path) -> None:
    write(tmp_path, torch.randn(SHAPE), "zstd")
    place = find_places(ts, tmp_path)["params.a/0.0.0.0"]
    data = bytearray(place.file.read_bytes())
    data[place.offset : place.offset + 4] = b"none"
    place.file.write_bytes(data)
    with (
        pytest.raises(CheckpointError, match=r"truncated or damaged one \(zstd: "),
        open_folder(tmp_path).open("a") as array,
    ):
        array.read()


@needs_zstd
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """With tensorstore alone it is twice the leaf: compressed and decoded."""
    config = PRESETS["tiny"]
    vlm = replace(config.vlm, depth=4, width=256, mlp_dim=12288)
    config = replace(config, vlm=vlm, expert=replace(config.expert, depth=4))
    sizes = jax._sizes(config)
    shapes = {of: expected_shape(leaf, sizes) for of, leaf in leaves(adaptive_norm=False).items()}
    specs = {of: orbax.ArraySpec(shape, shape, "F32") for of, shape in shapes.items()}
    values = ((of, (), torch.randn(shape)) for of, shape in shapes.items())
    orbax.write_folder(tmp_path / "jax" / "params", specs, values)
    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "jax"], capture_output=True, text=True, check=True
    )
    # Measured 0.4 to 0.6 of the leaf, 0.82 with tensorstore 0.1.78, the last for Python 3.10: two
    # of its four layers, and what the allocator keeps.
    assert int(done.stdout) < 4 * 2 * 256 * 12288 * 4
