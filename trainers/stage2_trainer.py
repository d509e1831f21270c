# SPDX-License-Identifier: Apache-2.0
"""Stage 2: language model, projector and regression head learn together, from text and numbers."""

import copy
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from geode.configuration.configuration_geode import GeodeConfig
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.base_trainer import GeodeTrainer
from geode.trainers.drm_files import DRM_FILE, drm_origin, load_drm, save_drm
from geode.trainers.stage2_config import GeodeStage2Config


# By its place: plain names such as `q_proj` are also those of vision tower and rationale module.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
FAST_PARTS = ("drh", "token_adapter")


class GeodeStage2Trainer(GeodeTrainer):
    """
    Trains 2D projector, language model, regression head, embeddings of new tokens and, if there is one, the feature injection.

    Source: paper, sections 2.2 and 2.3, Eq. 7: cross-entropy of the text, control tokens included, and Eq. 6 at control tokens,
    weighted by `drh_config.loss_weight`. The rationale module is frozen and in evaluation mode.

    Args:
        model ([`GeodeForConditionalGeneration`], a PEFT model of one, or `str`):
            The model.
        args ([`GeodeStage2Config`], *optional*):
            The configuration.
        peft_config (`LoraConfig`, *optional*):
            Trains an adapter instead of the language model, see [`complete_peft_config`]. Projector, regression head and rows of
            control tokens train as they do without, and are saved with the adapter; so is the rationale module, if
            `drm_path` names one. [`load_adapter`] puts all of it back.
        **kwargs:
            See [`GeodeTrainer`].

    Example:
        ```python
        args = GeodeStage2Config("geode", mixture="stage2", data_root="DATA", drm_path="drm")
        GeodeStage2Trainer("geode-1.5b-aligned", args).train()
        ```
    """

    _tag_names = ["geode", "stage-2"]  # noqa: RUF012
    _name = "Stage 2"
    args: GeodeStage2Config
    config_class = GeodeStage2Config

    def __init__(
        self, model, args: GeodeStage2Config | None = None, *, peft_config: LoraConfig | None = None, **kwargs
    ):
        self._peft_config = peft_config
        self._origin: dict | None = None
        super().__init__(model, args, **kwargs)

    @staticmethod
    def trained_parts(model: GeodeForConditionalGeneration) -> list[str]:
        """Return the names of the parts that train."""
        parts = ["model.multi_modal_projector", "model.language_model", "lm_head", "drh"]
        return parts + (["model.feature_injection"] if model.model.feature_injection is not None else [])

    def prepare_model(self, model: PreTrainedModel, args: GeodeStage2Config) -> PreTrainedModel:
        """Load the rationale module, freeze what does not train, or put the adapter on."""
        if args.drm_path is not None:
            load_drm(self.geode_model, args.drm_path)
            self._origin = drm_origin(self.geode_model)
        if self._peft_config is None:
            return super().prepare_model(model, args)
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model has an adapter already, and `peft_config` asks for one. Leave one of them out."
            )
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        return get_peft_model(model, complete_peft_config(self._peft_config, model))

    @classmethod
    def for_dry_run(cls, model: GeodeForConditionalGeneration, args: GeodeStage2Config, peft_config=None):
        """Freeze a model without weights, or put an adapter on it, as training would."""
        if peft_config is None:
            return super().for_dry_run(model, args)
        return get_peft_model(model, complete_peft_config(peft_config, model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the library's optimiser, and give the regression head a learning rate of its own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        fast = {parameter for name, parameter in named if not set(FAST_PARTS).isdisjoint(name.split("."))}
        for group in list(optimizer.param_groups):
            split = [parameter for parameter in group["params"] if parameter in fast]
            if split:
                group["params"] = [parameter for parameter in group["params"] if parameter not in fast]
                optimizer.add_param_group({**group, "params": split, "lr": self.args.drh_learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            output_dir = output_dir or self.args.output_dir or "."
            self.geode_model.config.save_pretrained(output_dir)
            if self._origin is not None:
                save_drm(self.geode_model, output_dir, origin=self._origin)


def complete_peft_config(peft_config: LoraConfig, model: GeodeForConditionalGeneration) -> LoraConfig:
    """
    Fill in what an adapter of stage 2 needs, where the caller does not say otherwise.

    Args:
        peft_config (`LoraConfig`): Such as `LoraConfig(r=16)`.
        model ([`GeodeForConditionalGeneration`]): The model.

    Returns:
        `LoraConfig`: A copy, whose adapter is on the language model alone, beside which projector, regression head and the rows
        of the control tokens train; it names the commit of a base model from the Hub.
    """
    peft_config = copy.deepcopy(peft_config)
    if peft_config.revision is None:
        peft_config.revision = getattr(model.config, "_commit_hash", None)
    if peft_config.target_modules is None:
        peft_config.target_modules = LORA_TARGETS
    if peft_config.modules_to_save is None:
        injection = ["feature_injection"] if model.model.feature_injection is not None else []
        peft_config.modules_to_save = ["drh", "multi_modal_projector", *injection]
    if peft_config.trainable_token_indices is None:
        ids = [entry["token_id"] for entry in model.config.control_tokens.values()]
        peft_config.trainable_token_indices = {"embed_tokens": sorted(ids)}
    return peft_config


def load_adapter(base_model: GeodeForConditionalGeneration | str, folder: str | os.PathLike, **kwargs) -> PeftModel:
    """
    Load what stage 2 has trained as an adapter: `merge_and_unload()` of the result is a plain model.

    Args:
        base_model ([`GeodeForConditionalGeneration`] or `str`):
            The model that was trained, or its folder or Hub id; it is changed in place.
        folder (`str` or `os.PathLike`):
            The adapter, with its rationale module if it was trained with another one than the base model's.
        **kwargs:
            Arguments of `from_pretrained` of the base model.

    Returns:
        `PeftModel`: The model with its adapter, in evaluation mode.

    Raises:
        ValueError: If the rationale module does not fit the base model.
    """
    folder = Path(folder)
    if isinstance(base_model, str):
        config = GeodeConfig.from_pretrained(folder)
        base_model = GeodeForConditionalGeneration.from_pretrained(base_model, config=config, **kwargs)
    if (folder / DRM_FILE).is_file():
        load_drm(base_model, folder)
    return PeftModel.from_pretrained(base_model, folder).eval()


__all__ = ["LORA_TARGETS", "GeodeStage2Trainer", "complete_peft_config", "load_adapter"]
