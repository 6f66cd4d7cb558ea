"""What is read out of the library's graph captures; dry runs read real ones."""

from __future__ import annotations

from typing import Any

import pytest

from pi0.engines.tenstorrent.observer import cores_in, programs_and_cores


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
