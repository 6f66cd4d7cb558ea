"""How a server is run, and the limits that it keeps."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from pi0.serve.wire import MessageLimits


@dataclass(frozen=True)
class ServeOptions:
    """How a server is run.

    Attributes:
        api_key: what clients show in `Authorization: Api-Key …`; None: nobody needs one.
        tls: certificate and key; None: no encryption.
        message: limits of a message.
        max_clients: robots that are connected at once.
        batch: robots whose observations are computed together, at most.
        batch_wait: seconds that an observation waits for others, at most, where the policy is free.
        timeout: seconds from an observation's arrival to its answer.
        send_timeout: seconds that a client may take to read an answer.
        grace: seconds that a shutdown waits for answers that are being computed.
        ping_interval, ping_timeout: seconds between pings, and until a silent client is dropped.
        log_interval: seconds between lines of latency in the log.
        record: folder of a dataset to which observations and actions are recorded; None: nowhere.
    """

    api_key: str | None = None
    tls: ssl.SSLContext | None = None
    message: MessageLimits = field(default_factory=MessageLimits)
    max_clients: int = 64
    batch: int = 1
    batch_wait: float = 0
    timeout: float = 60
    send_timeout: float = 20
    grace: float = 30
    ping_interval: float = 20
    ping_timeout: float = 20
    log_interval: float = 60
    record: Path | None = None
