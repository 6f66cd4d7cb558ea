"""Messages between an engine and its worker: named arrays, as .npz with its length before it."""

from __future__ import annotations

import io
import struct
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Message = dict[str, NDArray[np.generic]]
LENGTH = struct.Struct("<q")


def send(stream: IO[bytes], **arrays: object) -> None:
    """Writes one message; values are what numpy makes arrays of."""
    body = io.BytesIO()
    values: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(body, **values)
    stream.write(LENGTH.pack(body.tell()))
    stream.write(body.getbuffer())
    stream.flush()


def receive(stream: IO[bytes]) -> Message | None:
    """The next message, or None at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = stream.read(LENGTH.unpack(head)[0])
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        return dict(file)
