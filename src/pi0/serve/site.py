"""The HTTP side of the port: health, metrics, and a live page that needs nothing from elsewhere."""

from __future__ import annotations

import asyncio
import io
import json
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from pi0.policy.observation import read_prompt
from pi0.serve.answer import Chunk
from pi0.serve.binding import shows_key
from pi0.serve.metrics import RECORDED
from pi0.serve.pictures import present_cameras, read_pictures

if TYPE_CHECKING:
    from pi0.policy import Pipeline
    from pi0.serve.server import PolicyServer

PICTURE_SIDE = 320  # pixels, at most
PLOTTED = 32  # actions of a chunk, at most
RECENT = 60  # seconds that the page's quantiles tell of
NEED_KEY = "key: expected the header Authorization: Api-Key KEY with this server's key, found {}.\n"
# Nothing from elsewhere, and nobody else's page around this one.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self'; connect-src 'self'; frame-ancestors 'none'"
)


class Site:
    """Answers HTTP requests to a server's port; those for a websocket it lets in or refuses."""

    def __init__(self, server: PolicyServer) -> None:
        self._server = server
        self._page = (files("pi0.serve") / "page.html").read_bytes()

    async def respond(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response to a request; None: it becomes a websocket."""
        # Before websockets 17 only GET comes here, and a request has no method.
        method = getattr(request, "method", "GET")
        if method not in ("GET", "HEAD"):
            refused = connection.respond(HTTPStatus.METHOD_NOT_ALLOWED, "expected GET or HEAD\n")
            refused.headers["Allow"] = "GET, HEAD"
            return refused
        response = await self._respond(connection, request)
        if response is not None and method == "HEAD":
            response.body = b""
        return response

    async def _respond(self, connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        server = self._server
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")  # as openpi's server says it
        if path == "/readyz":
            status = HTTPStatus.OK if server.ready else HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "ready\n" if server.ready else "not ready\n")
        key = server.options.api_key
        shown = request.headers.get_all("Authorization")
        if key is not None and not shows_key(shown, key):
            server.metrics.refused("key")
            refused = connection.respond(
                HTTPStatus.UNAUTHORIZED, NEED_KEY.format("another" if shown else "none")
            )
            refused.headers["WWW-Authenticate"] = 'Basic realm="pi0: the password is the API key"'
            return refused
        if "websocket" in " ".join(request.headers.get_all("Upgrade")).lower():
            return self._admit(connection)
        return await self._content(connection, path)

    def _admit(self, connection: ServerConnection) -> Response | None:
        server, most = self._server, self._server.options.max_clients
        if server.stopping:
            reason, text = "stopping", "server: expected it to run, found it ending."
        elif len(server.sessions) >= most:
            reason = "clients"
            text = f"clients: expected at most {most} at once, found as many. Come back later."
        else:
            return None
        server.metrics.refused(reason)
        return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{text}\n")

    async def _content(self, connection: ServerConnection, path: str) -> Response:
        if path == "/":
            return _response("text/html; charset=utf-8", self._page)
        if path == "/metrics":
            return _response(
                "text/plain; version=0.0.4; charset=utf-8", self._server.metrics.exposition()
            )
        if path == "/status.json":
            text = json.dumps(self._status(), allow_nan=False)
            return _response("application/json", text.encode())
        if path.startswith("/images/"):
            picture = await asyncio.to_thread(self._picture, path.removeprefix("/images/"))
            if picture:
                return _response("image/png", picture)
        return connection.respond(HTTPStatus.NOT_FOUND, "not found\n")

    def _status(self) -> dict[str, Any]:
        server, last = self._server, self._server.answerer.last
        policy = server.answerer.policy
        recent = server.metrics.latency(RECENT)
        return {
            "ready": server.ready,
            "robot": policy.robot.name,
            "engine": policy.metadata["engine"]["name"],
            "precision": policy.metadata["engine"]["precision"],
            "clients": len(server.sessions),
            "waiting": sum(session.waiting for session in server.sessions),
            "outcomes": dict(server.metrics.outcomes),
            "recent": recent and vars(recent),
            "latencies": list(server.metrics.latencies),
            "recording": self._recording(),
            "last": last and _describe(last, policy.pipeline),
        }

    def _recording(self) -> dict[str, Any] | None:
        """What is recorded, and the last error without the folder's place."""
        server = self._server
        if server.recorder is None or server.options.record is None:
            return None
        error, folder = server.recorder.error, server.options.record
        return {
            **{what: server.metrics.recording[what] for what in RECORDED},
            "error": error and error.replace(str(folder), folder.name),
        }

    def _picture(self, name: str) -> bytes | None:
        """A camera's last image as PNG, small; None if there is none."""
        last, pipeline = self._server.answerer.last, self._server.answerer.policy.pipeline
        if last is None:
            return None
        named = enumerate(read_pictures(last.observation, pipeline))
        pictures = {str(number): picture for number, (_, picture) in named}
        if name not in pictures:
            return None
        image = Image.fromarray(np.ascontiguousarray(pictures[name]))
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()


def _describe(chunk: Chunk, pipeline: Pipeline) -> dict[str, Any]:
    robot = pipeline.robot
    observation = chunk.observation
    actions = chunk.actions[:, :PLOTTED]
    return {
        "number": chunk.number,
        "prompt": read_prompt(observation, pipeline.default_prompt),
        "cameras": present_cameras(observation, pipeline),
        "actions": actions.tolist(),
        "names": list(robot.action_names[:PLOTTED] or map(str, range(actions.shape[1]))),
        "units": list(robot.action_units[:PLOTTED]),
        "rate_hz": robot.control_hz,
    }


def _response(kind: str, body: bytes) -> Response:
    headers = Headers(
        {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Connection": "close",
        }
    )
    return Response(HTTPStatus.OK.value, HTTPStatus.OK.phrase, headers, body)
