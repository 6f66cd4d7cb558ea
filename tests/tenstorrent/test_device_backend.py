"""What the engine asks of TTNN to open a device, and what it makes of TTNN's errors: no TTNN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pi0.engines.tenstorrent import engine, ttnn_import
from pi0.engines.tenstorrent.backend import Grid, Upload
from pi0.engines.tenstorrent.device import CAPTURE_REGION, DeviceBackend
from pi0.engines.tenstorrent.ttnn_import import MOCK
from pi0.errors import EngineError

FATAL = "TT_FATAL @ /project/x.cpp:7: a < b\ninfo:\nOut of Memory: 7 bytes\nbacktrace:\n --- 0x1"


class Library(SimpleNamespace):
    """TTNN as far as a device goes; whatever else is asked for is its own name."""

    def __init__(self, **changes: Any) -> None:
        self.opened: dict[str, Any] = {}
        super().__init__(**changes)

    def __getattr__(self, name: str) -> Any:
        return name

    def open_device(self, **options: Any) -> Any:
        self.opened = options
        size = SimpleNamespace(x=8, y=7)
        return SimpleNamespace(arch=lambda: "arch", compute_with_storage_grid_size=lambda: size)


def fatal(*_: Any, **__: Any) -> None:
    raise RuntimeError(FATAL)


def test_a_card_captures_on_two_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the commands of a call, of which 110 MB are the most that was estimated."""
    for name in (MOCK, "TT_METAL_SLOW_DISPATCH_MODE"):
        monkeypatch.delenv(name, raising=False)
    backend = DeviceBackend(Library(), 1)
    opened = backend.ttnn.opened
    assert backend.can_replay
    assert (opened["device_id"], opened["num_command_queues"]) == (1, 2)
    assert opened["trace_region_size"] == CAPTURE_REGION >= 256 << 20
    assert backend.grid == Grid(8, 7), "the device's own"


@pytest.mark.parametrize("name", [MOCK, "TT_METAL_SLOW_DISPATCH_MODE"])
def test_what_cannot_capture_is_not_asked_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    backend = DeviceBackend(Library(), 0)
    opened = backend.ttnn.opened
    assert not backend.can_replay
    assert (opened["trace_region_size"], opened["num_command_queues"]) == (0, 1)


@pytest.mark.parametrize(
    ("broken", "call", "said"),
    [
        ("from_torch", lambda b: b.put(Upload(torch.zeros(2), "float32")), "expected room for"),
        ("add", lambda b: b.run("add", 1, 2), "ttnn.add in stage velocity: expected an operation"),
        ("to_torch", lambda b: b.get("x"), "velocity: expected a result of the device"),
    ],
)
def test_errors_are_one_sentence(
    broken: str, call: Callable[[DeviceBackend], Any], said: str
) -> None:
    backend = DeviceBackend(Library(**{broken: fatal}), 0)
    backend.stage = "velocity"
    with pytest.raises(EngineError) as error:
        call(backend)
    text = str(error.value)
    assert said in text
    assert text.endswith("found: Out of Memory: 7 bytes")
    assert "backtrace" not in text


def test_a_device_that_does_not_open() -> None:
    with pytest.raises(EngineError, match="a device 3 that can be opened, found: Out of Memory"):
        DeviceBackend(Library(open_device=fatal), 3)


def test_waiting_for_another_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """TTNN says so in its log only, and has no end to it."""

    class Opening:
        pass

    monkeypatch.setattr(ttnn_import, "holders", lambda: [4711])
    monkeypatch.setattr(ttnn_import, "log_warnings", lambda: ())
    monkeypatch.setattr(ttnn_import, "load", lambda environment: Library(close_device=fatal))
    with pytest.warns(UserWarning, match="other processes have a card open.*: 4711. End them"):
        engine.TtnnEngine._open(Opening(), "0")  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [None, "debug"])
def test_the_log_is_named_where_there_is_one(
    level: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level that is set goes to the output."""
    opening = Library(notes=())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in ((ttnn_import.LOG_FILE, None), ("TT_METAL_LOGGER_LEVEL", level)):
        monkeypatch.setenv(name, value or "")  # so that it is taken back
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(ttnn_import, "holders", lambda: [])
    monkeypatch.setattr(ttnn_import, "load", lambda environment: Library(close_device=fatal))
    engine.TtnnEngine._open(opening, "0")  # type: ignore[arg-type]
    assert any("ttnn.log" in note for note in opening.notes) == (level is None)


def test_a_device_that_does_not_close_hides_nothing() -> None:
    DeviceBackend(Library(close_device=fatal), 0).close()
