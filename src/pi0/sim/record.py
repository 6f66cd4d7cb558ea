"""Recording a dataset of demonstrations: shards of episodes, by several processes.

What a shard holds follows from its number and the seed alone, not from which process records it or
when, so that a stopped run goes on where it was and ends with the same dataset.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pi0.data.lock import locked
from pi0.data.schema import Recording, data_path
from pi0.data.write import begin, finish, remove_shard, shard_episodes, write_shard
from pi0.errors import ConfigError, Pi0Error
from pi0.sim import MAX_STEPS
from pi0.sim.demos import FIRST_RESERVED_SEED, Disturbance, record_episode, schema
from pi0.sim.env import IMAGE_SIZE, TabletopEnv
from pi0.sim.tasks import VERBS, check_task
from pi0.workers import run_here, run_in_processes

SHARD_EPISODES = 20
SEEDS_EACH = 2  # for each episode of a shard; those on which the expert fails are left out


@dataclass(frozen=True)
class Plan:
    """What to record.

    Attributes:
        episodes: in all.
        seed: of the first shard's first episode.
        tasks: taken in turn.
        image_size: pixels along a side.
        disturbance: see there.
    """

    episodes: int
    seed: int = 0
    tasks: tuple[str, ...] = VERBS
    image_size: int = IMAGE_SIZE
    disturbance: Disturbance = field(default_factory=Disturbance)

    def __post_init__(self) -> None:
        for task in self.tasks:
            check_task(task)
        if self.episodes < 1 or not self.tasks:
            raise ConfigError("demonstrations: expected at least one episode and task, found none.")
        last = self.seed + self.shards * SHARD_EPISODES * SEEDS_EACH
        if self.seed < 0 or last > FIRST_RESERVED_SEED:
            raise ConfigError(
                f"seed: expected 0 to {FIRST_RESERVED_SEED - 1} for all tries, since later ones "
                f"are kept for evaluation, found {self.seed} to {last - 1}."
            )

    @property
    def shards(self) -> int:
        return -(-self.episodes // SHARD_EPISODES)

    def episodes_of(self, shard: int) -> range:
        """The dataset's episodes that a shard holds."""
        first = shard * SHARD_EPISODES
        return range(first, min(first + SHARD_EPISODES, self.episodes))


def record(plan: Plan, out: Path, workers: int, advance: Callable[[int], None]) -> None:
    """Records what is not there yet, and writes the dataset's meta files.

    Args:
        workers: processes.
        advance: called with episodes done, those that were there first.

    Raises:
        Pi0Error: a shard could not be recorded or written, there are more episodes already, or
            another process records into the folder.
    """
    form = schema(plan.image_size)  # which refuses some sizes, as the environment does
    TabletopEnv(plan.image_size).close()
    with locked(out):
        _record(plan, out, workers, advance)
        finish(out, form)


def _record(plan: Plan, out: Path, workers: int, advance: Callable[[int], None]) -> None:
    found = [shard_episodes(out, shard) for shard in range(plan.shards)]
    begin(out, {name: value for name, value in asdict(plan).items() if name != "episodes"})
    _require_no_more(plan, out)
    missing = []
    for shard in range(plan.shards):
        if found[shard] < len(plan.episodes_of(shard)):
            remove_shard(out, shard)  # the last one of a smaller dataset, or without a video
            missing.append(shard)
    advance(plan.episodes - sum(len(plan.episodes_of(shard)) for shard in missing))
    make = functools.partial(_recorder, plan, out)
    if workers == 1:
        run_here(make, missing, advance)
    else:
        run_in_processes(make, missing, workers, advance)


def _require_no_more(plan: Plan, out: Path) -> None:
    last = plan.shards - 1
    if (
        shard_episodes(out, last) > len(plan.episodes_of(last))
        or data_path(out, last + 1).is_file()
    ):
        raise ConfigError(
            f"{out}: expected a dataset to be continued, with no more episodes than "
            f"{plan.episodes}, found more. Ask for as many, or name another folder."
        )


@contextlib.contextmanager
def _recorder(plan: Plan, out: Path) -> Iterator[Callable[[int], int]]:
    """Makes an environment, and yields what records a shard with it and says how many episodes
    that were."""
    with contextlib.closing(TabletopEnv(plan.image_size)) as env:
        yield functools.partial(_record_shard, env, plan, out)


def _record_shard(env: TabletopEnv, plan: Plan, out: Path, shard: int) -> int:
    episodes = plan.episodes_of(shard)
    first_seed = plan.seed + shard * SHARD_EPISODES * SEEDS_EACH
    seeds = iter(range(first_seed, first_seed + SHARD_EPISODES * SEEDS_EACH))
    recordings: list[Recording] = []
    for episode in episodes:
        task = plan.tasks[episode % len(plan.tasks)]
        recording = None
        while recording is None:
            seed = next(seeds, None)
            if seed is None:
                raise Pi0Error(
                    f"demonstrations: expected the expert to succeed in {len(episodes)} of "
                    f"{SHARD_EPISODES * SEEDS_EACH} episodes from seed {first_seed}, found "
                    f"{len(recordings)}. Disturb it less."
                )
            recording = record_episode(env, seed, task, plan.disturbance, MAX_STEPS)
        recordings.append(recording)
    write_shard(out, shard, episodes.start, recordings, schema(plan.image_size))
    return len(recordings)
