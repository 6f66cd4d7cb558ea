"""`pi0 serve`: a policy behind openpi's websocket protocol."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi0.cli import options

if TYPE_CHECKING:
    import socket

    from pi0.engines.spec import EngineSpec
    from pi0.policy import Policy
    from pi0.serve.options import ServeOptions
    from pi0.serve.replicas import Replicas

SECOND_SIGNAL = 130  # exit code if a second Ctrl-C ends what the first began


@options.with_policy
def serve(
    checkpoint: options.Checkpoint,
    wishes: options.PolicyOptions,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: one that is free.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the key that clients must show: `openssl rand -hex 32 >FILE`.",
            show_default=False,
        ),
    ] = None,
    allow_no_key: Annotated[
        bool,
        typer.Option(
            "--allow-no-key",
            help="Serve without a key also where other machines can reach the address.",
        ),
    ] = False,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Certificate, for wss://.", show_default=False),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Its private key.", show_default=False)
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compute in N processes, on the Ray cluster of RAY_ADDRESS or on this "
            "machine; needs the extra pi0[ray].",
            show_default=False,
        ),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Add replicas under load, up to this number.", show_default=False),
    ] = None,
    replica_cpus: Annotated[
        int, typer.Option(min=1, help="CPUs, and threads, of each replica.")
    ] = 1,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Record observations and actions there, as episodes of a LeRobot dataset.",
            show_default=False,
        ),
    ] = None,
    max_clients: Annotated[int, typer.Option(min=1, help="Robots connected at once.")] = 64,
    max_message: Annotated[
        int, typer.Option(min=1, metavar="MB", help="Size of an observation; an array: half.")
    ] = 32,
    batch: Annotated[
        int, typer.Option(min=1, help="Robots whose observations are computed together, at most.")
    ] = 1,
    batch_wait: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="MS",
            help="Milliseconds that an observation waits for others to be computed with; without "
            "it only those are that wait anyway, for the policy.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds from an observation to its answer.")
    ] = 60.0,
    on_limit: Annotated[
        str, typer.Option(help="Actions beyond the robot's limits: error, clamp or warn.")
    ] = "error",
    steps: options.PolicySteps = None,
    sampler: options.Sampler = "euler",
    seed: options.Seed = 0,
    real_time: options.RealTime = None,
    default_prompt: Annotated[
        str | None,
        typer.Option(help="For observations without a prompt.", show_default=False),
    ] = None,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    engine: options.EngineOrAuto = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    weight_cache: options.WeightCache = False,
) -> None:
    """Serve a policy over the network: clients of openpi connect as they are.

    The port also answers /healthz, /readyz (200 once the policy is warm), /metrics for Prometheus,
    and / with a live page. Ctrl-C or SIGTERM ends it after delivering the responses in progress.

    **Examples**

        pi0 serve pi0_libero --robot libero
        pi0 serve my_aloha --robot aloha --engine cpu:int8 \\
            --host 0.0.0.0 --api-key-file key
        pi0 serve pi0_libero --robot libero --engine cuda --batch 8
        pi0 serve pi0_libero --robot libero --engine cuda --replicas 4
    """
    from pi0.serve import require_packages

    require_packages()

    from pi0.checkpoint.load import open_checkpoint
    from pi0.checkpoint.outputs import expand_user, remove_temporaries, require_writable
    from pi0.cli.engine import load_engine
    from pi0.engines.registry import find_engine
    from pi0.errors import ConfigError
    from pi0.policy import Policy, RealTimeChunking, choose_engine, prepare
    from pi0.serve.binding import bind, check_exposure, make_tls, read_api_key
    from pi0.serve.options import ServeOptions
    from pi0.serve.wire import MessageLimits

    _log_to_stderr()
    rtc = RealTimeChunking(jacobian=real_time) if real_time else None
    if max_replicas is not None and replicas is None:
        raise ConfigError("--max-replicas: expected --replicas beside it, found none.")
    if batch_wait is not None and batch == 1:
        raise ConfigError("--batch-wait: expected --batch beside it, found none.")
    if record:
        from pi0.data.schema import INFO

        record = expand_user(record)
        require_writable(record / INFO)
    key = read_api_key(expand_user(api_key_file)) if api_key_file else None
    tls = make_tls(*(path and expand_user(path) for path in (tls_cert, tls_key)))
    with bind(host, port) as sock, contextlib.ExitStack() as held:
        check_exposure(sock, key, tls is not None, allow_no_key)
        limits = MessageLimits(max_message << 20, max_message << 19)
        waits = batch, (batch_wait or 0) / 1e3
        settings = ServeOptions(key, tls, limits, max_clients, *waits, timeout, record=record)
        opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
        wishes = replace(wishes, default_prompt=default_prompt)
        setup = prepare(opened, wishes)
        pipeline = setup.require()
        if record:
            from pi0.data.lock import locked
            from pi0.serve.record import require_own

            require_own(record, pipeline)
            held.enter_context(locked(record))
            remove_temporaries(record)  # of a server that was killed
        size = wishes.image_size
        spec = choose_engine(engine, opened.config, dtype, device, size)
        find_engine(spec.name).check_batch(batch)
        sizes = len(pipeline.robot.cameras), pipeline.prompt.max_tokens
        if replicas is not None:
            from pi0.engines.memory import require_memory
            from pi0.serve.cluster import Scale
            from pi0.serve.replicas import Recipe, start_replicas

            given = steps, on_limit, horizon, max_tokens, base, rtc, weight_cache, sampler
            recipe = Recipe(opened.path, wishes, spec.label, *given, limits, batch)
            name = f"pi0-{sock.getsockname()[1]}"
            scale = Scale(replicas, max_replicas, replica_cpus, gpus_of(spec), name)
            all_sizes = *sizes, size, batch, weight_cache, replicas
            check_here = functools.partial(require_memory, opened, spec, *all_sizes)
            started = start_replicas(recipe, pipeline, scale, seed, check_here)
            with contextlib.closing(started) as many:
                run(many, sock, settings)
            return
        made = load_engine(opened, spec, *sizes, size, batch, weight_cache)
        with Policy(
            pipeline,
            made,
            steps=steps or setup.steps,
            sampler=sampler,
            seed=seed,
            n_action_steps=setup.n_action_steps,
            on_limit=on_limit,
            real_time=rtc,
            metadata=setup.describe(),
        ) as policy:
            run(policy, sock, settings)


def gpus_of(spec: EngineSpec) -> int:
    """How many GPUs an engine takes."""
    from pi0.engines.registry import find_engine

    device = spec.device or find_engine(spec.name).capabilities.devices[0]
    return int(device.startswith("cuda"))


def run(policy: Policy | Replicas, sock: socket.socket, settings: ServeOptions) -> None:
    """Serves a policy on a bound socket until SIGINT, SIGTERM, a second of which ends at once, or
    SIGHUP."""
    import asyncio
    import os
    import signal

    from pi0.cli.show import print_line
    from pi0.serve.replicas import Replicas
    from pi0.serve.server import PolicyServer

    host, port, *_ = sock.getsockname()
    robot = policy.policy.robot if isinstance(policy, Replicas) else policy.robot
    scheme = "wss" if settings.tls else "ws"
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def ready(seconds: float) -> None:
        print_line(
            f"serving robot {robot.name} on {scheme}://{address}, live page "
            f"http{scheme[2:]}://{address}/ (the first chunk took {seconds:.2f} s)"
        )

    async def serve_until_signal() -> None:
        stop = asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(SECOND_SIGNAL)
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            loop.add_signal_handler(signal.SIGHUP, stop.set)  # a terminal sends it twice
        await PolicyServer(policy, settings).serve(sock, stop, ready)

    asyncio.run(serve_until_signal())


def _log_to_stderr() -> None:
    """The server's log, with times."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("pi0.serve")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
