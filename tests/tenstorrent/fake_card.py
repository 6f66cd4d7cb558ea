"""A card that is not there, and forbids what a card forbids or punishes.

Its two command queues run as late as they can, in the order that is worst for whoever forgot an
event. While a capture lives nothing may be allocated or built: a replay would write there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pi0.engines.tenstorrent.backend import Grid, Upload
from pi0.engines.tenstorrent.device import DeviceBackend

# Computes an operation on plain values: name, arguments and options → (value, dtype) or several.
Compute = Callable[..., Any]


class Buffer:
    """A tensor of the card: its value changes, its place does not."""

    def __init__(self, value: Tensor, dtype: str) -> None:
        self.value, self.dtype = value, dtype

    @property
    def shape(self) -> torch.Size:
        return self.value.shape


class Event:
    done = False


class Library:
    """What TTNN has for captures, queues and events; everything else is another library's."""

    def __init__(self, card: FakeCard, other: Any, ahead: int, room: bool) -> None:
        self._card, self._other = card, other
        self._ahead = ahead  # the queue that runs whenever it can
        self._room = room  # whether captured commands fit their region
        self._queues: dict[int, list[tuple[str, Any]]] = {0: [], 1: []}
        self.recording: list[tuple[Any, ...]] | None = None
        self.live: dict[int, list[tuple[Any, ...]]] = {}
        self.captured = 0
        self.done: list[str] = []  # commands, as they were carried out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def begin_trace_capture(self, device: Any, cq_id: int) -> int:
        self.drain(0)
        assert not self.live
        self.captured += 1
        self.recording = []
        return self.captured

    def end_trace_capture(self, device: Any, trace: int, cq_id: int) -> None:
        assert self.recording is not None
        recorded, self.recording = self.recording, None
        for *_, results in recorded:  # a capture computes nothing
            for result in results:
                result.value = torch.full_like(result.value, torch.nan)
        if not self._room:
            raise RuntimeError(
                "TT_FATAL @ trace.cpp:7\ninfo:\nCreating trace buffers of size 70000000B on "
                "MeshDevice 1, but only 1B is allocated for trace region.\nbacktrace:\n --- 0x1"
            )
        self.live[trace] = recorded

    def release_trace(self, device: Any, trace: int) -> None:
        self.drain(0)
        if trace not in self.live:
            raise RuntimeError("no such trace")
        del self.live[trace]

    def execute_trace(self, device: Any, trace: int, cq_id: int, blocking: bool) -> None:
        assert not blocking
        recorded = self.live[trace]
        self.enqueue(cq_id, "replay", lambda: [self._card.again(*step) for step in recorded])

    def copy_host_to_device_tensor(self, host: Upload, buffer: Buffer, cq_id: int) -> None:
        sent = weakref.ref(host)

        def write() -> None:
            still = sent()
            assert still is not None, "a host tensor freed before it was written"
            buffer.value = still.value.clone()

        self.enqueue(cq_id, "write", write)

    def record_event(self, device: Any, cq_id: int) -> Event:
        event = Event()
        self.enqueue(cq_id, "record", lambda: setattr(event, "done", True))
        return event

    def wait_for_event(self, cq_id: int, event: Event) -> None:
        self.enqueue(cq_id, "wait", event)

    def enqueue(self, queue: int, name: str, command: Any) -> None:
        self._queues[queue].append((name, command))

    def drain(self, queue: int) -> None:
        """Runs until a queue is empty; the one that is ahead whenever it is not held up."""
        order = (self._ahead, 1 - self._ahead)
        while self._queues[queue]:
            assert any(self._step(each) for each in order), "both queues wait for ever"

    def _step(self, queue: int) -> bool:
        """Runs a queue's next command, if there is one that does not have to wait."""
        if not self._queues[queue]:
            return False
        name, command = self._queues[queue][0]
        if name == "wait":
            if not command.done:
                return False
        else:
            command()
            self.done.append(name)
        del self._queues[queue][0]
        return True


class NoEvents(Library):
    """One whose queues do not wait for each other."""

    def wait_for_event(self, cq_id: int, event: Event) -> None:
        pass


class FakeCard(DeviceBackend):
    """The card, over whatever computes."""

    can_replay, device = True, None

    def __init__(
        self,
        compute: Compute,
        other: Any = None,
        arch: Any = None,
        ahead: int = 0,
        room: bool = True,
        library: type[Library] = Library,
    ) -> None:
        self._compute, self.arch, self.grid = compute, arch, Grid(8, 8)
        self.ttnn = library(self, other, ahead, room)
        self._programs: set[Any] = set()

    def put(self, upload: Upload) -> Buffer:
        assert not self.ttnn.live, "allocated where a replay writes"
        assert self.ttnn.recording is None, "an upload cannot be captured"
        return Buffer(upload.value.clone(), upload.dtype)

    def stage_upload(self, upload: Upload) -> Upload:
        return upload

    def get(self, handle: Buffer) -> Tensor:
        self.ttnn.drain(0)
        return handle.value.float()

    def dtype(self, handle: Buffer) -> str:
        return handle.dtype

    def dram(self) -> tuple[int, int]:
        return 0, 10**12

    def close(self) -> None:
        assert not self.ttnn.live

    def run(self, name: str, *args: Any, **options: Any) -> Any:
        self._build(name, args)
        if name == "copy":  # the only one here that allocates nothing
            assert self.ttnn.recording is None
            source, target = args
            self.ttnn.enqueue(0, "move", lambda: setattr(target, "value", source.value.clone()))
            return target
        assert not self.ttnn.live, "allocated where a replay writes"
        self.ttnn.drain(0)
        computed = self._compute(name, *args, **options)
        several = isinstance(computed, list)
        results = [Buffer(*each) for each in (computed if several else [computed])]
        if self.ttnn.recording is not None:
            self.ttnn.recording.append((name, args, options, results))
        return tuple(results) if several else results[0]

    def again(self, name: str, args: Any, options: Any, results: list[Buffer]) -> None:
        """A captured operation, into the same buffers."""
        computed = self._compute(name, *args, **options)
        for result, (value, _) in zip(
            results, computed if isinstance(computed, list) else [computed], strict=True
        ):
            result.value = value

    def _build(self, name: str, args: tuple[Any, ...]) -> None:
        flat = [each for arg in args for each in (arg if isinstance(arg, list) else [arg])]
        shapes = ((*each.shape, each.dtype) for each in flat if isinstance(each, Buffer))
        program = (name, *shapes)
        if program not in self._programs:
            assert not self.ttnn.live, f"{name}: a program built where a replay writes"
            assert self.ttnn.recording is None, f"{name}: a program built in a capture"
            self._programs.add(program)
