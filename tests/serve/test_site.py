"""The HTTP side: health, readiness, metrics, who may see them, and the live page in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from serving import (
    IMAGE,
    SOON,
    Running,
    StateEngine,
    ask,
    eventually,
    make_policy,
    observation,
    running,
)
from websockets.exceptions import InvalidStatus
from websockets.http11 import Request as HandshakeRequest

from pi0.serve.options import ServeOptions
from pi0.serve.wire import pack

KEY = "0123456789abcdef"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def get(served: Running, path: str, **headers: str) -> tuple[int, bytes]:
    """Status and body of a GET request."""
    request = Request(f"http://{served.address}{path}", headers=headers)
    try:
        with urlopen(request, timeout=SOON) as response:
            return response.status, response.read()
    except HTTPError as error:
        with error:
            return error.code, error.read()


def raw_request(served: Running, method: str, path: str) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), timeout=SOON) as raw:
        raw.sendall(f"{method} {path} HTTP/1.1\r\nHost: robots\r\n\r\n".encode())
        return b"".join(iter(lambda: raw.recv(4096), b""))


def metric(served: Running, name: str) -> float:
    text = get(served, "/metrics")[1].decode()
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def test_health_and_readiness() -> None:
    engine = StateEngine()
    engine.gate.clear()
    with running(make_policy(engine), wait=False) as served:
        engine.started.acquire(timeout=SOON)
        assert get(served, "/healthz") == (200, b"OK\n")
        assert get(served, "/readyz") == (503, b"not ready\n")
        engine.gate.set()
        served.ready.wait(SOON)
        assert get(served, "/readyz") == (200, b"ready\n")
        assert get(served, "/nowhere")[0] == 404


@pytest.mark.skipif(not hasattr(HandshakeRequest, "method"), reason="websockets 16 takes only GET")
@pytest.mark.parametrize("path", ["/healthz", "/", "/nowhere"])
def test_head_is_the_headers_of_get(path: str) -> None:
    with running(make_policy(StateEngine())) as served:
        body = get(served, path)[1]
        head, _, rest = raw_request(served, "HEAD", path).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert rest == b""


@pytest.mark.skipif(not hasattr(HandshakeRequest, "method"), reason="websockets 16 takes only GET")
def test_other_methods_are_refused() -> None:
    with running(make_policy(StateEngine())) as served:
        for method in ("POST", "DELETE", "OPTIONS"):
            answer = raw_request(served, method, "/healthz")
            assert answer.startswith(b"HTTP/1.1 405 ")
            assert b"Allow: GET, HEAD\r\n" in answer


def test_not_ready_while_it_ends() -> None:
    engine = StateEngine()
    with running(make_policy(engine)) as served, served.connect() as client:
        engine.started.acquire(timeout=SOON)
        engine.gate.clear()
        client.send(pack(observation(1)))
        engine.started.acquire(timeout=SOON)
        served.stop()
        eventually(lambda: not served.server.ready)
        assert get(served, "/readyz")[0] == 503
        with pytest.raises(InvalidStatus, match="503"), served.connect():
            pass
        engine.gate.set()


def test_metrics() -> None:
    with running(make_policy(StateEngine())) as served:
        with served.connect() as client:
            for value in (observation(1), observation(2), {"nonsense": 1}):
                ask(client, value)
            assert metric(served, "pi0_clients") == 1
            assert metric(served, "pi0_waiting") == 0
            assert metric(served, "pi0_ready") == 1
        assert metric(served, 'pi0_responses_total{outcome="ok"}') == 2
        assert metric(served, 'pi0_responses_total{outcome="observation"}') == 1
        for stage in ("decode", "preprocess", "infer", "postprocess", "total"):
            assert metric(served, f'pi0_stage_seconds_count{{stage="{stage}"}}') == 2 + (
                stage == "decode"
            )
        assert metric(served, 'pi0_stage_seconds_count{stage="queue"}') == 3
        eventually(lambda: metric(served, "pi0_clients") == 0)


def test_status_and_images() -> None:
    floats = np.ascontiguousarray(IMAGE.transpose(2, 0, 1)).astype(np.float32) / 255
    images = {"base": IMAGE, "wrist": floats}
    with running(make_policy(StateEngine())) as served, served.connect() as client:
        assert json.loads(get(served, "/status.json")[1])["last"] is None
        assert get(served, "/images/0")[0] == 404
        ask(client, observation(0.5, images=images, prompt="<script>no()</script>"))
        status = json.loads(get(served, "/status.json")[1])
        ask(client, observation(0.5, images=images, prompt=np.array(["<script>no()</script>"])))
        as_array = json.loads(get(served, "/status.json")[1])["last"]["prompt"]
        for number in (0, 1):
            picture = Image.open(io.BytesIO(get(served, f"/images/{number}")[1]))
            assert np.abs(np.asarray(picture).astype(int) - IMAGE).max() <= 1  # floats are rounded
        assert get(served, "/images/2")[0] == 404
        assert get(served, "/images/../0")[0] == 404
        assert get(served, "/images/%C2%B2")[0] == 404
        assert get(served, "/images/" + "9" * 5000)[0] == 404
    assert status["ready"] is True
    assert status["outcomes"] == {"ok": 1}
    assert status["last"]["cameras"] == ["images/base", "images/wrist"]
    assert status["last"]["prompt"] == as_array == "<script>no()</script>"
    np.testing.assert_allclose(status["last"]["actions"], 0.5, rtol=1e-5)
    assert len(status["latencies"]) == 1


def test_the_status_costs_no_work_on_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made in the loop that serves all robots, where large float images would hold it up."""
    monkeypatch.delattr("pi0.serve.pictures.eight_bit")
    with running(make_policy(StateEngine())) as served, served.connect() as client:
        ask(client, observation(1))
        assert json.loads(get(served, "/status.json")[1])["last"]["cameras"] == ["images/base"]


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        (f"Api-Key {KEY}", 200),
        (f"api-key {KEY}", 200),
        (f"Api-Key {KEY}x", 401),
        (f"Api-Key {KEY[:-1]}", 401),
        ("Api-Key", 401),
        (KEY, 401),
        (f"Bearer {KEY}", 401),
        (basic(KEY), 200),
        (basic("wrong"), 401),
        ("Basic %%%", 401),
        ("Basic " + base64.b64encode(b"\xff").decode(), 401),
    ],
)
def test_a_key_opens_everything_but_health(header: str | None, status: int) -> None:
    headers = {"Authorization": header} if header else {}
    with running(make_policy(StateEngine()), ServeOptions(api_key=KEY)) as served:
        for path in ("/", "/metrics", "/status.json"):
            assert get(served, path, **headers)[0] == status
        for path in ("/healthz", "/readyz"):
            assert get(served, path)[0] == 200
        if status == 200:
            with served.connect(additional_headers=headers) as client:
                assert "actions" in ask(client, observation(1))
        else:
            with (
                pytest.raises(InvalidStatus, match="401") as refused,
                served.connect(additional_headers=headers),
            ):
                pass
            said = refused.value.response.body.decode()
            assert said.endswith(f"found {'another' if header else 'none'}.\n")


def test_two_keys_are_none() -> None:
    with (
        running(make_policy(StateEngine()), ServeOptions(api_key=KEY)) as served,
        socket.create_connection(("127.0.0.1", served.port)) as raw,
    ):
        line = f"Authorization: Api-Key {KEY}\r\n"
        raw.sendall(f"GET / HTTP/1.1\r\nHost: x\r\n{line}{line}\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 401")


def test_a_header_that_comes_twice(caplog: pytest.LogCaptureFixture) -> None:
    with (
        running(make_policy(StateEngine())) as served,
        socket.create_connection(("127.0.0.1", served.port)) as raw,
    ):
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nUpgrade: TLS/1.2\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
    assert not any(record.exc_info for record in caplog.records)


def test_a_page_of_somebody_else_is_no_robot() -> None:
    with (
        running(make_policy(StateEngine())) as served,
        pytest.raises(InvalidStatus, match="403"),
        served.connect(origin="http://evil.example"),
    ):
        pass


def test_the_page_names_nothing_elsewhere() -> None:
    with running(make_policy(StateEngine())) as served:
        status, page = get(served, "/")
    assert status == 200
    links = re.findall(r"https?://[^\s\"'`]+", page.decode())
    assert links == ["http://www.w3.org/2000/svg"]  # a name, not an address


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """After two chunks and an error the page shows numbers, pictures and both charts."""
    with running(make_policy(StateEngine(), "libero")) as served, served.connect() as client:
        sent = {
            "observation/image": IMAGE,
            "observation/wrist_image": IMAGE,
            "observation/state": np.zeros(8),
            "prompt": "<b>lift</b> the cube",
        }
        for value in (sent, {"nonsense": 1}, sent):
            ask(client, value)
        dom = dump_dom(f"http://{served.address}/", tmp_path)
    assert '<span id="state" class="good">ready</span>' in dom
    numbers = dict(re.findall(r'<dd data-number="([^"]+)">([^<]*)</dd>', dom))
    assert numbers["chunks"] == "2"
    assert numbers["errors"] == "1"
    assert numbers["clients"] == "1"
    assert numbers["robot"] == "libero"
    assert numbers["p99, last minute"].endswith(" ms")
    assert "“&lt;b&gt;lift&lt;/b&gt; the cube” (observation 2)" in dom
    assert re.findall(r'data-width="(\d+)"', dom) == ["32", "32"]  # decoded, as wide as sent
    assert len(re.findall("<polyline", dom)) == 7 + 1
    for name in ("roll", "gripper"):
        assert f"</i>{name}</span>" in dom


def dump_dom(url: str, profile: Path) -> str:
    """The page as a headless browser has it after a few seconds of its own time."""
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    words += [f"--user-data-dir={profile}", "--virtual-time-budget=3000", url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_flood_of_requests_does_not_stop_answers() -> None:
    with running(make_policy(StateEngine())) as served, served.connect() as client:
        results: list[Any] = []

        def poll() -> None:
            results.extend(get(served, "/status.json")[0] for _ in range(20))

        threads = [threading.Thread(target=poll) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert "actions" in ask(client, observation(1))
        for thread in threads:
            thread.join()
    assert results == [200] * 80
