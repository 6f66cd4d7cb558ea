"""A policy behind `pi0 serve`, as a program that has pi0 sees it: `infer` as of a `Policy`.

Robots need nothing of it: openpi's client, or forty lines (`examples/robot_client.py`), will do.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from pi0.closing import Closing
from pi0.errors import ConfigError, ObservationError, Pi0Error
from pi0.policy import ActionLimits
from pi0.policy.chunking import read_actions
from pi0.policy.observation import Observation, without_tensors
from pi0.serve.extras import Extras, add_extras
from pi0.serve.wire import MessageLimits, pack, unpack

LIMITS = MessageLimits()
quiet = logging.getLogger("pi0.serve.client")
quiet.setLevel(logging.CRITICAL)  # what goes wrong is raised; a ping's thread would print it, too


class ServerPolicy(Closing):
    """A connection to a server; one robot's. An `ActionBuffer` takes it as it takes a `Policy`.

    Attributes:
        metadata: the server's greeting; {} if it says nothing.
        real_time: how the server continues chunks; None: it does not say that it can.
        limits, action_names, on_limit: of its robot, and what it does with actions beyond them.
    """

    def __init__(self, address: str, api_key: str | None = None, timeout: float = 60) -> None:
        """
        Args:
            address: ws://HOST:PORT, or wss:// with TLS.
            api_key: what the server wants to be shown.
            timeout: seconds until the connection stands, and from an observation to its answer.

        Raises:
            ConfigError: a key that no header can have, or a time that is none.
            Pi0Error: there is no server, or it refuses.
        """
        self._address, self._timeout = address, timeout
        self._reset = True
        self._turn = threading.Lock()
        self._open = contextlib.ExitStack()
        self._connection: ClientConnection = self._open.enter_context(
            _connect(address, api_key, timeout)
        )
        try:
            greeting = self._exchange(None)
        except BaseException:
            self._hang_up()
            raise
        self.metadata: dict[str, Any] = greeting if isinstance(greeting, dict) else {}
        ours = self.metadata if str(self.metadata.get("server")).startswith("pi0 ") else {}
        try:
            robot = ours.get("robot") or {}
            limits = {name: tuple(column) for name, column in (robot.get("limits") or {}).items()}
            self.limits = ActionLimits(**limits) if limits else None
            self.action_names = tuple(robot.get("action_names", ()))
        except (AttributeError, TypeError, ConfigError) as error:
            self._hang_up()
            raise Pi0Error(
                f"server {address}: expected a greeting with a robot's table, found one that "
                f"cannot be read ({error}). Use the same version of pi0 on both sides."
            ) from error
        self.on_limit: str = ours.get("on_limit", "error")
        self.real_time: Any = self.metadata.get("real_time")

    def infer(
        self,
        observation: Observation,
        noise: NDArray[np.floating] | None = None,
        *,
        previous: NDArray[np.floating] | None = None,
        delay: int = 0,
    ) -> dict[str, Any]:
        """The server's answer to an observation; arguments as of `Policy.infer`.

        Calls from several threads are answered one after another.

        Returns:
            "actions" [horizon, D] float32 and what docs/serving.md lists.

        Raises:
            ObservationError: what the server says is wrong with the observation, or why else it
                has no actions.
            ConfigError: `previous` is given, and the server does not say that it continues chunks.
            EngineError: the server's actions are none that a robot can execute.
            Pi0Error: the connection has ended, or there was no answer in time, which ends it: what
                came later would be taken for the answer to another observation.
        """
        if previous is not None and not self.metadata.get("real_time"):
            raise ConfigError(
                f"previous: expected server {self._address} to continue chunks, found that it does "
                "not say so. Start it with --real-time."
            )
        with self._turn:
            reset, self._reset = self._reset, False
            try:
                extras = Extras(
                    previous=without_tensors("previous", previous),
                    delay=delay,
                    noise=without_tensors("noise", noise),
                    reset=reset,
                )
                said = add_extras(without_tensors("observation", observation), extras)
                answer: dict[str, Any] = self._exchange(pack(said))
                read_actions(answer)
            except BaseException:
                self._reset = self._reset or reset  # with the next one that is answered
                raise
        return answer

    def reset(self) -> None:
        """With the next observation another episode begins."""
        self._reset = True

    def close(self) -> None:
        """Ends the connection."""
        self._open.close()

    def _exchange(self, frame: bytes | None) -> Any:
        """What the server answers to a frame, or says by itself."""
        end = time.monotonic() + self._timeout
        try:
            if frame is not None:
                self._send(frame)
            answer = self._connection.recv(timeout=max(0.0, end - time.monotonic()))
        except BaseException as error:  # Ctrl-C, too: this answer must not be taken for the next
            late = time.monotonic() >= end
            self._hang_up()
            if isinstance(error, (OSError, WebSocketException)):
                if late:
                    raise Pi0Error(
                        f"server {self._address}: expected an answer within {self._timeout:g} s, "
                        "found none, and ended the connection."
                    ) from error
                raise Pi0Error(
                    f"server {self._address}: expected a connection, found that it has ended: "
                    f"{error}."
                ) from error
            raise
        if isinstance(answer, str):
            raise ObservationError(answer)
        return unpack(answer, LIMITS)

    def _send(self, frame: bytes) -> None:
        """Sends a frame; a server that does not read it in time is given up, as `send` has no limit
        of its own."""
        guard = threading.Timer(self._timeout, self._cut)
        guard.start()
        try:
            self._connection.send(frame)
        finally:
            guard.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.socket.shutdown(socket.SHUT_RDWR)

    def _hang_up(self) -> None:
        """Ends the connection without waiting for a server that may be gone to agree."""
        self._cut()
        self.close()


def _connect(address: str, api_key: str | None, timeout: float) -> ClientConnection:
    """A connection that stands; raises what `ServerPolicy` does."""
    key = None if api_key is None else api_key.strip()  # a file ends with a line break
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("api_key: expected printable ASCII characters, found others.")
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ConfigError(f"timeout: expected a number of seconds above 0, found {timeout!r}.")
    headers = {} if key is None else {"Authorization": f"Api-Key {key}"}
    options: dict[str, Any] = {"compression": None, "max_size": None, "logger": quiet}
    try:
        made: ClientConnection = connect(
            address, open_timeout=timeout, additional_headers=headers, **options
        )
        return made
    except ssl.SSLCertVerificationError as error:  # which is a ValueError, too
        raise Pi0Error(
            f"server {address}: expected a certificate of this address that is trusted here, "
            f"found: {error.verify_message.rstrip('.')}. SSL_CERT_FILE=FILE trusts one that signs "
            "itself."
        ) from error
    except (InvalidURI, ValueError) as error:
        raise Pi0Error(
            f"server: expected an address such as ws://127.0.0.1:8000, found {address!r}."
        ) from error
    except InvalidStatus as error:
        body = error.response.body.decode(errors="replace").strip()
        raise Pi0Error(
            f"server {address}: expected to be let in, found HTTP "
            f"{error.response.status_code}: {body or 'nothing more'}"
        ) from error
    except (OSError, ImportError, WebSocketException) as error:
        raise Pi0Error(
            f"server {address}: expected one that answers, found: {error}. Start it with "
            "`pi0 serve`."
        ) from error
