"""Where a server listens, who may come in, and what is encrypted."""

from __future__ import annotations

import base64
import binascii
import errno
import hmac
import ipaddress
import logging
import socket
import ssl
import stat
from pathlib import Path

from pi0.errors import ConfigError, Pi0Error

logger = logging.getLogger("pi0.serve")
MIN_KEY = 16  # characters: 64 random bits in hexadecimal


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet, so that nobody waits in vain while
    weights load; port 0 takes a free one.

    Raises:
        Pi0Error: the address is no address of this machine, or is in use.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise Pi0Error(
            f"--host: expected a name or an address of this machine, found {host!r} ({error})."
        ) from error
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # or others bind it, too
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(port) from error
        raise Pi0Error(
            f"--host, --port: expected an address that this machine may listen on, found {host} "
            f"port {port} ({error.strerror})."
        ) from error
    return sock


def listen(sock: socket.socket) -> None:
    """Lets clients knock.

    Raises:
        Pi0Error: another process listens, where the system let both bind the address.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections inherit it
        sock.listen()
    except OSError as error:
        raise _in_use(sock.getsockname()[1]) from error


def _in_use(port: int) -> Pi0Error:
    return Pi0Error(
        f"--port: expected a free port, found {port} in use. Choose another; 0 takes any that is "
        "free."
    )


def check_exposure(sock: socket.socket, api_key: str | None, tls: bool, allow_no_key: bool) -> None:
    """Refuses an address that others can reach, unless they need a key.

    Raises:
        ConfigError: anybody could move the robot's policy.
    """
    host = sock.getsockname()[0]
    if ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        return
    if api_key is None and not allow_no_key:
        raise ConfigError(
            f"--host: expected --api-key-file beside an address that other machines reach, found "
            f"{host} without. Write a key into a file (openssl rand -hex 32 >key), or, in a "
            "network where everybody may use the policy, add --allow-no-key."
        )
    if api_key is None:
        logger.warning("%s: every machine that reaches this address may use the policy.", host)
    elif not tls:
        logger.warning("%s: the API key travels unencrypted; see --tls-cert.", host)


def read_api_key(path: Path) -> str:
    """The key in a file, without white space around it.

    Raises:
        ConfigError: there is no file, or no key of `MIN_KEY` printable ASCII characters in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        text.encode("ascii")
        mode = path.stat().st_mode
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no ASCII text"
        raise ConfigError(
            f"--api-key-file: expected a file with a key, found none in {path} ({reason})."
        ) from error
    if len(text) < MIN_KEY or not text.isprintable() or " " in text:
        raise ConfigError(
            f"--api-key-file: expected one key of at least {MIN_KEY} characters without blanks in "
            f"{path}, found {len(text)} characters. Make one: openssl rand -hex 32 >{path}."
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s: other users of this machine may read it. chmod 600 mends that.", path)
    return text


def shows_key(headers: list[str], api_key: str) -> bool:
    """Whether the `Authorization` headers of a request are one with the key.

    Robots send `Api-Key KEY`. Browsers can send `Basic` only, whose password is the key then. The
    time that it takes does not depend on how much of the key is right.
    """
    scheme, _, given = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            given = ""
    elif scheme.lower() != "api-key":
        given = ""
    return hmac.compare_digest(given.strip().encode(errors="replace"), api_key.encode())


def make_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What encrypts connections; None without files.

    Raises:
        ConfigError: one file without the other, or files that are no certificate and its key.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("--tls-cert, --tls-key: expected both or neither, found one of them.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as error:
        reason = error.strerror
        if isinstance(error, ssl.SSLError):
            mismatch = error.reason == "KEY_VALUES_MISMATCH"
            reason = "the key is another certificate's" if mismatch else "one is not such a file"
        raise ConfigError(
            f"--tls-cert, --tls-key: expected a certificate and its private key in PEM form, found "
            f"{certificate} and {key} ({reason})."
        ) from error
    return context


def _no_password() -> str:
    raise ConfigError("--tls-key: expected a key without a password, found one with.")
