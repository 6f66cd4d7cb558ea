"""Addresses, keys and certificates: what a server refuses before it loads a policy."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from test_openpi_client import certificate

from pi0.errors import ConfigError, Pi0Error
from pi0.serve.binding import bind, check_exposure, listen, make_tls, read_api_key

KEY = "0123456789abcdef"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return path


def test_a_port_in_use() -> None:
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(Pi0Error, match=f"--port: expected a free port, found {port} in use"):
            bind("127.0.0.1", port)


def test_two_that_bind_a_port_before_either_listens() -> None:
    """The second is refused when it binds or, where the system lets it, when it listens."""
    with (
        bind("127.0.0.1", 0) as one,
        pytest.raises(Pi0Error, match=r"--port: expected a free port, found \d+ in use"),
        bind("127.0.0.1", one.getsockname()[1]) as other,
    ):
        list(map(listen, (one, other)))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "", "a" * 300, "ü..x"])
def test_no_address_of_this_machine(host: str) -> None:
    with pytest.raises(Pi0Error, match="--host"):
        bind(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
def test_loopback_needs_no_key(host: str) -> None:
    with bind(host, 0) as sock:
        check_exposure(sock, None, tls=False, allow_no_key=False)


def test_a_public_address_needs_a_key_or_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with bind("0.0.0.0", 0) as sock:
        with pytest.raises(ConfigError, match=r"--api-key-file.*found 0\.0\.0\.0 without"):
            check_exposure(sock, None, tls=True, allow_no_key=False)
        check_exposure(sock, KEY, tls=True, allow_no_key=False)
        assert not caplog.records
        with caplog.at_level(logging.WARNING):
            check_exposure(sock, None, tls=True, allow_no_key=True)
            check_exposure(sock, KEY, tls=False, allow_no_key=False)
    assert "every machine" in caplog.messages[0]
    assert "travels unencrypted" in caplog.messages[1]


def test_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "key"
    assert read_api_key(written(path, f"\n {KEY}\r\n")) == KEY
    assert read_api_key(written(path, f"\ufeff{KEY}")) == KEY
    assert not caplog.records
    path.chmod(0o644)
    read_api_key(path)
    assert "other users of this machine may read it" in caplog.text
    for text in ("", "\n", "short", "two words of some length", "ä" * 20, b"\xff" * 20):
        with pytest.raises(ConfigError, match="--api-key-file: expected"):
            read_api_key(written(path, text))
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="--api-key-file: expected a file"):
            read_api_key(missing)


def test_certificates(tmp_path: Path) -> None:
    assert make_tls(None, None) is None
    cert, key = certificate(tmp_path)
    assert make_tls(cert, key)
    with pytest.raises(ConfigError, match="expected both or neither"):
        make_tls(cert, None)
    (tmp_path / "other").mkdir()
    for wrong, found in (
        (cert, r"one is not such a file"),
        (written(tmp_path / "text", "text"), r"one is not such a file"),
        (tmp_path / "none", r"No such file or directory"),
        (certificate(tmp_path / "other")[1], r"the key is another certificate's"),
    ):
        with pytest.raises(ConfigError, match=rf"expected a certificate and .* \({found}\)\.$"):
            make_tls(cert, wrong)
