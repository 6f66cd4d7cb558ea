"""The policy `pi0rt`: what LeRobot's processors made of an observation in, actions out.

Everything around the model is LeRobot's, as for its own π0. The model is computed by an engine of
pi0, in whose memory the weights are: as a torch module the policy has no parameters.
"""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import (
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from torch import Tensor
from torch.nn import functional as F

from lerobot_policy_pi0rt.configuration_pi0rt import NO_TRAINING, Pi0rtConfig
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.engines.base import Engine, make_engine
from pi0.engines.guidance import Guidance
from pi0.errors import CheckpointError, ConfigError, ObservationError
from pi0.inputs import MAX_PIXEL, ModelInputs, check_noise, expect_moderate
from pi0.policy import RealTimeChunking, choose_engine
from pi0.policy.images import SLACK, letterbox_lerobot
from pi0.policy.realtime import Inpainting

SAVED = "checkpoint"  # folder of the original in a folder that `save_pretrained` wrote
SCHEDULES = {"EXP": "exponential", "LINEAR": "linear", "ONES": "ones", "ZEROS": "zeros"}


class Pi0rtPolicy(PreTrainedPolicy):
    """A π0 or π0.5 of LeRobot that pi0 computes.

    Attributes:
        engine: computes.
        checkpoint: where its weights come from.
    """

    config_class = Pi0rtConfig
    name = "pi0rt"

    def __init__(self, config: Pi0rtConfig, checkpoint: Checkpoint | None = None, **_: Any) -> None:
        """Loads the weights.

        Args:
            config: completed in place from the checkpoint.
            checkpoint: None: the one at `config.pretrained_path`.

        Raises:
            Pi0Error: there is no checkpoint, or it cannot be used.
        """
        super().__init__(config)
        if checkpoint is None:
            if config.pretrained_path is None:
                raise ConfigError(
                    "policy pi0rt: expected a checkpoint, found none. Name one: "
                    "--policy.pretrained_path=CKPT."
                )
            checkpoint = _open(config.pretrained_path, config.pretrained_revision)
        sizes = checkpoint.config
        config.model = "pi05" if sizes.adaptive_norm else "pi0"
        config.complete(
            checkpoint.settings,
            {
                "chunk_size": sizes.horizon,
                "n_action_steps": sizes.horizon,
                "num_inference_steps": 10,
                "max_state_dim": sizes.state_dim,
                "max_action_dim": sizes.action_dim,
                "tokenizer_max_length": sizes.max_tokens,
                "use_relative_actions": False,
                "relative_exclude_joints": ["gripper"],
            },
        )
        self.checkpoint = checkpoint
        spec = choose_engine(config.engine, sizes, None, None, None)
        self.engine: Engine = make_engine(spec, checkpoint, weight_cache=config.weight_cache)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Pi0rtPolicy:
        """The policy of a checkpoint: a folder of LeRobot's π0 or π0.5 as it is, one that
        `save_pretrained` wrote, or the name of either on the hub.

        Args:
            config: None: the folder's if `save_pretrained` wrote it, else the defaults.
            revision, cache_dir, local_files_only: for the hub.

        Raises:
            Pi0Error: it cannot be used.
        """
        hub = {"cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = _local(pretrained_name_or_path, revision, **hub)
        if config is None:
            ours = (folder / SAVED).is_dir()
            config = PreTrainedConfig.from_pretrained(folder) if ours else Pi0rtConfig()
        return cls(config, _open(folder, None)).eval()

    def _save_pretrained(
        self, save_directory: Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes this policy's config.json, and the checkpoint as it is beside it."""
        target, source = save_directory / SAVED, self.checkpoint.folder
        if target.exists():
            raise CheckpointError(
                f"{target}: expected a folder without a saved checkpoint, found one. Save into a "
                "new folder."
            )
        if save_directory.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(
                f"{save_directory}: expected a folder outside of the checkpoint {source}, which "
                "is copied, found one in it. Save into another folder."
            )
        self.config._save_pretrained(save_directory)
        shutil.copytree(source, target)

    def reset(self) -> None:
        """Forgets the actions that `select_action` has not handed out: a new episode begins."""
        self._queue: deque[Tensor] = deque()

    def supports_rtc(self) -> bool:
        return True

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """The next action [B, D]; a chunk is computed after every `n_action_steps` of them.

        Args:
            kwargs: see `predict_action_chunk`, for when a chunk is computed.

        Raises:
            ConfigError: real-time chunking is on, which needs whole chunks.
        """
        if self._rtc_enabled:
            raise ConfigError(
                "real-time chunking: expected predict_action_chunk, found select_action, which "
                "does not know what is executed meanwhile."
            )
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)
            self._queue.extend(chunk[:, : self.config.n_action_steps].transpose(0, 1))
        return self._queue.popleft()

    @torch.no_grad()
    @torch.compiler.disable  # nothing here for it to compile
    def predict_action_chunk(
        self,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        num_steps: int | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """A chunk [B, chunk_size, D] float32, normalised as in training, on the state's device.

        Args:
            batch: what the preprocessor made: images [B, 3, H, W] in [0, 1], the normalised state
                [B, D], tokens and their mask [B, L].
            noise: [B, chunk_size, max_action_dim]; None: from torch's generator on the CPU, so that
                a seed gives what LeRobot draws there.
            num_steps: of denoising; None: `num_inference_steps`.
            inference_delay, prev_chunk_left_over, execution_horizon: with `rtc_config`, see
                LeRobot's RTCProcessor: ticks until the chunk arrives; actions [n, D] or [1, n, D]
                that were not executed yet, normalised; how many of these count.

        Raises:
            ObservationError: something in the batch cannot be used.
            EngineError: the answer is not finite, or `rtc_jacobian` is beyond the engine.
        """
        inputs = self._inputs(batch)
        shape = inputs.batch_size, self.engine.config.horizon, self.engine.config.action_dim
        if noise is None:
            noise = torch.normal(0.0, 1.0, shape)
        noise = check_noise(self.engine.config, inputs.batch_size, noise.float().cpu())
        steps = self.config.num_inference_steps if num_steps is None else num_steps
        guidance = None
        if self._rtc_enabled and prev_chunk_left_over is not None:
            guidance = self._guidance(prev_chunk_left_over, inference_delay, execution_horizon)
        actions = self._sample(inputs, noise, steps, guidance)
        width = self.config.action_feature.shape[0]
        return actions[..., :width].to(batch[OBS_STATE].device)

    def forward(self, batch: dict[str, Tensor], **_: Any) -> tuple[Tensor, dict[str, Any]]:
        raise NotImplementedError(NO_TRAINING)

    def get_optim_params(self) -> dict[str, Any]:
        raise NotImplementedError(NO_TRAINING)

    @property
    def _rtc_enabled(self) -> bool:
        return self.config.rtc_config is not None and self.config.rtc_config.enabled

    def _inputs(self, batch: dict[str, Tensor]) -> ModelInputs:
        """The model's inputs. A camera that is not there is left out: same actions, less work."""
        model = self.engine.config
        present = [key for key in self.config.image_features if key in batch]
        if not present:
            raise ObservationError(
                f"images: expected at least one of {', '.join(self.config.image_features)}, found "
                f"{', '.join(map(str, batch)) or 'nothing'}. --rename_map gives a robot's cameras "
                "the policy's names."
            )
        normalized = self.config.normalization_mapping.get("VISUAL", NormalizationMode.IDENTITY)
        plain = normalized is NormalizationMode.IDENTITY
        images = torch.stack(
            [_pixels(key, batch[key], model.vision.image_size, plain) for key in present], 1
        )
        state = batch.get(OBS_STATE)
        if state is None or state.shape[-1] > model.state_dim:  # which `pad` would cut
            raise ObservationError(
                f"{OBS_STATE}: expected at most {model.state_dim} values, found "
                f"{'none' if state is None else f'shape {list(state.shape)}'}."
            )
        state = state.float().cpu()
        tokens = batch[OBS_LANGUAGE_TOKENS].cpu()
        return ModelInputs.validated(
            model,
            max_pixel=MAX_PIXEL if plain else torch.inf,
            images=images,
            image_mask=torch.ones(images.shape[:2], dtype=torch.bool),
            tokens=tokens.long(),
            token_mask=batch[OBS_LANGUAGE_ATTENTION_MASK].bool().cpu(),
            state=F.pad(state, (0, model.state_dim - state.shape[-1])),
        )

    def _guidance(
        self, previous: Tensor, delay: int | None, execution_horizon: int | None
    ) -> Guidance | None:
        """As LeRobot guides: all dimensions, those that the robot does not have to zero; not at all
        where none of the rest counts."""
        config, model = self.config.rtc_config, self.engine.config
        previous = previous.float().cpu()
        if previous.ndim == 3 and len(previous) == 1:
            previous = previous[0]
        if previous.ndim != 2 or previous.shape[-1] > model.action_dim:
            raise ObservationError(
                "prev_chunk_left_over: expected the actions of one robot [n, D], found shape "
                f"{list(previous.shape)}."
            )
        expect_moderate("prev_chunk_left_over", previous)
        counts = config.execution_horizon if execution_horizon is None else execution_horizon
        for name, value in (("inference_delay", delay), ("execution_horizon", counts)):
            if value is not None and (not value >= 0 or value % 1):
                raise ObservationError(
                    f"{name}: expected a number of ticks, 0 or more, found {value!r}."
                )
        if not counts:
            return None
        settings = RealTimeChunking(
            max_guidance=config.max_guidance_weight,
            schedule=SCHEDULES[config.prefix_attention_schedule.value],
            overlap=int(counts),
            jacobian=self.config.rtc_jacobian,
        )
        padded = F.pad(previous, (0, model.action_dim - previous.shape[-1]))[: model.horizon]
        return Inpainting(settings, padded, int(delay or 0), model.horizon)

    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, guidance: Guidance | None
    ) -> Tensor:
        if self.engine.capabilities.batch or inputs.batch_size == 1:
            return self.engine.sample(inputs, noise, steps, guidance=guidance)
        rows = [(inputs.row(i), noise[i : i + 1]) for i in range(inputs.batch_size)]
        return torch.cat([self.engine.sample(*row, steps, guidance=guidance) for row in rows])


def _pixels(key: str, image: Tensor, size: int, plain: bool) -> Tensor:
    """A camera's images [B, 3, size, size] in [-1, 1], resized as LeRobot's policies do it."""
    if image.ndim != 4 or 3 not in (image.shape[1], image.shape[-1]):
        raise ObservationError(
            f"image {key}: expected shape [B, 3, H, W] or [B, H, W, 3], found {list(image.shape)}."
        )
    if not image.is_floating_point():
        raise ObservationError(
            f"image {key}: expected floating-point pixels in [0, 1], found {image.dtype}. Divide "
            "8-bit values by 255."
        )
    pixels = (image if image.shape[1] == 3 else image.permute(0, 3, 1, 2)).float().cpu()
    low, high = pixels.aminmax()
    if plain and not (low >= -SLACK and high <= 1 + SLACK):  # false for NaN, too
        raise ObservationError(
            f"image {key}: expected floating-point pixels in [0, 1], found {low:.4g} to {high:.4g}."
        )
    return letterbox_lerobot(pixels.clamp(0, 1) if plain else pixels, size) * 2 - 1


def _local(name: str | Path, revision: str | None, **hub: Any) -> Path:
    """The folder of a checkpoint; one on the hub is downloaded, or found in its cache."""
    if Path(name).exists():
        return Path(name)
    return Path(snapshot_download(str(name), revision=revision, **hub))


def _open(name: str | Path, revision: str | None) -> Checkpoint:
    folder = _local(name, revision)
    return open_checkpoint(folder / SAVED if (folder / SAVED).is_dir() else folder)
