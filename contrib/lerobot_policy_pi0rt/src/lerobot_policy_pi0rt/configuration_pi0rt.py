"""What a user may say about the policy type `pi0rt`, and what the checkpoint says itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# These imports register LeRobot's own processor steps, which a checkpoint's files name.
import lerobot.policies.pi0.processor_pi0
import lerobot.policies.pi05.processor_pi05  # noqa: F401
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from pi0.errors import ConfigError

NO_TRAINING = (
    "policy pi0rt: expected inference, found training, which pi0's engines do not do. Train with "
    "--policy.type=pi0 or pi05, or with `pi0 train`; the result runs here."
)


@PreTrainedConfig.register_subclass("pi0rt")
@dataclass
class Pi0rtConfig(PreTrainedConfig):
    """The configuration of a π0 or π0.5 that pi0 computes.

    What is None is taken from the checkpoint's config.json when the policy is made (`complete`).

    Attributes:
        engine: ENGINE[:PRECISION][@DEVICE], as in cpu:int8; "auto": the fastest on this machine
            that is exact to float32.
        weight_cache: keep packed weights in a file beside the checkpoint, for the next start.
        rtc_jacobian: of real-time chunking; "identity" computes what LeRobot does, "exact" what the
            paper says (engine reference only).
        model: "pi0" or "pi05": whose processors belong to the checkpoint, which says it.
        chunk_size, n_action_steps, num_inference_steps, max_state_dim, max_action_dim,
            tokenizer_max_length, use_relative_actions, relative_exclude_joints,
            action_feature_names, rtc_config: as in LeRobot's PI0Config.
    """

    engine: str = "auto"
    weight_cache: bool = False
    rtc_jacobian: str = "identity"
    model: str | None = None
    chunk_size: int | None = None
    n_action_steps: int | None = None
    num_inference_steps: int | None = None
    max_state_dim: int | None = None
    max_action_dim: int | None = None
    tokenizer_max_length: int | None = None
    use_relative_actions: bool | None = None
    relative_exclude_joints: list[str] | None = None
    action_feature_names: list[str] | None = None
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=dict)
    rtc_config: RTCConfig | None = None

    def complete(self, settings: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
        """Fills in what nobody said: from a checkpoint's config.json, else from its weights.

        Cameras and state are always the checkpoint's. Those of an environment, which LeRobot puts
        here first, may have other names and another order.

        Args:
            settings: config.json of a checkpoint of LeRobot.
            sizes: values for fields that config.json leaves open.

        Raises:
            ConfigError: it names no cameras or no actions, or more action steps than a chunk has.
        """
        declared = {**sizes, **{k: v for k, v in settings.items() if v is not None}}
        for name in FROM_CHECKPOINT:
            if getattr(self, name) is None:
                setattr(self, name, declared.get(name))
        inputs, outputs = (_features(settings, f"{way}_features") for way in ("input", "output"))
        self.input_features = inputs
        self.output_features = self.output_features or outputs
        if not self.normalization_mapping:
            self.normalization_mapping = {
                kind: NormalizationMode(mode)
                for kind, mode in settings.get("normalization_mapping", {}).items()
            }
        if not self.image_features or self.action_feature is None:
            raise ConfigError(
                "config.json: expected input_features of type VISUAL and an output feature "
                "`action`, as LeRobot writes them, found "
                f"{', '.join([*inputs, *self.output_features]) or 'none'}. Convert the checkpoint: "
                "pi0 convert CKPT OUT --to lerobot."
            )
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ConfigError(
                f"n_action_steps: expected 1 to {self.chunk_size}, which is the chunk, found "
                f"{self.n_action_steps}."
            )

    def validate_features(self) -> None:
        """Nothing to add: the features are the checkpoint's."""

    def get_optimizer_preset(self) -> Any:
        raise NotImplementedError(NO_TRAINING)

    def get_scheduler_preset(self) -> Any:
        raise NotImplementedError(NO_TRAINING)

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """Of a chunk; empty before the checkpoint was read."""
        return list(range(self.chunk_size or 0))

    @property
    def reward_delta_indices(self) -> None:
        return None


FROM_CHECKPOINT = (
    *("chunk_size", "n_action_steps", "num_inference_steps", "max_state_dim", "max_action_dim"),
    *("tokenizer_max_length", "use_relative_actions"),
    *("relative_exclude_joints", "action_feature_names"),
)


def _features(settings: Mapping[str, Any], name: str) -> dict[str, PolicyFeature]:
    return {
        key: PolicyFeature(FeatureType(feature["type"]), tuple(feature["shape"]))
        for key, feature in (settings.get(name) or {}).items()
    }
