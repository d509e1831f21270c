# SPDX-License-Identifier: Apache-2.0
"""GEODE: a vision-language model with a rationale module for 3D input and a regression head for numbers."""

import os
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from geode.configuration.configuration_geode import GeodeConfig

from .asking_geode import GeodeAskingMixin
from .generation_geode import MEDIA_INPUTS, GeodeGenerationMixin
from .hub_geode import GeodeHubModel
from .input_checks_geode import (
    check_learned,
    check_no_placeholders,
    check_prompt,
    check_token_values,
    is_decoding_step,
)
from .mamba_geode import GeodeMambaMixer, init_mamba_weights
from .media_geode import GeodeMediaMixin, GeodeMultiModalProjector
from .quantization_geode import check_weights_are_readable, quantize_language_model_only
from .rationale_geode import (
    GeodeContextEncoder,
    GeodeFeatureInjection,
    GeodeRationaleModule,
    RationaleOutput,
)
from .regression_geode import GeodeRegressionHead
from .scene_encoding_geode import SceneEncoding
from .shared_prefix_geode import CACHE_NAME, one_cache, run_decoder
from .sonata_geode import SonataModel
from .vggt_geode import VggtModel


STAGE_2_PREFIXES = ("drh.", "model.feature_injection.", "feature_injection.")


class _QuickOutput(ModelOutput):
    """A model output that looks a field up; the library's lists all of them for each, at every step of decoding."""

    def __post_init__(self):
        # What it checks is the class, and what it sets is set: once for each class is enough. But accelerate makes an output anew,
        # under mixed precision and in FSDP, from one argument that holds all fields.
        first = next(iter(type(self).__dataclass_fields__))
        is_one_field = isinstance(getattr(self, first), torch.Tensor | None)
        if "_is_checked" not in type(self).__dict__ or not is_one_field:
            super().__post_init__()
            type(self)._is_checked = True

    def __setattr__(self, name, value):
        if name not in type(self).__dataclass_fields__:
            super().__setattr__(name, value)  # which knows former names of fields
            return
        if value is not None:
            OrderedDict.__setitem__(self, name, value)
        object.__setattr__(self, name, value)


@dataclass
class GeodeModelOutputWithPast(_QuickOutput, BaseModelOutputWithPast):
    """
    Output of [`GeodeModel`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_images, image_seq_length, hidden_size)`, *optional*):
            Projected visual tokens of the images.
        video_hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`, *optional*):
            Projected visual tokens of the scenes' valid frames, one scene after another.
        rationale_hidden_states (`torch.Tensor` of shape `(batch_size, num_scenes, num_rationale_tokens, hidden_size)`,
            *optional*): The rationale tokens E_spatio; zero where there is no scene.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    rationale_hidden_states: torch.Tensor | None = None


@dataclass
class GeodeCausalLMOutputWithPast(_QuickOutput, CausalLMOutputWithPast):
    """
    Output of [`GeodeForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Eq. 7: `ce_loss + loss_weight * regression_loss`.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Scores before the softmax.
        past_key_values (`Cache`, *optional*): Keys and values of the sequence so far. It is `cache` from transformers 5.24
            on, where the former name still reads it.
        hidden_states, attentions (`tuple`, *optional*): Per layer, of the language model.
        ce_loss (`torch.Tensor` of shape `()`, *optional*): Cross-entropy of the text, control tokens included.
        regression_loss (`torch.Tensor` of shape `()`, *optional*): Eq. 6, in the codecs' space.
        regression_values (`torch.Tensor` of shape `(batch_size, sequence_length, max_dim)`, *optional*):
            Predicted values in SI units at the positions of control tokens; NaN elsewhere.
        image_hidden_states, video_hidden_states, rationale_hidden_states (`torch.Tensor`, *optional*):
            See [`GeodeModelOutputWithPast`].
    """

    ce_loss: torch.Tensor | None = None
    regression_loss: torch.Tensor | None = None
    regression_values: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    rationale_hidden_states: torch.Tensor | None = None


class GeodePreTrainedModel(GeodeHubModel):
    """Weights, freezing and saving that all GEODE models share."""

    config: GeodeConfig
    optional_prefixes = STAGE_2_PREFIXES
    incomplete_remedy = "Load a complete checkpoint; a stage-1 result (`drm.safetensors`) is not one."
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    # RUF012: the library declares these as plain class attributes.
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _no_split_modules = ["GeodeCrossAttentionLayer", "GeodeMambaLayer", "GeodeRegressionHead"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["drh"]  # noqa: RUF012
    _keep_in_fp32_modules = ["drh"]  # noqa: RUF012 - quantisers look here only
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, GeodeMambaMixer):
            init_mamba_weights(module)
        elif isinstance(module, GeodeContextEncoder):
            init.normal_(module.no_camera_token, std=std)
            init.normal_(module.unknown_scale_token, std=std)
        elif isinstance(module, GeodeRationaleModule):
            init.normal_(module.queries, std=std)
        elif isinstance(module, GeodeFeatureInjection):
            init.zeros_(module.gate)

    def _encoders(self) -> list[nn.Module]:
        base = getattr(self, "model", self)
        parts = (getattr(base, name, None) for name in ("vision_tower", "point_encoder", "reconstructor"))
        return [part for part in parts if part is not None]

    def freeze_encoders(self) -> None:
        """Freeze vision tower, point encoder and reconstructor, as every new or loaded model has them."""
        for encoder in self._encoders():
            encoder.requires_grad_(False)

    def attach_reconstructor(self, reconstructor: VggtModel | str | os.PathLike) -> None:
        """
        Give the model a reconstructor, so that frames alone are enough. One that it has is replaced.

        It is frozen, moved to the model's device and saved with the model. The processor needs to know its frame size:
        `processor.geometry_frame_size = model.config.reconstructor_config.image_size`.

        Args:
            reconstructor ([`VggtModel`], path or Hub id):
                The model, or what `VggtModel.from_pretrained` takes. `convert_vggt_checkpoint` reads public checkpoints.

        Raises:
            TypeError: If `reconstructor` is another model.
        """
        if isinstance(reconstructor, str | os.PathLike):
            reconstructor = VggtModel.from_pretrained(reconstructor)
        model_type = getattr(getattr(reconstructor, "config", None), "model_type", None)
        # By name: a model loaded with remote code is of another class object.
        if model_type != VggtModel.config_class.model_type:
            raise TypeError(
                f"`reconstructor` must be a VggtModel, a path or a Hub id, got {type(reconstructor).__name__}."
            )
        self._set_reconstructor(reconstructor.to(self.device).requires_grad_(False).eval(), reconstructor.config)

    def detach_reconstructor(self) -> VggtModel | None:
        """Take the reconstructor out, so that it is not saved with the model, and return it."""
        reconstructor = getattr(self, "model", self).reconstructor
        self._set_reconstructor(None, None)
        return reconstructor

    def _set_reconstructor(self, reconstructor, config) -> None:
        base = getattr(self, "model", self)
        base.reconstructor = reconstructor
        vars(base).pop("_digests", None)  # new tensors may lie where those of the old one lay
        self.config.reconstructor_config = base.config.reconstructor_config = config
        if self.config.parts:  # the terms of the old one, which say nothing of a new one
            self.config.parts = [part for part in self.config.parts if part["name"] != "reconstructor"]

    def train(self, mode: bool = True):
        """Switch to training, except for frozen encoders: they stay in eval mode, without dropout or drop path."""
        super().train(mode)
        for encoder in self._encoders():
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        Load as [`GeodeHubModel.from_pretrained`] does. Only the heads that stage 2 adds may be missing.

        A `quantization_config` quantises the language model and leaves every other part as it is.

        Raises:
            ValueError: If a tensor of the language model, an encoder or the rationale module is missing, or if the quantiser
                cannot leave parts out.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = quantize_language_model_only(kwargs["quantization_config"])
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=output_loading_info, **kwargs
        )
        model = loaded[0] if output_loading_info else loaded
        model.freeze_encoders()  # loading made new parameters
        return loaded

    def save_pretrained(self, save_directory, **kwargs):
        """
        Save as [`PreTrainedModel.save_pretrained`] does, with the code that loads it where `geode` is absent.

        Raises:
            ValueError: If the model holds quantised weights that cannot be written.
        """
        check_weights_are_readable(self, "Saving")
        for name in self.config.sub_configs:
            # Loading writes the dtype into each part's configuration; a first save would lack it.
            part = getattr(self.config, name)
            if part is not None and part.dtype is None:
                part.dtype = self.dtype
        super().save_pretrained(save_directory, **kwargs)


class GeodeModel(GeodePreTrainedModel, GeodeMediaMixin):
    """GEODE without its two heads: encoders, rationale module and language model."""

    def __init__(self, config: GeodeConfig):
        super().__init__(config)
        # First, since tools that probe the first checkpointed layer should find one that trains.
        self.language_model = AutoModel.from_config(config.text_config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = GeodeMultiModalProjector(config)
        self.point_encoder = SonataModel(config.point_config)
        self.reconstructor = None
        if config.reconstructor_config is not None:
            self.reconstructor = VggtModel(config.reconstructor_config)
        self.drm = GeodeRationaleModule(config)
        self.feature_injection = GeodeFeatureInjection(config) if config.drm_config.inject_features else None
        self.post_init()
        self.freeze_encoders()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        media_embeds: torch.Tensor | None = None,
        feedback_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | GeodeModelOutputWithPast:
        """
        Embed tokens, put media in their places, and run the language model.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Tokens.
            attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): 0 is padding. Or a
                boolean one of shape `(batch_size, 1, sequence_length, sequence_length)`: True where a query sees a key.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Positions.
            past_key_values (`Cache`, *optional*): Keys and values of an earlier part of the sequence.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embedded tokens, instead of `input_ids`.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 at placeholders of images, 2 at those of scenes.
            media_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings for the placeholders, instead of media.
            feedback_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                What is added to the input embeddings.
            cache (`Cache`, *optional*): `past_key_values` by the name that transformers 5.24 gave it.
            **kwargs: Media, as in [`~GeodeModel.embed_inputs`], and arguments of the language model.

        Returns:
            [`GeodeModelOutputWithPast`]

        Raises:
            TypeError: If an argument is no tensor, or holds another kind of numbers.
            ValueError: If sizes do not fit together, placeholders have no media, or values are none that can be meant. A single
                token behind a cache is not checked.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of `input_ids` and `inputs_embeds`; got both or neither.")
        cache = one_cache(cache, past_key_values)
        is_step = is_decoding_step(input_ids, cache)
        if not is_step:
            check_prompt(
                self.config,
                input_ids,
                inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                media_embeds=media_embeds,
                feedback_embeds=feedback_embeds,
            )
        # On another device each forward would wait for them to be read; `generate` reads its prompt once.
        reads_tokens = not is_step and input_ids is not None and input_ids.device.type == "cpu"
        if reads_tokens:
            check_token_values(input_ids, self.config)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        media = {name: kwargs.pop(name) for name in MEDIA_INPUTS if name in kwargs}
        features = {}
        if media_embeds is None:
            inputs_embeds, features = self.embed_inputs(
                input_ids, inputs_embeds, mm_token_type_ids=mm_token_type_ids, **media
            )
            if reads_tokens and all(tensor is None for tensor in features.values()):
                check_no_placeholders(input_ids, self.config)
        else:
            # `generate` merged the media beforehand; only the placeholders' embeddings are theirs.
            inputs_embeds = self.get_input_embeddings()(input_ids)
            placeholders = (input_ids == self.config.image_token_id) | (input_ids == self.config.rationale_token_id)
            inputs_embeds = torch.where(placeholders[..., None], media_embeds.to(inputs_embeds), inputs_embeds)
        if feedback_embeds is not None:
            inputs_embeds = inputs_embeds + feedback_embeds.to(inputs_embeds)
        mask = prepared_mask(attention_mask, self.language_model.config, dtype=inputs_embeds.dtype)
        only_last = kwargs.get("output_hidden_states") == -1
        if only_last:
            # The library records every layer to keep the last one's normed states, which are the output.
            kwargs["output_hidden_states"] = False
        outputs = run_decoder(
            self.language_model,
            attention_mask=mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.hidden_states
        if only_last:
            num_layers = self.language_model.config.num_hidden_layers
            hidden_states = (*[None] * num_layers, outputs.last_hidden_state)
        return GeodeModelOutputWithPast(
            outputs.last_hidden_state,
            getattr(outputs, CACHE_NAME),
            hidden_states=hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features.get("image_features"),
            video_hidden_states=features.get("scene_features"),
            rationale_hidden_states=features.get("rationale_features"),
        )


class GeodeForConditionalGeneration(GeodePreTrainedModel, GeodeAskingMixin, GeodeGenerationMixin):
    """
    GEODE with its language-model head and its regression head.

    Source: paper, Eqs. 1-7; decisions where it is silent are in docs/architecture.md.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: GeodeConfig):
        super().__init__(config)
        self.model = GeodeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.drh = GeodeRegressionHead(config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See [`GeodeModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See [`GeodeModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    def get_rationale_features(self, video_hidden_states: torch.Tensor, **kwargs) -> RationaleOutput:
        """See [`GeodeModel.get_rationale_features`]."""
        return self.model.get_rationale_features(video_hidden_states, **kwargs)

    def get_point_tokens(self, point_features: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
        """See [`GeodeModel.get_point_tokens`]."""
        return self.model.get_point_tokens(point_features, **kwargs)

    def encode_scene(self, frames=None, *, geometry=None, **inputs: torch.Tensor) -> SceneEncoding:
        """See [`GeodeModel.encode_scene`]."""
        return self.model.encode_scene(frames, geometry=geometry, **inputs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        regression_targets: torch.Tensor | None = None,
        num_regression_targets: torch.Tensor | int | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        video_frame_mask: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        point_features: torch.Tensor | None = None,
        point_coords: torch.Tensor | None = None,
        point_grid_coords: torch.LongTensor | None = None,
        point_mask: torch.Tensor | None = None,
        point_tokens: torch.Tensor | None = None,
        point_token_positions: torch.Tensor | None = None,
        point_token_mask: torch.Tensor | None = None,
        camera_poses: torch.Tensor | None = None,
        camera_mask: torch.Tensor | None = None,
        log_scale: torch.Tensor | None = None,
        scale_known: torch.Tensor | None = None,
        geometry_frames: torch.Tensor | None = None,
        geometry_frame_mask: torch.Tensor | None = None,
        geometry_content_boxes: torch.LongTensor | None = None,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.LongTensor | None = None,
        rationale_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        media_embeds: torch.Tensor | None = None,
        use_visual_tokens: bool = True,
        feedback_values: torch.Tensor | None = None,
        feedback_embeds: torch.Tensor | None = None,
        return_regression_values: bool = True,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | GeodeCausalLMOutputWithPast:
        """
        Predict text and, at control tokens, values.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Tokens.
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*):
                Images without geometry, of all samples in order.
            attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): 0 is padding. Or a
                boolean one of shape `(batch_size, 1, sequence_length, sequence_length)`: True where a query sees a key.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Positions.
            past_key_values (`Cache`, *optional*): Keys and values of an earlier part of the sequence.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embedded tokens, instead of `input_ids`. The regression head needs `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): -100 is ignored.
            regression_targets (`torch.Tensor` of shape `(batch_size, sequence_length, max_dim)`, *optional*):
                True values in SI units at control tokens; NaN where there is none.
            num_regression_targets (`torch.Tensor` of shape `()` or `int`, *optional*): Targets of the whole optimiser
                step, over all ranks and accumulation steps; the regression loss is a mean over them.
            pixel_values_videos (`torch.Tensor`, *optional*):
                Frames of scenes, which are videos and images that carry geometry, of shape `(batch_size, num_scenes,
                num_frames, 3, height, width)`.
            video_features (`torch.Tensor`, *optional*):
                Instead of `pixel_values_videos`, what the vision tower made of them: patch features before the projector,
                of shape `(batch_size, num_scenes, num_frames, num_patches, vision_hidden_size)`.
            video_frame_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_frames)`, *optional*): Valid ones.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 at placeholders of images, 2 at those of scenes.
            point_features (`torch.Tensor` of shape `(batch_size, num_scenes, num_points, 9)`, *optional*):
                Geometry, with the three arguments that follow and the four of cameras and scale; see
                [`~GeodeModel.get_rationale_features`].
            point_coords (`torch.Tensor` of shape `(batch_size, num_scenes, num_points, 3)`, *optional*): Scene frame.
            point_grid_coords (`torch.LongTensor` of shape `(batch_size, num_scenes, num_points, 3)`, *optional*): Voxels.
            point_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_points)`, *optional*): Valid points.
            point_tokens (`torch.Tensor` of shape `(batch_size, num_scenes, num_tokens, point_hidden_size)`, *optional*):
                Instead of these four, what the point encoder made of them: its coarsest stage, as
                [`~GeodeModel.get_point_tokens`] returns it.
            point_token_positions (`torch.Tensor` of shape `(batch_size, num_scenes, num_tokens, 3)`, *optional*):
                Where they are, scene frame, metres.
            point_token_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_tokens)`, *optional*): Valid tokens.
            camera_poses (`torch.Tensor` of shape `(batch_size, num_scenes, num_cameras, 11)`, *optional*): Cameras.
            camera_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_cameras)`, *optional*): Valid ones.
            log_scale (`torch.Tensor` of shape `(batch_size, num_scenes)`, *optional*): Log of metres per unit.
            scale_known (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Where it is known.
            geometry_frames (`torch.Tensor`, *optional*):
                Frames in [0, 1] from which the reconstructor makes the geometry, of shape `(batch_size, num_scenes,
                num_frames, 3, height, width)`.
            geometry_frame_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_frames)`, *optional*): Valid ones.
            geometry_content_boxes (`torch.LongTensor` of shape `(batch_size, num_scenes, num_frames, 4)`, *optional*):
                Where a frame lies in its padding; see [`~GeodeModel.reconstruct`].
            question_input_ids (`torch.LongTensor` of shape `(batch_size, question_length)`, *optional*):
                The question, for `drm_config.question_conditioned`.
            question_attention_mask (`torch.LongTensor` of shape `(batch_size, question_length)`, *optional*): 0 is padding.
            rationale_features (`torch.Tensor`, *optional*):
                Rationale tokens computed before, instead of geometry, of shape `(batch_size, num_scenes,
                num_rationale_tokens, hidden_size)`.
            mm_encoder_outputs (`dict`, *optional*): See [`~GeodeModel.encode_media`].
            media_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings for the placeholders, as `generate` prepares them.
            use_visual_tokens (`bool`, defaults to `True`): See [`~GeodeModel.encode_media`].
            feedback_values (`torch.Tensor` of shape `(batch_size, sequence_length, max_dim)`, *optional*): Values whose
                embeddings are fed back (`drh_config.value_feedback`); default in training: `regression_targets`.
            feedback_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                What is added to the input embeddings, as `generate` prepares it.
            return_regression_values (`bool`, defaults to `True`): Run the regression head without targets as well.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Positions for which logits are computed; 0 is all.
            cache (`Cache`, *optional*): `past_key_values` by the name that transformers 5.24 gave it.
            **kwargs: Arguments of the language model, and `num_items_in_batch`, the label tokens of the whole step.

        Returns:
            [`GeodeCausalLMOutputWithPast`]

        Raises:
            TypeError: As [`GeodeModel`] does.
            ValueError: As [`GeodeModel`] does, and if labels or values are not aligned with the tokens.
        """
        learned = {"labels": labels, "regression_targets": regression_targets, "feedback_values": feedback_values}
        check_learned(self.config, self.drh.max_dim, input_ids, inputs_embeds, **learned)
        if feedback_embeds is None and self.config.drh_config.value_feedback and input_ids is not None:
            fed = regression_targets if feedback_values is None else feedback_values
            if fed is not None:
                feedback_embeds = self.drh.feedback_embeddings(fed, input_ids, self.dtype)
        elif feedback_values is not None and not self.config.drh_config.value_feedback:
            raise ValueError("`feedback_values` were given, but `drh_config.value_feedback` is false. Drop them.")
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            video_features=video_features,
            video_frame_mask=video_frame_mask,
            scene_mask=scene_mask,
            mm_token_type_ids=mm_token_type_ids,
            point_features=point_features,
            point_coords=point_coords,
            point_grid_coords=point_grid_coords,
            point_mask=point_mask,
            point_tokens=point_tokens,
            point_token_positions=point_token_positions,
            point_token_mask=point_token_mask,
            camera_poses=camera_poses,
            camera_mask=camera_mask,
            log_scale=log_scale,
            scale_known=scale_known,
            geometry_frames=geometry_frames,
            geometry_frame_mask=geometry_frame_mask,
            geometry_content_boxes=geometry_content_boxes,
            question_input_ids=question_input_ids,
            question_attention_mask=question_attention_mask,
            rationale_features=rationale_features,
            mm_encoder_outputs=mm_encoder_outputs,
            media_embeds=media_embeds,
            use_visual_tokens=use_visual_tokens,
            feedback_embeds=feedback_embeds,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))

        loss = ce_loss = regression_loss = regression_values = None
        if labels is not None:
            ce_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            # The mean over no labels is not a number, though its gradients are 0.
            ce_loss = loss = torch.where((labels[:, 1:] != -100).any().to(ce_loss.device), ce_loss, 0.0)
        if regression_targets is not None and input_ids is None:
            raise ValueError(
                "`regression_targets` need `input_ids`, which say where the control tokens are; got None."
            )
        # Training runs the head on every batch, so that its parameters have gradients on every rank; inference where
        # there is something to regress.
        has_loss = labels is not None or regression_targets is not None
        if input_ids is not None and (
            has_loss or (return_regression_values and self.drh.control_mask(input_ids).any())
        ):
            regression = self.drh(hidden_states, input_ids, regression_targets, num_regression_targets)
            regression_values = regression.values
        if has_loss and regression_values is not None:
            regression_loss = self._scale_regression_loss(
                regression.loss, labels, num_regression_targets, kwargs.get("num_items_in_batch")
            )
            weighted = self.config.drh_config.loss_weight * regression_loss
            loss = weighted if loss is None else loss + weighted.to(loss)
        return GeodeCausalLMOutputWithPast(
            loss,
            logits,
            getattr(outputs, CACHE_NAME),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            ce_loss=ce_loss,
            regression_loss=regression_loss,
            regression_values=regression_values,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            rationale_hidden_states=outputs.rationale_hidden_states,
        )

    @staticmethod
    def _scale_regression_loss(loss, labels, num_regression_targets, num_items_in_batch):
        """
        Make the term a share of its optimiser step where only the number of label tokens is known.

        `Trainer` sums the losses of all micro-batches and ranks once it passes `num_items_in_batch`, so a mean over the
        micro-batch would count once for each of them. Weighting it by the micro-batch's share of the label tokens
        keeps it a mean; `num_regression_targets`, which our trainers pass, makes it the exact one.
        """
        if num_regression_targets is not None or num_items_in_batch is None or labels is None:
            return loss
        num_labels = (labels[:, 1:] != -100).sum()
        return loss * torch.where(num_labels > 0, num_labels / num_items_in_batch, 0.0)


def prepared_mask(attention_mask, config, *, dtype: torch.dtype):
    """
    Bring a boolean mask of shape `(batch_size, 1, query_length, key_length)` into the form that the attention takes.

    The library hands masks of four dimensions on as they are, and eager attention would add booleans to its scores.

    Args:
        attention_mask (`torch.Tensor`, *optional*): True where a query sees a key; any other mask is returned unchanged.
        config (`PreTrainedConfig`): The language model's.
        dtype (`torch.dtype`): Of the embeddings.

    Returns:
        `torch.Tensor`, *optional*: The mask.

    Raises:
        ValueError: If the attention takes no such mask, or a layer would look past it.
    """
    is_tensor = isinstance(attention_mask, torch.Tensor)
    if not is_tensor or attention_mask.ndim != 4 or attention_mask.dtype != torch.bool:
        return attention_mask
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others or config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            "A boolean `attention_mask` of four dimensions, as packed questions have, needs full attention by 'sdpa' or "
            f"'eager' in every layer, got {config._attn_implementation!r} and layers of {sorted(others or ['full_attention'])}. "
            "Load the model with `attn_implementation='sdpa'`, or train without packs."
        )
    if config._attn_implementation == "sdpa":
        return attention_mask
    lowest = torch.finfo(dtype).min
    return torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device).masked_fill(
        ~attention_mask, lowest
    )


__all__ = ["GeodeForConditionalGeneration", "GeodeModel", "GeodePreTrainedModel"]
