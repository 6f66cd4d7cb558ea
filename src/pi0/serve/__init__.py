"""A policy behind openpi's websocket protocol, for robots on other machines (docs/serving.md).

    wire.py      messages: msgpack with NumPy arrays, within limits
    options.py   how a server is run, and the limits it keeps
    binding.py   address, API key, TLS
    answer.py    observations' frames in, answers' frames out: the one thread that computes
    replicas.py  the same by several processes, with Ray
    turns.py     whose turn it is, and who is computed together
    session.py   one client: its newest observation, its answers in order
    server.py    all of them: start, warm-up, shutdown
    load.py      clients that ask as fast as they can, for measurements
    metrics.py   what is counted and timed
    extras.py    what a client may say beside its observation
    client.py    the other side, for programs that have pi0
    record.py    what was answered, as episodes of a dataset (needs pi0[train])
    pictures.py  those of an observation
    site.py      the HTTP side: health, metrics, the live page

This file imports nothing of the packages that the extra `pi0[serve]` brings.
"""

from importlib.util import find_spec

from pi0.errors import Pi0Error, install_hint

PACKAGES = ("websockets", "msgpack", "prometheus_client")


def require_packages() -> None:
    """Says which package is missing.

    Raises:
        Pi0Error: one of `PACKAGES` is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise Pi0Error(
            f"serving: expected the packages {', '.join(PACKAGES)}, which the extra pi0[serve] "
            f"brings, found no {' and no '.join(missing)}. {install_hint('serve')}"
        )
