"""`pi0 eval`: a policy in a Gymnasium environment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi0.cli import options

if TYPE_CHECKING:
    from pi0.eval import CheckpointPolicy, EvalPlan, Results, ServedPolicy, Summary


@options.with_policy
def evaluate(
    wishes: options.PolicyOptions,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CKPT]",
            help="Checkpoint, as for the other commands; not with --server.",
            show_default=False,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="ws://HOST:PORT",
            help="Evaluate the policy of a `pi0 serve`, by its protocol; each worker is a robot.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The server's key.", show_default=False),
    ] = None,
    env: Annotated[
        str,
        typer.Option(
            metavar="ID",
            help="Gymnasium environment; PACKAGE:ID imports the package that registers it.",
        ),
    ] = "pi0/Tabletop-v0",
    env_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Argument of the environment, such as obs_type=pixels_agent_pos; may be repeated.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Tasks of the environment; default: all that it declares.",
            show_default=False,
        ),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of each task.")] = 100,
    seed_start: Annotated[
        int, typer.Option(min=0, help="Seed of each task's first episode; the others follow.")
    ] = 9_000_000,
    robot: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="The robot whose table has the observations' keys; default: what the environment "
            "declares, else the checkpoint's.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The sentence of every episode; default: the environment's.", show_default=False
        ),
    ] = None,
    execute: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Actions of a chunk that are executed before the next; default: what "
            "config.json says, else all.",
            show_default=False,
        ),
    ] = None,
    steps: options.PolicySteps = None,
    sampler: options.Sampler = "euler",
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest episode, in steps; default: the environment's.", show_default=False
        ),
    ] = None,
    on_limit: Annotated[
        str,
        typer.Option(
            help="Actions beyond the robot's limits or the environment's action space: error, "
            "clamp or warn."
        ),
    ] = "clamp",
    prompt_swap: Annotated[
        bool,
        typer.Option(
            "--prompt-swap", help="Another sentence for the same scene, by which success counts."
        ),
    ] = False,
    blank_cameras: Annotated[
        bool, typer.Option("--blank-cameras", help="All images are black.")
    ] = False,
    perturb: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SIGMA",
            help="Gaussian noise on the actions, in standard deviations of the training data's.",
        ),
    ] = 0.0,
    latency: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="MS",
            help="From an observation to its chunk, by the environment's clock; the robot goes on "
            "with the last chunk meanwhile.",
        ),
    ] = 0.0,
    real_time: options.RealTime = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a policy.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    video: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write films and a contact sheet there.", show_default=False
        ),
    ] = None,
    video_episodes: Annotated[
        int | None,
        typer.Option(min=1, help="Film the first N episodes of each task.", show_default="all"),
    ] = None,
    video_format: Annotated[str, typer.Option(help="mp4 or gif.")] = "mp4",
    out: Annotated[
        Path | None,
        typer.Option(metavar="OUT.json", help="Write everything as JSON.", show_default=False),
    ] = None,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    engine: options.EngineOrAuto = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Run a policy in closed loop and count its successes.

    Episode i of each task has seed --seed-start + i, which alone decides scene and noise: the same
    command gives the same episodes with any number of workers. What the numbers mean:
    docs/evaluation.md.

    **Examples**

        pi0 eval tabletop --episodes 100 --workers 2 \\
            --out results.json
        pi0 eval tabletop --tasks lift --prompt-swap
        pi0 eval --server ws://127.0.0.1:8000 --workers 4 \\
            --latency 300 --real-time identity
        pi0 eval my_aloha --env gym_aloha:gym_aloha/AlohaInsertion-v0 \\
            --env-arg obs_type=pixels_agent_pos \\
            --robot aloha_gym.toml --prompt "insert the peg" --video films
    """
    from pi0.checkpoint.outputs import expand_user, require_writable
    from pi0.errors import ConfigError
    from pi0.eval import CheckpointPolicy, EnvOptions, EvalPlan, FilmOptions, ServedPolicy
    from pi0.policy import PolicyOptions, RealTimeChunking
    from pi0.serve.binding import read_api_key

    if api_key_file is not None and server is None:
        raise ConfigError("--api-key-file: expected --server beside it, found none.")
    if video is None and (video_episodes, video_format) != (None, "mp4"):
        raise ConfigError(
            "--video-episodes, --video-format: expected --video DIR beside them, found none."
        )
    require_writable(out, reads=(checkpoint, base, robot))
    film = video and FilmOptions(expand_user(video), video_format, video_episodes)
    plan = EvalPlan(
        EnvOptions(env, max_steps, prompt, prompt_swap, blank_cameras, _arguments(env_arg or [])),
        options.parse_names(tasks) if tasks is not None else None,
        episodes,
        seed_start,
        execute,
        perturb,
        workers,
        threads,
        film or None,
        latency,
    )
    if server:
        given = replace(wishes, robot=robot), engine, sampler
        ours = (checkpoint, steps, horizon, max_tokens, base, device, dtype)
        if given != (PolicyOptions(), "auto", "euler") or any(value is not None for value in ours):
            raise ConfigError(
                "--server: expected alone, found a checkpoint or options of a policy in this "
                "process, too. Leave them out: the server's policy is as it was started."
            )
        key = read_api_key(expand_user(api_key_file)) if api_key_file else None
        served = ServedPolicy(server, on_limit, real_time, key)
        _run(served, _resolved_plan(served, plan), out, as_json)
        return
    if checkpoint is None:
        raise ConfigError("eval: expected a checkpoint or --server, found neither.")
    policy = CheckpointPolicy(
        checkpoint,
        replace(wishes, robot=robot),
        engine,
        steps,
        on_limit,
        horizon,
        max_tokens,
        base,
        RealTimeChunking(jacobian=real_time) if real_time else None,
        sampler=sampler,
    )
    _run(*_resolved(policy, plan, dtype, device), out, as_json)


def _arguments(words: list[str]) -> dict[str, Any]:
    """What `gymnasium.make` gets; values are JSON (numbers, true), else text."""
    from pi0.errors import ConfigError

    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise ConfigError(f"--env-arg: expected NAME=VALUE, found {word!r}.")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _resolved(
    policy: CheckpointPolicy, plan: EvalPlan, dtype: str | None, device: str | None
) -> tuple[CheckpointPolicy, EvalPlan]:
    """Both with robot, engine and tasks named; what does not fit is said before weights load."""
    from contextlib import closing

    from pi0.checkpoint.load import open_checkpoint
    from pi0.engines.memory import require_memory
    from pi0.eval.environment import Environment
    from pi0.findings import enforce
    from pi0.policy import choose_engine, prepare

    opened = open_checkpoint(policy.checkpoint, policy.horizon, policy.max_tokens, policy.base)
    with closing(Environment(plan.env)) as environment:
        environment.require_tasks(plan.tasks or (), plan.seed_start)
        plan = replace(plan, tasks=plan.tasks or environment.tasks or None)
        options = replace(policy.options, robot=policy.options.robot or environment.robot)
        setup = prepare(opened, options)
        # Warnings are the workers', who make the same policy.
        enforce(finding for finding in setup.findings if finding.severity == "error")
        assert setup.pipeline is not None
        environment.require_fit(setup.pipeline)
    size = options.image_size
    spec = choose_engine(policy.engine, opened.config, dtype, device, size)
    cameras, tokens = len(setup.pipeline.robot.cameras), setup.pipeline.prompt.max_tokens
    require_memory(opened, spec, cameras, tokens, size)
    return replace(policy, options=options, engine=spec.label), plan


def _resolved_plan(policy: ServedPolicy, plan: EvalPlan) -> EvalPlan:
    """The plan with its tasks named; what does not fit is said before the work."""
    from contextlib import closing

    from pi0.eval.environment import Environment
    from pi0.eval.rollout import Runner
    from pi0.serve import require_packages

    require_packages()
    with closing(Environment(plan.env)) as environment, policy() as connected:
        environment.require_tasks(plan.tasks or (), plan.seed_start)
        Runner(connected, environment, plan)
        return replace(plan, tasks=plan.tasks or environment.tasks or None)


def _run(
    policy: CheckpointPolicy | ServedPolicy, plan: EvalPlan, out: Path | None, as_json: bool
) -> None:
    from pi0.checkpoint.outputs import replacing
    from pi0.cli.show import print_json, print_line, step_progress, to_json
    from pi0.eval import Episode
    from pi0.eval import evaluate as run

    successes = 0
    total = plan.episodes * len(plan.tasks or [None])
    with step_progress("evaluating", total) as advance:

        def on_episode(episode: Episode) -> None:
            nonlocal successes
            successes += episode.success
            advance(text=f"evaluating, successes: {successes}")

        results = run(policy, plan, on_episode)
    data = results.to_data()
    # Printed first: a file that cannot be written must not take the numbers with it.
    if as_json:
        print_json(data)
    else:
        _print(results)
    if out:
        with replacing(out) as temporary:
            temporary.write_text(to_json(data) + "\n", encoding="utf-8")
    if not as_json:
        for path in (out, plan.film and plan.film.folder):
            if path:
                print_line(f"wrote {path}")


def _print(results: Results) -> None:
    from pi0.cli.show import count, print_line, table

    run, latency = results.run, results.latency
    tasks = {**results.tasks, **({"all": results.total} if len(results.tasks) > 1 else {})}
    columns = ["task", "success", "rate", "95 % interval", "wrong", "steps", "in successes"]
    changed = [
        *(["prompt swapped"] if run["prompt_swap"] else []),
        *(["cameras blank"] if run["blank_cameras"] else []),
        *([f"actions perturbed by {run['perturb']:g} σ"] if run["perturb"] else []),
    ]
    title = ", ".join([f"{run['checkpoint']} in {run['env']}", *changed])
    table(title, columns, [_row(name, summary) for name, summary in tasks.items()])
    engine, last = run["engine"], run["seed_start"] + run["episodes_per_task"] - 1
    print_line(
        f"robot {run['robot']}, {run['steps']} denoising steps ({run['sampler']}), "
        f"{run['execute']} actions executed of each chunk, seeds {run['seed_start']} to {last} of "
        "each task" + (f", rendered by MuJoCo with {run['mujoco_gl']}" if run["mujoco_gl"] else "")
    )
    print_line(
        f"engine {engine['name']}:{engine['precision']}: {latency['median_ms']:.1f} ms per "
        f"inference (median), {latency['p99_ms']:.1f} ms (99th percentile), "
        f"{count(int(latency['inferences']), 'inference')}"
    )
    jump, guided = results.border_jump, (run["real_time"] or {}).get("jacobian", "no")
    if jump["borders"]:
        print_line(
            f"{guided} real-time chunking, {run['injected_latency']:g} ms of added latency "
            f"({count(run['delay'], 'tick')})"
        )
        print_line(
            f"actions jump by {jump['rms']:.4g} at chunk boundaries (root mean square of "
            f"{jump['borders']}), by {jump['max']:.4g} at most, in the robot's units"
        )
    if results.total.outside:
        print_line(
            f"{count(results.total.outside, 'action value')} beyond the action space "
            f"(--on-limit {run['on_limit']})"
        )


def _row(name: str, summary: Summary) -> list[str]:
    low, high = summary.interval
    return [
        name,
        f"{summary.success}/{summary.episodes}",
        f"{summary.rate:.1%}",
        f"{low:.1%} to {high:.1%}",
        "—" if summary.wrong_rate is None else f"{summary.wrong_rate:.1%}",
        f"{summary.mean_steps:.1f}",
        "—" if summary.mean_success_steps is None else f"{summary.mean_success_steps:.1f}",
    ]
