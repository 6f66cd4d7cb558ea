"""Dry runs on the real library's mock device: each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from descriptors import Descriptor, read_descriptors

from pi0.engines.tenstorrent.stub_compiler import has_compiler, make_root
from pi0.engines.tenstorrent.ttnn_import import MOCK, SFPI, package_folder

pytestmark = [
    pytest.mark.ttnn,
    pytest.mark.skipif(
        not has_compiler(), reason="no riscv64-unknown-elf-gcc: apt install gcc-riscv64-unknown-elf"
    ),
]


def pi0(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pi0", *map(str, words)],
        capture_output=True,
        text=True,
        env={**clean_environment(), **environment},
    )


def clean_environment() -> dict[str, str]:
    """Without the board that a test in this process may have chosen."""
    return {name: value for name, value in os.environ.items() if name != MOCK}


@pytest.mark.parametrize(
    ("board", "grid", "dtype"),
    [
        ("n150", [8, 8], "accurate"),
        ("n300", [8, 7], "fast"),
        ("n300-8x8", [8, 8], "fast"),
        ("p150", [11, 10], "fast"),
        ("p150-13x10", [13, 10], "fast"),
    ],
)
def test_tiny(either_path: Path, board: str, grid: list[int], dtype: str) -> None:
    done = pi0("ttnn", "dry-run", either_path, "--board", board, "--dtype", dtype, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["grid"] == grid
    assert 30 < data["programs"] < 100
    assert 0 < data["peak_l1"] <= data["l1"]
    assert 0 < data["weights"] < data["peak_dram"] < data["dram"]
    *stages, call = data["times"]
    assert [stage["stage"] for stage in stages][-1] == "velocity"
    assert call["programs"] == sum(stage["programs"] for stage in stages)
    assert data["programs"] <= call["programs"] < 1000
    assert all(0 < stage["cores"] <= grid[0] * grid[1] for stage in stages if stage["programs"])
    arithmetic = {stage["stage"] for stage in stages if stage["flop"]}
    assert {"projector", "action_projection"} <= arithmetic  # which have matrix products alone
    assert call["dram"] > data["weights"] / 2  # the table of tokens is looked up
    assert call["bound_ms"] >= max(call["dram_ms"], call["math_ms"]) > 0


TWO_CHIPS = """\
arch: {0: wormhole_b0, 1: wormhole_b0}
chips: {0: [0, 0, 0, 0], 1: [1, 0, 0, 0]}
chips_with_mmio: [0: 0]
ethernet_connections:
  - [{chip: 0, chan: 8}, {chip: 1, chan: 0}]
  - [{chip: 0, chan: 9}, {chip: 1, chan: 1}]
harvesting:
  0: {noc_translation: true, harvest_mask: 3, dram_harvesting_mask: 0, eth_harvesting_mask: 0,
      pcie_harvesting_mask: 0}
  1: {noc_translation: true, harvest_mask: 3, dram_harvesting_mask: 0, eth_harvesting_mask: 0,
      pcie_harvesting_mask: 0}
boards: [[{board_id: 72059269368820857}, {board_type: n300}, {chips: [0, 1]}]]
"""


def test_a_whole_n300_opens_with_its_ethernet_cores_dispatching(tmp_path: Path) -> None:
    """Both chips described: TTNN leaves the row of cores that would dispatch to the model."""
    script = tmp_path / "opened.py"
    script.write_text(
        "from pi0.engines.tenstorrent import dryrun\n"
        "from pi0.engines.tenstorrent.boards import Board\n"
        f"board = Board('n300', 'n300', {TWO_CHIPS.replace('{', '{{').replace('}', '}}')!r}, 3)\n"
        "dryrun.find_board = lambda name: board\n"
        "backend = dryrun.MockBackend('n300', lambda stage: None)\n"
        "print(backend.grid)\n"
        "backend.close()\n"
    )
    words, environment = [sys.executable, str(script)], clean_environment()
    environment["XDG_CACHE_HOME"] = str(tmp_path)  # n300.yaml is another one
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout == "Grid(x=8, y=8)\n", done.stderr


def test_a_batch_starts_as_many_programs_as_one(either_path: Path) -> None:
    calls = []
    for size in (1, 4):
        done = pi0("ttnn", "dry-run", either_path, "--batch", size, "--json")
        assert done.returncode == 0, done.stderr
        data = json.loads(done.stdout)
        assert data["batch"] == size
        calls.append(data["times"][-1])
    assert calls[0]["programs"] == calls[1]["programs"]
    assert calls[0]["flop"] < calls[1]["flop"]


def kernels(path: Path, cache: Path, dtype: str) -> dict[str, list[Descriptor]]:
    """By name, as a dry run generates them; what no vector engine reads is cut to Tf32."""
    words = ("ttnn", "dry-run", path, "--dtype", dtype, "--cameras", 1, "--tokens", 8)
    done = pi0(*words, XDG_CACHE_HOME=str(cache))
    assert done.returncode == 0, done.stderr
    found = read_descriptors(cache)
    for kernel in found:
        registers = [("Tf32" if memory == "Float32" else memory) for memory in kernel.memory]
        if "sfpu" not in kernel.kernel:  # the vector engine has float32
            assert list(kernel.registers) == registers, kernel
    return {name: [k for k in found if k.kernel == name] for name in {k.kernel for k in found}}


def test_formats_are_those_that_the_host_computes_with(tiny_path: Path, tmp_path: Path) -> None:
    """What `silicon.py` and `golden.py` take for granted, read from the generated descriptors."""
    by_kernel = kernels(tiny_path, tmp_path, "fast")
    products = by_kernel["compute_metal2"]
    assert {k.fidelity for k in products} == {"HiFi2", "HiFi3"}, "HiFi4 is faulty on Wormhole"
    assert all(k.float32_sums and "Float32" in k.memory for k in products)
    attention = by_kernel["sdpa"]
    assert {k.fidelity for k in attention} == {"HiFi2"}
    for k in attention:
        # Logits, and twice the sums of weights; maxima, outputs and the rest are bfloat16.
        assert k.float32_sums
        assert k.memory.count("Float32") == 3
        assert set(k.memory) == {"Float32", "Float16_b"}
    for k in by_kernel["rotary_embedding_llama"]:
        assert (set(k.memory), k.float32_sums) == ({"Float16_b"}, False)
    norms = by_kernel["layernorm"] + by_kernel["layernorm_sharded"]
    assert {(k.fidelity, k.float32_sums) for k in norms} == {("HiFi3", True)}
    with_gelu = [k for k in by_kernel["eltwise_binary_no_bcast"] if len(k.memory) == 4]
    assert {k.memory for k in with_gelu} == {("Bfp8_b",) * 4}, "GELU lies in the dtype of the gate"
    assert not any(k.float32_sums for k in by_kernel["ternary_addc_ops_fpu_rowbcast"])


def test_residual_streams_of_accurate_stay_float32(tiny_path: Path, tmp_path: Path) -> None:
    """The vector engine adds branches to them, whose operands no register cuts."""
    by_kernel = kernels(tiny_path, tmp_path, "accurate")
    sums = [k for name in by_kernel if name.startswith("ternary") for k in by_kernel[name]]
    assert {"ternary_addc_ops_sfpu", "ternary_addc_ops_sfpu_bcast"} == {k.kernel for k in sums}
    for k in sums:
        assert (set(k.memory), set(k.registers[:3])) == ({"Float32"}, {"Float32"})
        assert k.float32_sums


@pytest.mark.parametrize("board", ["n150", "p150"])
def test_one_full_width_layer(one_layer_path: Path, board: str) -> None:
    words = ("--board", board, "--image-size", 384, "--cameras", 2, "--tokens", 32)
    done = pi0("ttnn", "dry-run", one_layer_path, *words)
    assert done.returncode == 0, done.stderr
    assert "prefix 1504, suffix 64" in done.stdout
    assert "nothing was computed" in done.stdout


@pytest.mark.parametrize(("preset", "prefix"), [("pi0_base", 832), ("pi05_base", 992)])
def test_full_model(preset: str, prefix: int) -> None:
    """Sizes alone need no checkpoint: the whole published models in seconds."""
    done = pi0("ttnn", "dry-run", "--preset", preset, "--cameras", 3, "--steps", 2, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["prefix"], data["suffix"]) == (prefix, 64)
    assert data["weights"] == pytest.approx(6.6e9, rel=0.01)


def test_rejected_operation_names_the_stage(tiny_path: Path, tmp_path: Path) -> None:
    """Blocks that do not fit a core's memory."""
    script = tmp_path / "planted.py"
    script.write_text(
        "import sys\n"
        "from pi0.engines.tenstorrent import ops\n"
        "ops.attention_chunks = lambda *_: (4096, 4096)\n"
        "from pi0.cli.main import main\n"
        "main()\n"
    )
    words = [str(script), "ttnn", "dry-run", str(tiny_path)]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=clean_environment()
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "pi0: ttnn.transformer.scaled_dot_product_attention in stage vision_tower: expected an "
        "operation that the device takes, found: "
    )
    assert "beyond max L1 size" in done.stderr
    assert "backtrace" not in done.stderr


def test_inputs_have_to_fit(tiny_path: Path) -> None:
    """The mask of 92 000 tokens is larger than the board's memory, and than most hosts'."""
    done = pi0("ttnn", "dry-run", tiny_path, "--image-size", 2450, "--cameras", 3)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pi0: inputs: expected room for bfloat16 [1, 1, 92032, 92032], ")
    assert "found: Out of Memory: Not enough space to allocate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bad_input(tiny_path: Path, tmp_path: Path) -> None:
    for words, said in [
        (("ttnn", "dry-run"), "expected a checkpoint or --preset, found both or neither"),
        (("ttnn", "dry-run", "--preset", "x"), "tiny, pi05_base, pi05_small, pi05_tiny, found 'x'"),
        (("ttnn", "dry-run", tiny_path, "--board", "e75"), "expected one of n150, n300, p150"),
        (("ttnn", "dry-run", tiny_path, "--dtype", "x"), "expected one of accurate, fast"),
        (
            ("ttnn", "dry-run", tiny_path, "--batch", 5),
            "batch: expected 1 to 4, which are computed",
        ),
        (("ttnn", "dry-run", tiny_path, "--image-size", 9), "at least one patch of 14 pixels"),
        (("trace", tiny_path, "--engine", "ttnn", "--device", "x"), "number of a card, found 'x'"),
        (("trace", tiny_path, "--engine", "ttnn", "--dtype", "float32"), "accurate, fast"),
    ]:
        done = pi0(*words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    another = pi0("ttnn", "dry-run", tiny_path, **{MOCK: "another.yaml"})
    assert another.returncode == 2
    assert "Start a new process without that variable" in another.stderr
    no_compiler = pi0("ttnn", "dry-run", tiny_path, PATH=str(tmp_path))
    assert no_compiler.returncode == 2
    assert "apt install gcc-riscv64-unknown-elf" in no_compiler.stderr


def test_device_that_cannot_be_opened(tiny_path: Path, tmp_path: Path) -> None:
    root = make_root(package_folder(), tmp_path / "root")  # its compiler says the right version
    done = pi0(
        *("trace", tiny_path, "--engine", "ttnn"),
        TT_METAL_SIMULATOR=str(tmp_path / "none"),
        TT_METAL_RUNTIME_ROOT=str(root),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "engine ttnn: expected a device 0 that can be opened, found: bad file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(SFPI.exists(), reason="there is Tenstorrent's compiler")
def test_no_compiler(tiny_path: Path, tmp_path: Path) -> None:
    done = pi0("trace", tiny_path, "--engine", "ttnn", TT_METAL_SIMULATOR=str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected Tenstorrent's compiler sfpi 7.89.0 in /opt/tenstorrent/sfpi" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(
    Path("/dev/tenstorrent").exists() or "TT_METAL_SIMULATOR" in os.environ,
    reason="there is a card",
)
def test_no_card(tiny_path: Path) -> None:
    done = pi0("trace", tiny_path, "--engine", "ttnn")
    assert done.returncode == 2
    assert "expected a Tenstorrent card (/dev/tenstorrent), a simulator" in done.stderr
