"""A policy behind `pi0 serve`, as a program that has pi0 sees it: `infer` as of a `Policy`.

Robots need nothing of it: openpi's client, or forty lines (`examples/robot_client.py`), will do.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from pi0.closing import Closing
from pi0.errors import ObservationError, Pi0Error
from pi0.policy.observation import Observation
from pi0.serve.extras import Extras, add_extras
from pi0.serve.wire import MessageLimits, pack, unpack

LIMITS = MessageLimits()


class ServerPolicy(Closing):
    """A connection to a server; one robot's. An `ActionBuffer` takes it as it takes a `Policy`.

    Attributes:
        metadata: the server's greeting; {} if it says nothing.
    """

    def __init__(self, address: str, api_key: str | None = None, timeout: float = 60) -> None:
        """
        Args:
            address: ws://HOST:PORT, or wss:// with TLS.
            api_key: what the server wants to be shown.
            timeout: seconds until the connection stands, and until an answer is there.

        Raises:
            Pi0Error: there is no server, or it refuses.
        """
        self._address, self._timeout = address, timeout
        self._reset = True
        headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._open = ExitStack()
        try:
            self._connection: ClientConnection = self._open.enter_context(
                connect(
                    address,
                    compression=None,
                    max_size=None,
                    open_timeout=timeout,
                    additional_headers=headers,
                )
            )
        except InvalidURI as error:
            raise Pi0Error(
                f"server: expected an address such as ws://127.0.0.1:8000, found {address!r}."
            ) from error
        except InvalidStatus as error:
            body = error.response.body.decode(errors="replace").strip()
            raise Pi0Error(
                f"server {address}: expected to be let in, found HTTP "
                f"{error.response.status_code}: {body or 'nothing more'}"
            ) from error
        except (OSError, WebSocketException) as error:
            raise Pi0Error(
                f"server {address}: expected one that answers, found: {error}. Start it with "
                "`pi0 serve`."
            ) from error
        try:
            greeting = self._receive()
        except BaseException:
            self.close()
            raise
        self.metadata: dict[str, Any] = greeting if isinstance(greeting, dict) else {}

    def infer(
        self,
        observation: Observation,
        noise: NDArray[np.floating] | None = None,
        *,
        previous: NDArray[np.floating] | None = None,
        delay: int = 0,
    ) -> dict[str, Any]:
        """The server's answer to an observation; arguments as of `Policy.infer`.

        Returns:
            "actions" [horizon, D] float32 and what docs/serving.md lists.

        Raises:
            ObservationError: what the server says is wrong with the observation, or why else it
                has no actions.
            Pi0Error: the connection has ended, or there was no answer in time, which ends it: what
                came later would be taken for the answer to another observation.
        """
        extras = Extras(previous, delay, noise, self._reset)
        frame = pack(add_extras(observation, extras))
        try:
            self._connection.send(frame)
        except (OSError, WebSocketException) as error:
            raise self._gone(error) from error
        self._reset = False
        answer: dict[str, Any] = self._receive()
        return answer

    def reset(self) -> None:
        """With the next observation another episode begins."""
        self._reset = True

    def close(self) -> None:
        """Ends the connection."""
        self._open.close()

    def _receive(self) -> Any:
        try:
            frame = self._connection.recv(timeout=self._timeout)
        except BaseException as error:  # Ctrl-C, too: this answer must not be taken for the next
            self.close()
            if isinstance(error, TimeoutError):
                raise Pi0Error(
                    f"server {self._address}: expected an answer within {self._timeout:g} s, found "
                    "none, and ended the connection."
                ) from error
            if isinstance(error, (OSError, WebSocketException)):
                raise self._gone(error) from error
            raise
        if isinstance(frame, str):
            raise ObservationError(frame)
        return unpack(frame, LIMITS)

    def _gone(self, error: Exception) -> Pi0Error:
        return Pi0Error(
            f"server {self._address}: expected a connection, found that it has ended: {error}."
        )
