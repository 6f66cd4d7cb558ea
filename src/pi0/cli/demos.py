"""`pi0 demos`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def demos(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the dataset.", show_default=False)
    ],
    episodes: Annotated[int, typer.Option(min=1, help="Demonstrations in all.")] = 100,
    env: Annotated[
        str, typer.Option(metavar="ID", help="Gymnasium environment.")
    ] = "pi0/Tabletop-v0",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Tasks in turn, one may come twice; default: the environment's.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first episode.")] = 0,
    image_size: Annotated[int, typer.Option(min=1, help="Pixels along a side.")] = 112,
    disturb: Annotated[
        float, typer.Option(min=0, max=1, help="Share of episodes whose moves are disturbed.")
    ] = 0.75,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; default: one for each core.", show_default=False),
    ] = None,
) -> None:
    """Record demonstrations of a scripted expert as a LeRobotDataset v3 folder.

    Started again with the same options, a stopped run goes on. The same seed gives the same
    episodes with any number of workers.

    **Examples**

        pi0 demos --episodes 300 --out demos
        pi0 demos --tasks lift,put,push,push --episodes 4000 --out demos --workers 8
    """
    from pi0.checkpoint.outputs import expand_user
    from pi0.cli.options import parse_names
    from pi0.cli.show import print_line, step_progress
    from pi0.errors import ConfigError
    from pi0.sim import ENV_ID

    if env != ENV_ID:
        raise ConfigError(f"env: expected {ENV_ID}, which has experts, found {env!r}.")
    from pi0.data.read import Dataset
    from pi0.sim.demos import Disturbance
    from pi0.sim.record import Plan, record
    from pi0.sim.tasks import VERBS

    names = VERBS if tasks is None else parse_names(tasks)
    plan = Plan(episodes, seed, names, image_size, Disturbance(episodes=disturb))
    out = expand_user(out)
    with step_progress(f"recording {out.name}", episodes) as advance:
        record(plan, out, workers or os.cpu_count() or 1, advance)
    dataset = Dataset.open(out)
    print_line(f"{out}: {dataset.num_episodes} episodes, {dataset.num_frames} frames")
