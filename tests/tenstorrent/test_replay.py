"""When sampling calls are captured and released, on a card that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import EngineOptions
from pi0.engines.tenstorrent.backend import Upload
from pi0.engines.tenstorrent.device import DeviceBackend
from pi0.engines.tenstorrent.engine import TtnnEngine, TtnnHostEngine
from pi0.engines.tenstorrent.host import HostBackend
from pi0.inputs import random_inputs

pytestmark = pytest.mark.ttnn


class Library:
    """TTNN, with captures that are counted and do nothing."""

    def __init__(self, ttnn: Any) -> None:
        self._ttnn, self.live, self.captured, self.replayed = ttnn, set(), 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ttnn, name)

    def begin_trace_capture(self, device: Any, cq_id: int) -> int:
        self.captured += 1
        return self.captured

    def end_trace_capture(self, device: Any, trace: int, cq_id: int) -> None:
        self.live.add(trace)

    def release_trace(self, device: Any, trace: int) -> None:
        self.live.remove(trace)

    def execute_trace(self, device: Any, trace: int, cq_id: int, blocking: bool) -> None:
        assert trace in self.live
        self.replayed += 1

    def copy_host_to_device_tensor(self, *args: Any, **options: Any) -> None:
        pass

    wait_for_event = record_event = copy_host_to_device_tensor


class Card(DeviceBackend):
    """The host's arithmetic behind a card's face."""

    can_replay, device = True, None

    def __init__(self, host: HostBackend) -> None:
        self.host, self.arch, self.grid = host, host.arch, host.grid
        self.ttnn = Library(host.ttnn)
        self.get, self.dtype = host.get, host.dtype

    def put(self, upload: Upload) -> Any:
        assert not self.ttnn.live, "a replay could write there"
        return self.host.put(upload)

    def run(self, *args: Any, **options: Any) -> Any:
        assert not self.ttnn.live, "a replay could write there"
        return self.host.run(*args, **options)

    def stage_upload(self, upload: Upload) -> Tensor:
        return upload.value

    def dram(self) -> tuple[int, int]:
        return 0, 10**12


class Engine(TtnnEngine):
    @classmethod
    def _require_device(cls, device: str | None) -> None:
        pass

    def _open(self, device: str | None) -> Card:
        return Card(TtnnHostEngine._open(self, None))


def test_nothing_is_put_beside_a_capture(either_path: Path) -> None:
    engine = Engine(open_checkpoint(either_path), EngineOptions("accurate"))
    library = engine.backend.ttnn
    two, noise = random_inputs(engine.config, 2, 10, 0)
    one, _ = random_inputs(engine.config, 1, 10, 0)
    for inputs, steps, captured in (
        (two, 1, 1),
        (two, 1, 1),  # the same sizes: replayed
        (one, 1, 2),
        (one, 2, 3),
        (two, 1, 4),
    ):
        engine.sample(inputs, noise, steps)
        assert (library.captured, len(library.live)) == (captured, 1)
    prefix = engine.prefill(two)
    assert not library.live
    engine.sample(two, noise, 1)
    assert (library.captured, library.replayed) == (5, 6)
    engine.velocity(noise, torch.ones(1), prefix)
    assert not library.live
