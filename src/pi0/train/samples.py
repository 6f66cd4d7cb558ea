"""Batches of training samples from a dataset's frames, through the policy's own pipeline.

Everything that is random in a batch (which frames, noise, time, changes of the images) follows from
the seed and the number of the step, for the whole batch of all processes: it depends neither on how
many processes share it nor on where a run was interrupted.

A chunk that would go beyond its episode repeats the last action, as in openpi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pi0.data.schema import ACTION, STATE
from pi0.data.statistics import RunningStatistics
from pi0.errors import ObservationError, Pi0Error
from pi0.inputs import ModelInputs
from pi0.policy.normalize import Floats, Statistics, identity
from pi0.policy.pipeline import Pipeline
from pi0.train.augment import NUMBERS, Augmentation
from pi0.train.loss import Batch, time_of_uniform

if TYPE_CHECKING:
    from pi0.data import Dataset, FrameStore

BLOCK = 8192  # frames that statistics are taken of at once
DRAWS, ORDER = 0, 1  # streams of random numbers under one seed
Index = NDArray[np.int64]


class Chunks:
    """The states and the chunks of actions of a dataset, in the robot's units."""

    def __init__(self, dataset: Dataset, horizon: int) -> None:
        self.states, self.actions = (
            dataset.column(key).astype(np.float64).reshape(dataset.num_frames, -1)
            for key in (STATE, ACTION)
        )
        self.offsets = np.arange(horizon)
        lengths = np.diff(dataset.episode_starts)
        self.last = np.repeat(dataset.episode_starts[1:] - 1, lengths)  # frame of each episode

    def __len__(self) -> int:
        return len(self.states)

    def at(self, frames: Index) -> tuple[Floats, Floats]:
        """States [B, D] and the actions [B, H, A] from there on."""
        rows = np.minimum(frames[:, None] + self.offsets, self.last[frames, None])
        return self.states[frames], self.actions[rows]


def measure_statistics(chunks: Chunks, pipeline: Pipeline) -> dict[str, Statistics]:
    """Statistics of states and of chunks of actions in the model's convention, relative where the
    robot's table says so: what training and inference normalise by.

    Args:
        pipeline: its statistics are not used.
    """
    actions_as_they_are = identity("actions", chunks.actions.shape[1])
    plain = replace(
        pipeline,
        state_stats=identity("state", chunks.states.shape[1]),
        action_stats=actions_as_they_are,
        target_stats=actions_as_they_are,
    )
    state, actions = RunningStatistics(), RunningStatistics()
    for start in range(0, len(chunks), BLOCK):
        frames = np.arange(start, min(start + BLOCK, len(chunks)))
        states, targets = chunks.at(frames)
        state.update(plain.encode_state(states))
        actions.update(plain.encode_actions(targets, states)[..., : targets.shape[-1]])
    return {"state": state.result(), "actions": actions.result()}


@dataclass(frozen=True)
class SampleOptions:
    """What a batch is made of.

    Attributes:
        batch_size: samples of all processes together.
        draws: of noise and time for each sample.
        augmentation: None: images as the policy sees them.
    """

    batch_size: int
    draws: int = 1
    seed: int = 0
    augmentation: Augmentation | None = None


class Samples:
    """Training samples of a dataset.

    Args:
        pipeline: the policy's, with its statistics.
        frames: pictures by the robot's camera key, in the order of its table, at the model's size.
        columns: that auxiliary heads predict, [N, D] float32, normalised.

    Raises:
        Pi0Error: a task is longer than the model's prompts.
    """

    def __init__(
        self,
        dataset: Dataset,
        chunks: Chunks,
        pipeline: Pipeline,
        frames: Mapping[str, FrameStore],
        columns: Mapping[str, NDArray[np.float32]],
        options: SampleOptions,
    ) -> None:
        self.pipeline, self.chunks, self.options = pipeline, chunks, options
        self.frames = dict(frames)
        self.columns = {name: torch.from_numpy(values) for name, values in columns.items()}
        cameras = {camera.key: camera for camera in pipeline.robot.cameras}
        self.on_wrist = [
            any("wrist" in name for name in (key, *cameras[key].names)) for key in self.frames
        ]
        self.states = pipeline.encode_state(chunks.states)
        self.prompts = _Prompts(dataset.tasks, self.states, pipeline)
        self._order = lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        return len(self.chunks)

    def batch(self, step: int, share: slice, device: torch.device) -> Batch:
        """A share of the batch of a step."""
        options, config = self.options, self.pipeline.config
        size, draws = options.batch_size, options.draws
        random = np.random.default_rng((options.seed, DRAWS, step))
        shape = (size, draws, config.horizon, config.action_dim)
        noise = random.standard_normal(shape, dtype=np.float32)[share]
        time = time_of_uniform(torch.from_numpy(random.random((size, draws), dtype=np.float32)))
        changes = random.random((size, len(self.frames), NUMBERS), dtype=np.float32)[share]
        frames = self.frames_of(step)[share]
        states, targets = self.chunks.at(frames)
        tokens, token_mask = self.prompts.at(frames)
        actions = self.pipeline.encode_actions(targets, states).astype(np.float32)
        images = self._images(frames, torch.from_numpy(changes).to(device))
        inputs = ModelInputs(
            images=images,
            image_mask=torch.ones(images.shape[:2], dtype=torch.bool, device=device),
            tokens=tokens.to(device),
            token_mask=token_mask.to(device),
            state=self._padded_states(frames).to(device),
        )
        rows = torch.from_numpy(frames)
        return Batch(
            inputs,
            torch.from_numpy(actions).to(device),
            torch.from_numpy(noise).to(device),
            time[share].to(device),
            {name: values[rows].to(device) for name, values in self.columns.items()},
        )

    def frames_of(self, step: int) -> Index:
        """The frames of a step's batch: all frames in a random order, epoch after epoch."""
        places = np.arange(step * self.options.batch_size, (step + 1) * self.options.batch_size)
        epochs, inside = np.divmod(places, len(self))
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._order(int(epoch))[inside[here]]
        return found

    def _epoch(self, epoch: int) -> Index:
        random = np.random.default_rng((self.options.seed, ORDER, epoch))
        return random.permutation(len(self))

    def _padded_states(self, frames: Index) -> Tensor:
        states = self.states[frames]
        padded = np.zeros((len(frames), self.pipeline.config.state_dim), np.float32)
        padded[:, : states.shape[1]] = states
        return torch.from_numpy(padded)

    def _images(self, frames: Index, changes: Tensor) -> Tensor:
        """[B, V, 3, S, S] float32 in [-1, 1]."""
        views = []
        for i, (store, wrist) in enumerate(zip(self.frames.values(), self.on_wrist, strict=True)):
            pixels = torch.from_numpy(np.ascontiguousarray(store[frames])).to(changes.device)
            images = pixels.permute(0, 3, 1, 2).float() / 255
            if self.options.augmentation:
                images = self.options.augmentation(images, changes[:, i], wrist)
            views.append(images * 2 - 1)
        return torch.stack(views, dim=1)


class _Prompts:
    """The tokens of every frame's prompt, each distinct one made once.

    Padding that no prompt of the dataset needs is left out: it has no effect on actions.
    """

    def __init__(self, tasks: NDArray[np.object_], states: Floats, pipeline: Pipeline) -> None:
        names, index = np.unique(tasks.astype(str), return_inverse=True)
        if pipeline.prompt.state:  # which differs from frame to frame
            made = [
                _tokenize(pipeline, str(task), state)
                for task, state in zip(tasks, states, strict=True)
            ]
            index = np.arange(len(made))
        else:
            made = [_tokenize(pipeline, str(task), None) for task in names]
        self.index = index
        longest = max(int(mask.sum()) for _, mask in made)
        side = slice(-longest, None) if pipeline.prompt.padding_side == "left" else slice(longest)
        self.tokens = torch.stack([tokens[side] for tokens, _ in made])
        self.mask = torch.stack([mask[side] for _, mask in made])

    def at(self, frames: Index) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] int64 and which of them are valid [B, L] bool."""
        rows = torch.from_numpy(self.index[frames])
        return self.tokens[rows], self.mask[rows]


def _tokenize(pipeline: Pipeline, task: str, state: Floats | None) -> tuple[Tensor, Tensor]:
    try:
        return pipeline.tokenizer.tokenize(task, pipeline.prompt, state)
    except ObservationError as error:
        raise Pi0Error(
            f"task {task!r}: {error} Or give the model room for it with --max-tokens."
        ) from error


def points_of(dataset: Dataset, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Columns [N, 2·points] float32 of points in a picture, as they are.

    Raises:
        Pi0Error: a column that holds no pairs.
    """
    out = {}
    for name in names:
        values = dataset.column(name).astype(np.float32)
        out[name] = values.reshape(len(values), -1)
        if out[name].shape[1] % 2:
            raise Pi0Error(
                f"--point {name}: expected pairs (u, v) of points in the first camera's picture, "
                f"found {out[name].shape[1]} values."
            )
    return out


def normalised_columns(dataset: Dataset, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Columns [N, D] float32 of mean 0 and deviation 1 (those without spread: 0)."""
    out = {}
    for name in names:
        values = dataset.column(name).astype(np.float64)
        values = values.reshape(len(values), -1)
        spread = values.std(axis=0)
        scaled = (values - values.mean(axis=0)) / np.where(spread < 1e-9, 1, spread)
        out[name] = scaled.astype(np.float32)
    return out
