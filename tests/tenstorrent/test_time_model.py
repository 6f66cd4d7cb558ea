"""The time model's arithmetic, on operations whose bounds are known."""

from __future__ import annotations

import pytest

from pi0.engines.tenstorrent.time_model import (
    LAUNCH_SECONDS,
    PEAKS,
    Operation,
    Peaks,
    least_bytes,
    matrix_flop,
    stage_times,
)

CHIP = Peaks(dram=100e9, clock=1e9, source="")


def operation(stage: str = "a", **changes: int) -> Operation:
    given = {"programs": 1, "cores": 64, "dram": 0, "flop": 0} | changes
    return Operation(stage, "experimental.minimal_matmul", fidelity="HiFi2", **given)


@pytest.mark.parametrize(
    ("arch", "cores", "teraflops"), [("WORMHOLE_B0", 64, 131), ("BLACKHOLE", 110, 304)]
)
def test_peak_of_a_chip(arch: str, cores: int, teraflops: int) -> None:
    assert PEAKS[arch].flops("HiFi2", cores) == pytest.approx(teraflops * 1e12, rel=0.01)
    assert PEAKS[arch].flops("HiFi4", cores) == pytest.approx(teraflops * 0.5e12, rel=0.01)


def test_each_operation_takes_the_larger_of_both() -> None:
    slow_memory = operation(dram=10**9)  # 10 ms over DRAM
    slow_math = operation(flop=4096 * 64 * 10**7 // 2, cores=64)  # 10 ms on 64 cores
    (stage, call) = stage_times([slow_memory, slow_math], CHIP)
    assert (stage.dram_ms, stage.math_ms, stage.bound_ms) == pytest.approx((10, 10, 20))
    assert call.bound_ms == stage.bound_ms


def test_fewer_cores_take_longer() -> None:
    flop = 4096 * 64 * 10**7 // 2
    (wide, *_), (narrow, *_) = (
        stage_times([operation(flop=flop, cores=cores)], CHIP) for cores in (64, 2)
    )
    assert narrow.math_ms == pytest.approx(32 * wide.math_ms)
    assert (wide.on_few_cores, narrow.on_few_cores) == (0, 1)


def test_stages_add_up_to_the_call() -> None:
    """Also one that is entered again and again; a view starts no program and moves nothing."""
    view = operation("b", programs=0, cores=0, dram=10**12)
    loop = [operation(stage, dram=5, flop=7) for stage in "abab"]
    *stages, call = stage_times([*loop, view], CHIP)
    assert [stage.stage for stage in stages] == ["a", "b"]
    assert call.programs == sum(stage.programs for stage in stages) == 4
    assert (call.dram, call.flop) == (20, 28)
    assert call.launch_ms == pytest.approx(4 * LAUNCH_SECONDS * 1e3)
    assert call.limit == "launches"


def test_flop_of_operations() -> None:
    product = [(1, 1, 64, 32), (32, 96)]
    for name in ("minimal_matmul", "minimal_matmul_split", "dit_minimal_matmul_addcmul_fused"):
        assert matrix_flop(f"experimental.{name}", product) == 2 * 64 * 32 * 96
    attention = matrix_flop(
        "transformer.scaled_dot_product_attention", [(2, 8, 64, 256), (2, 1, 96, 256)]
    )
    assert attention == 2 * (2 * 8 * 64 * 96 * 256) * 2
    assert matrix_flop("add", [(1, 1, 64, 32), (1, 1, 64, 32)]) == 0


def test_bytes_of_operations() -> None:
    assert least_bytes("add", [100, 50], 100) == 250
    assert least_bytes("embedding", [8, 10**9], 1000) == 8 + 1000 + 1000
