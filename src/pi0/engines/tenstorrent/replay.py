"""A call captured once and replayed: one command instead of thousands.

While a capture lives, the device may be given nothing new: a replay writes where the captured
call's tensors were, whatever lies there by then (tt-metal issue 54032). So everything that a replay
needs is allocated and built before: two sets of the inputs, and the programs that copy one to the
other.

Inputs go up on the second command queue, which runs beside the first: the next observation's while
a replay computes. Events keep them in order:

    queue 1:  wait moved | write landing | record arrived
    queue 0:                               wait arrived | landing → inputs | record moved | replay
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from pi0.engines.tenstorrent.backend import Handle, Upload
from pi0.engines.tenstorrent.device import DeviceBackend, translate_errors
from pi0.errors import EngineError

COMPUTE, TRANSFER = 0, 1  # command queues


class CaptureError(EngineError):
    """A call that runs but cannot be captured."""


class Inputs:
    """The inputs of a call on the device, twice: where they arrive, and where the call reads."""

    def __init__(self, backend: DeviceBackend, uploads: dict[str, Upload]) -> None:
        self._backend = backend
        self.landing = {name: backend.put(upload) for name, upload in uploads.items()}
        self.given = {name: backend.put(upload) for name, upload in uploads.items()}

    def move(self) -> None:
        """Copies what has arrived to where the call reads."""
        self._backend.stage = "inputs"
        for name, landing in self.landing.items():
            self._backend.run("copy", landing, self.given[name])


class Replay:
    """A captured call.

    Raises:
        CaptureError: the call runs, but the library cannot capture it; nothing is held then.
        EngineError: the call does not run.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        uploads: dict[str, Upload],
        call: Callable[[dict[str, Handle]], Handle],
    ) -> None:
        self._backend = backend
        # The library's host tensors, which have to live until they have arrived: of an observation
        # whose replay runs, of the next one, and of one before whose result nobody asked for.
        self._sent: deque[dict[str, Handle]] = deque(maxlen=3)
        self._inputs = Inputs(backend, uploads)
        self._inputs.move()
        call(self._inputs.given)  # builds the programs: a capture may not
        with translate_errors("capture: expected a device that can capture", CaptureError):
            self._capture = backend.ttnn.begin_trace_capture(backend.device, cq_id=COMPUTE)
        try:
            self._result = self._record(call)
            with translate_errors("capture: expected a device that can mark a queue's progress"):
                self._moved = backend.ttnn.record_event(backend.device, COMPUTE)
        except EngineError as error:
            with contextlib.suppress(EngineError):  # it may hold nothing
                self.release()
            raise CaptureError(str(error)) from error

    def _record(self, call: Callable[[dict[str, Handle]], Handle]) -> Handle:
        backend, ttnn = self._backend, self._backend.ttnn
        try:
            return call(self._inputs.given)
        finally:
            with translate_errors("capture: expected room for the commands of a call"):
                ttnn.end_trace_capture(backend.device, self._capture, cq_id=COMPUTE)

    def release(self) -> None:
        with translate_errors("capture: expected one that can be released"):
            self._backend.ttnn.release_trace(self._backend.device, self._capture)

    def __call__(self, observations: Iterable[dict[str, Upload]]) -> Iterator[Tensor]:
        """Results of observations, one after another; the next one's inputs go up meanwhile."""
        queue = iter(observations)
        more = self._send_next(queue)
        while more:
            self._start()
            more = self._send_next(queue)
            self._backend.stage = "replay"
            yield self._backend.get(self._result)

    def _send_next(self, queue: Iterator[dict[str, Upload]]) -> bool:
        """Enqueues the upload of the next observation, if there is one."""
        uploads = next(queue, None)
        if uploads is None:
            return False
        backend, ttnn = self._backend, self._backend.ttnn
        hosts = {name: backend.stage_upload(upload) for name, upload in uploads.items()}
        self._sent.append(hosts)
        with translate_errors("inputs: expected a device that takes them"):
            ttnn.wait_for_event(TRANSFER, self._moved)
            for name, host in hosts.items():
                ttnn.copy_host_to_device_tensor(host, self._inputs.landing[name], cq_id=TRANSFER)
            self._arrived = ttnn.record_event(backend.device, TRANSFER)
        return True

    def _start(self) -> None:
        """Enqueues a replay with what has been sent."""
        backend, ttnn = self._backend, self._backend.ttnn
        with translate_errors("replay: expected a device that runs it"):
            ttnn.wait_for_event(COMPUTE, self._arrived)
            self._inputs.move()
            self._moved = ttnn.record_event(backend.device, COMPUTE)
            ttnn.execute_trace(backend.device, self._capture, cq_id=COMPUTE, blocking=False)
