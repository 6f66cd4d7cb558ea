"""What is read out of the library's graph captures; dry runs read real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pi0.engines.tenstorrent.device import DeviceBackend
from pi0.engines.tenstorrent.observer import Observer, cores_in, programs_and_cores


@pytest.mark.parametrize(
    ("ranges", "cores"),
    [("{[0-0 - 10-9]}", 110), ("{[0-0 - 0-9], [1-0 - 1-5]}", 16), ("{[3-2 - 3-2]}", 1), ("{}", 0)],
)
def test_cores(ranges: str, cores: int) -> None:
    assert cores_in(ranges) == cores


def test_programs_and_their_widest_buffers() -> None:
    def node(kind: str, ranges: str | None = None) -> dict[str, Any]:
        params = None if ranges is None else {"core_range_set": ranges, "size": 1}
        return {"node_type": kind, "params": params}

    begins = node("circular_buffer_deallocate_all")
    narrow, wide = (
        node("dataflow_buffer_allocate", ranges) for ranges in ("{[0-0 - 1-0]}", "{[0-0 - 7-7]}")
    )
    assert programs_and_cores([begins, narrow, begins, wide, narrow]) == (2, 64)
    assert programs_and_cores([node("tensor")]) == (0, 0)


class Tensor(SimpleNamespace):
    """A bfloat16 tensor in tiles, in DRAM or L1."""

    def __init__(self, rows: int, place: str) -> None:
        kind = SimpleNamespace(buffer_type=f"BufferType.{place}")
        super().__init__(shape=(1, 1, rows, 32), layout="TILE_LAYOUT", memory_config=lambda: kind)


def test_what_is_written_in_place_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of each operation: a cache is neither read nor written beyond its new rows."""
    backend = SimpleNamespace(
        ttnn=SimpleNamespace(Tensor=Tensor),
        option=lambda name: name,
        dtype=lambda tensor: "bfloat16",
        stage="",
    )
    observer = Observer(cast(DeviceBackend, backend))
    monkeypatch.setattr(observer, "_capture", lambda call: (1, 1))
    kernel = SimpleNamespace(math_fidelity=SimpleNamespace(name="HiFi3"))
    row, cache, places = 32 * 2, Tensor(640, "DRAM"), Tensor(32, "DRAM")
    update = "experimental.indexed_fused_update_cache"
    for name, given, result, options in (
        (update, (cache, Tensor(64, "L1"), cache, Tensor(64, "L1"), places), (cache, cache), {}),
        (update, (cache, Tensor(64, "DRAM"), cache, Tensor(64, "L1"), places), (cache, cache), {}),
        ("copy", (Tensor(64, "DRAM"), cache), cache, {}),
        ("rms_norm", (cache,), Tensor(640, "L1"), {"compute_kernel_config": kernel}),
    ):
        observer(name, given, options, lambda result=result: result)
    seen = [(each.dram // row, each.fidelity) for each in observer.operations]
    assert seen == [(160, ""), (224, ""), (64 + 640, ""), (640, "HiFi3")]
