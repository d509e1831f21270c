# SPDX-License-Identifier: Apache-2.0
"""From pixels and geometry to embeddings in the places of their placeholders: the input side of [`GeodeModel`]."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from geode.configuration.configuration_geode import GeodeConfig

from .geometry_geode import invert_rigid
from .rationale_geode import CAMERA_POSE_DIM, RationaleOutput
from .scene_geode import SceneGeometry, collate_scenes


IMAGE_TOKEN_TYPE, SCENE_TOKEN_TYPE = 1, 2  # values of `mm_token_type_ids`


class GeodeMultiModalProjector(nn.Module):
    """InternVL's projector: layer norm and a two-layer MLP over pixel-shuffled patches."""

    def __init__(self, config: GeodeConfig):
        super().__init__()
        shuffled_size = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        self.layer_norm = nn.LayerNorm(shuffled_size)
        self.linear_1 = nn.Linear(shuffled_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, visual_features: torch.Tensor) -> torch.Tensor:
        """Project `(num_images, tokens, shuffled_size)` to `(num_images, tokens, hidden_size)`."""
        return self.linear_2(self.act(self.linear_1(self.layer_norm(visual_features))))


def pixel_shuffle(patches: torch.Tensor, factor: int) -> torch.Tensor:
    """
    Fold blocks of `factor x factor` patches into channels, in InternVL's order: block row, then block column.

    Args:
        patches (`torch.Tensor` of shape `(num_images, rows, columns, channels)`): Patch features.
        factor (`int`): Side of a block, in patches.

    Returns:
        `torch.Tensor` of shape `(num_images, rows // factor * columns // factor, factor * factor * channels)`.
    """
    num_images, rows, columns, channels = patches.shape
    blocks = patches.reshape(num_images, rows // factor, factor, columns // factor, factor, channels)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(num_images, -1, factor * factor * channels)


class GeodeMediaMixin:
    """
    Encodes images, scenes and geometry, and merges them into the embedded tokens.

    It is the part of [`GeodeModel`] that `generate` runs once, before decoding.
    """

    @merge_with_config_defaults
    @can_return_tuple
    @select_hidden_states("vision_feature_layer")
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encode images.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`): Normalised images.
            vision_feature_layer (`int`, *optional*): Layer of the vision tower that is read; default of the config.
            vision_feature_select_strategy (`str`, *optional*): `"default"` drops the class token, `"full"` keeps it.
            **kwargs (`TransformersKwargs`): Passed on to the vision tower.

        Returns:
            The vision tower's output, with `pooler_output` of shape `(num_images, image_seq_length, hidden_size)`.
        """
        outputs, patches = self._encode_frames(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )
        outputs.pooler_output = self._project(patches)
        return outputs

    @merge_with_config_defaults
    @can_return_tuple
    @select_hidden_states("vision_feature_layer")
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_frame_mask: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Encode the frames of scenes; padded frames cost nothing.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(batch_size, num_scenes, num_frames, 3, height, width)`):
                Normalised frames.
            video_frame_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_frames)`, *optional*):
                Valid frames, which come first.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.
            vision_feature_layer (`int`, *optional*): Layer of the vision tower that is read; default of the config.
            vision_feature_select_strategy (`str`, *optional*): `"default"` drops the class token, `"full"` keeps it.
            **kwargs (`TransformersKwargs`): Passed on to the vision tower.

        Returns:
            The vision tower's output of the valid frames, with `last_hidden_state` of shape `(batch_size, num_scenes,
            num_frames, num_patches, vision_hidden_size)`, the patch features before the projector, and `pooler_output`,
            a list with a tensor `(num_frames * image_seq_length, hidden_size)` for each valid scene.
        """
        if pixel_values_videos.ndim != 6:
            raise ValueError(
                "`pixel_values_videos` must have shape (batch_size, num_scenes, num_frames, 3, height, width), "
                f"got {tuple(pixel_values_videos.shape)}."
            )
        shape = pixel_values_videos.shape[:3]
        mask = torch.ones(shape, dtype=torch.bool, device=pixel_values_videos.device)
        if video_frame_mask is not None:
            mask = mask & video_frame_mask
        if scene_mask is not None:
            mask = mask & scene_mask[..., None]
        outputs, patches = self._encode_frames(
            pixel_values_videos[mask], vision_feature_layer, vision_feature_select_strategy, **kwargs
        )
        projected = self._project(patches).flatten(0, 1)
        frames_per_scene = mask.sum(dim=2).flatten()
        lengths = frames_per_scene[frames_per_scene > 0] * self.config.image_seq_length
        padded = patches.new_zeros(*shape, *patches.shape[1:])
        padded[mask] = patches
        outputs.last_hidden_state = padded
        outputs.pooler_output = list(projected.split(lengths.tolist()))
        return outputs

    def _encode_frames(self, pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs):
        """Run the vision tower on `(num_frames, 3, H, W)`; return its output and patch features of the chosen layer."""
        outputs = self.vision_tower(pixel_values=pixel_values.to(self.dtype), return_dict=True, **kwargs)
        if vision_feature_layer == -1:
            patches = outputs.last_hidden_state
        else:
            patches = outputs.hidden_states[vision_feature_layer]
        if vision_feature_select_strategy == "default":
            patches = patches[:, 1:]
        return outputs, patches

    def _project(self, patches: torch.Tensor) -> torch.Tensor:
        rows, columns = self.config.patch_grid
        shuffled = pixel_shuffle(patches.unflatten(1, (rows, columns)), round(1 / self.config.downsample_ratio))
        return self.multi_modal_projector(shuffled)

    def get_rationale_features(
        self,
        video_hidden_states: torch.Tensor,
        point_features: torch.Tensor,
        point_coords: torch.Tensor,
        point_grid_coords: torch.Tensor,
        *,
        point_mask: torch.Tensor | None = None,
        camera_poses: torch.Tensor | None = None,
        camera_mask: torch.Tensor | None = None,
        log_scale: torch.Tensor | None = None,
        scale_known: torch.Tensor | None = None,
        video_frame_mask: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
    ) -> RationaleOutput:
        """
        Encode the geometry of scenes and distil it into rationale tokens (paper, Eq. 2 and section 2.1).

        Args:
            video_hidden_states (`torch.Tensor`):
                `last_hidden_state` of [`~GeodeModel.get_video_features`], of shape `(batch_size, num_scenes, num_frames,
                num_patches, vision_hidden_size)`.
            point_features (`torch.Tensor` of shape `(batch_size, num_scenes, num_points, 9)`):
                Centred x y z in metres, r g b in [0, 1], unit normal.
            point_coords (`torch.Tensor` of shape `(batch_size, num_scenes, num_points, 3)`): Scene frame, metres.
            point_grid_coords (`torch.LongTensor` of shape `(batch_size, num_scenes, num_points, 3)`): Voxel indices.
            point_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_points)`, *optional*): Valid points.
            camera_poses (`torch.Tensor` of shape `(batch_size, num_scenes, num_cameras, 11)`, *optional*):
                See `encode_camera_poses`; without cameras a learned token stands for them.
            camera_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_cameras)`, *optional*): Valid ones.
            log_scale (`torch.Tensor` of shape `(batch_size, num_scenes)`, *optional*): Log of metres per unit.
            scale_known (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Default: as `log_scale`.
            video_frame_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_frames)`, *optional*): Valid ones.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.
            question_input_ids (`torch.LongTensor` of shape `(batch_size, question_length)`, *optional*):
                The question, for `drm_config.question_conditioned`.
            question_attention_mask (`torch.LongTensor` of shape `(batch_size, question_length)`, *optional*): 0 is padding.

        Returns:
            [`RationaleOutput`] whose tensors have leading shape `(batch_size, num_scenes)`; zero without a scene.
        """
        batch_size, num_scenes, num_frames = video_hidden_states.shape[:3]
        device = video_hidden_states.device
        if tuple(point_features.shape[:2]) != (batch_size, num_scenes):
            raise ValueError(
                f"`point_features` must have leading shape {(batch_size, num_scenes)}, one cloud for each scene of "
                f"`pixel_values_videos`, got {tuple(point_features.shape)}."
            )

        def or_default(tensor, *shape, value, dtype):
            return torch.full(shape, value, dtype=dtype, device=device) if tensor is None else tensor.to(device)

        scenes = or_default(scene_mask, batch_size, num_scenes, value=True, dtype=torch.bool)
        frame_mask = or_default(video_frame_mask, batch_size, num_scenes, num_frames, value=True, dtype=torch.bool)
        point_mask = or_default(point_mask, *point_features.shape[:3], value=True, dtype=torch.bool)
        if camera_poses is None:
            camera_poses = torch.zeros(batch_size, num_scenes, 1, CAMERA_POSE_DIM, device=device)
            camera_mask = torch.zeros(batch_size, num_scenes, 1, dtype=torch.bool, device=device)
        camera_mask = or_default(camera_mask, *camera_poses.shape[:3], value=True, dtype=torch.bool)
        known = log_scale is not None
        log_scale = or_default(log_scale, batch_size, num_scenes, value=0.0, dtype=torch.float32)
        scale_known = or_default(scale_known, batch_size, num_scenes, value=known, dtype=torch.bool)
        keep = scenes[..., None] & point_mask
        _check_geometry(scenes, point_mask, frame_mask)
        for name, tensor in (("point_features", point_features), ("point_coords", point_coords)):
            if not tensor[keep].isfinite().all():
                raise ValueError(
                    f"`{name}` must be finite, got {int((~tensor[keep].isfinite()).sum())} values that are not, of "
                    f"{tensor[keep].numel()}. Drop those points, or mask them with `point_mask`."
                )
        offset = keep.sum(dim=2)[scenes].cumsum(dim=0)
        points = self.point_encoder(
            feat=point_features[keep].float(),  # half precision resolves centimetres, not points
            coord=point_coords[keep].float(),
            grid_coord=point_grid_coords[keep],
            offset=offset,
        )
        question_embeds = question_mask = None
        if question_input_ids is not None and self.config.drm_config.question_conditioned:
            owner = scenes.nonzero()[:, 0]
            question_embeds = self.get_input_embeddings()(question_input_ids)[owner]
            question_mask = torch.ones_like(question_input_ids, dtype=torch.bool)[owner]
            if question_attention_mask is not None:
                question_mask = question_attention_mask.bool()[owner]
        packed = self.drm(
            visual_features=video_hidden_states[scenes],
            frame_mask=frame_mask[scenes],
            point_features=points.last_hidden_state,
            point_positions=points.coords[-1],
            point_offset=points.offsets[-1],
            camera_poses=camera_poses[scenes],
            camera_mask=camera_mask[scenes],
            log_scale=log_scale[scenes],
            scale_known=scale_known[scenes],
            question_embeds=question_embeds,
            question_mask=question_mask,
        )

        def unpack(tensor):
            padded = tensor.new_zeros(batch_size, num_scenes, *tensor.shape[1:])
            padded[scenes] = tensor
            return padded

        return RationaleOutput(
            rationale_features=unpack(packed.rationale_features), fused_features=unpack(packed.fused_features)
        )

    @torch.no_grad()
    def reconstruct(
        self,
        geometry_frames: torch.Tensor,
        geometry_frame_mask: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Make the geometry of scenes from frames alone (paper, Eq. 1).

        Its scale is unknown: see `SceneGeometry`, which also takes measured geometry.

        Args:
            geometry_frames (`torch.Tensor` of shape `(batch_size, num_scenes, num_frames, 3, height, width)`):
                Frames in [0, 1], sides multiples of 14.
            geometry_frame_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_frames)`, *optional*): Valid ones.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.

        Returns:
            `dict[str, torch.Tensor]`: Arguments of [`~GeodeModel.get_rationale_features`], on the frames' device.

        Raises:
            ValueError: If the model has no reconstructor.
        """
        if self.reconstructor is None:
            raise ValueError(
                "`geometry_frames` need a reconstructor, and this model has none (`config.reconstructor_config` is None). "
                "Give geometry with the inputs, or build them with `use_geometry=False`."
            )
        shape = geometry_frames.shape[:3]
        mask = torch.ones(shape, dtype=torch.bool) if geometry_frame_mask is None else geometry_frame_mask.bool()
        if scene_mask is not None:
            mask = mask & scene_mask.to(mask.device)[..., None]
        samples = []
        for frames, valid in zip(geometry_frames, mask, strict=True):
            used = [clip[keep.to(clip.device)] for clip, keep in zip(frames, valid, strict=True) if keep.any()]
            samples.append([self._reconstruct_scene(clip) for clip in used])
        collated = collate_scenes(samples)
        return {name: tensor.to(geometry_frames.device) for name, tensor in collated.items() if name != "scene_mask"}

    def _reconstruct_scene(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """Geometry inputs of one scene from `(num_frames, 3, height, width)`, as `SceneGeometry.to_model_inputs` gives."""
        output = self.reconstructor(frames[None], heads=("camera", "depth"))
        cam_from_world = torch.eye(4).repeat(len(frames), 1, 1)
        cam_from_world[:, :3] = output.extrinsics[0].cpu()
        geometry = SceneGeometry.from_rgbd(
            output.depth[0, ..., 0].float().cpu(),
            output.intrinsics[0].float().cpu(),
            invert_rigid(cam_from_world),
            images=(frames * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu(),
            depth_confidence=output.depth_confidence[0].float().cpu(),
            is_metric=False,
            max_points=self.config.max_points,
        )
        return geometry.to_model_inputs(self.config.point_config.grid_size, max_points=self.config.max_points)

    def get_placeholder_mask(
        self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Where the placeholder `token_id` stands, `(batch_size, sequence_length)`; by embedding if there are no ids."""
        if input_ids is not None:
            return input_ids == token_id
        return (inputs_embeds == self.get_input_embeddings().weight[token_id].to(inputs_embeds)).all(dim=-1)

    def merge_media(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        *,
        image_features: torch.Tensor | None = None,
        scene_features: torch.Tensor | None = None,
        rationale_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Put features in the places of their placeholders.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Embedded tokens.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The tokens.
            image_features (`torch.Tensor` of shape `(num_tokens, hidden_size)`, *optional*): Of all images in order.
            scene_features (`torch.Tensor` of shape `(num_tokens, hidden_size)`, *optional*): Of all scenes in order.
            rationale_features (`torch.Tensor`, *optional*):
                E_spatio, of shape `(batch_size, num_scenes, num_rationale_tokens, hidden_size)`; a scene with m
                placeholders takes its first m.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 at placeholders of images, 2 at those of scenes; required when there are both.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`.

        Raises:
            ValueError: If the number of placeholders is not that of the features.
        """
        # All masks come from the embeddings before the first feature is put in.
        visual = self.get_placeholder_mask(self.config.image_token_id, input_ids, inputs_embeds)
        rationale = self.get_placeholder_mask(self.config.rationale_token_id, input_ids, inputs_embeds)
        image_positions = scene_positions = visual
        if image_features is not None and scene_features is not None:
            if mm_token_type_ids is None:
                raise ValueError(
                    "A batch with images and videos needs `mm_token_type_ids` (1 at placeholders of images, 2 at those of "
                    "scenes) to tell them apart; got None. `GeodeProcessor` makes it."
                )
            image_positions = visual & (mm_token_type_ids == IMAGE_TOKEN_TYPE)
            scene_positions = visual & (mm_token_type_ids == SCENE_TOKEN_TYPE)
        if image_features is not None:
            inputs_embeds = _scatter(inputs_embeds, image_positions, image_features, "Image")
        if scene_features is not None:
            inputs_embeds = _scatter(inputs_embeds, scene_positions, scene_features, "Video")
        if rationale_features is not None:
            selected = self._select_rationale_tokens(rationale.sum(dim=1), rationale_features, scene_mask)
            inputs_embeds = _scatter(inputs_embeds, rationale, selected, "Rationale")
        elif image_features is not None or scene_features is not None:
            torch_compilable_check(
                ~rationale.any(),
                lambda: (
                    f"The input has {int(rationale.sum())} rationale placeholders, but no geometry, no "
                    "`rationale_features` and no reconstructor's frames. Give the scene's geometry, or build the inputs with "
                    "`use_geometry=False`."
                ),
            )
        return inputs_embeds

    def _select_rationale_tokens(self, num_placeholders, rationale_features, scene_mask):
        """The first m tokens of each scene, `(num_placeholders, hidden_size)`; the placeholders decide m (decision 4)."""
        batch_size, num_scenes, available = rationale_features.shape[:3]
        if scene_mask is None:
            scene_mask = torch.ones(batch_size, num_scenes, dtype=torch.bool, device=rationale_features.device)
        per_scene = num_placeholders // scene_mask.sum(dim=1).clamp(min=1)
        fits = (per_scene * scene_mask.sum(dim=1) == num_placeholders) & (per_scene <= available)
        torch_compilable_check(
            fits.all(),
            lambda: (
                "Each scene takes the same number of rationale placeholders, at most "
                f"{available}: got {num_placeholders.tolist()} placeholders in the samples for "
                f"{scene_mask.sum(dim=1).tolist()} scenes. Check `num_rationale_tokens`."
            ),
        )
        index = torch.arange(available, device=rationale_features.device)
        return rationale_features[scene_mask[..., None] & (index < per_scene[:, None, None])]

    def embed_inputs(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        mm_token_type_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_frame_mask: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
        rationale_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **geometry: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """
        Embed tokens, run every encoder that the inputs call for, and put the features in the placeholders' places.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Tokens.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Their embeddings, if they are not plain ones.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 at placeholders of images, 2 at those of scenes.
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): Normalised images.
            pixel_values_videos (`torch.Tensor`, *optional*):
                Frames of scenes, of shape `(batch_size, num_scenes, num_frames, 3, height, width)`.
            video_frame_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_frames)`, *optional*): Valid ones.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.
            rationale_features (`torch.Tensor`, *optional*): Rationale tokens computed before, instead of geometry.
            mm_encoder_outputs (`dict`, *optional*):
                Outputs of `get_image_features` and `get_video_features` computed before, under `"image"` and `"video"`.
            vision_feature_layer (`int`, *optional*): Layer of the vision tower that is read; default of the config.
            vision_feature_select_strategy (`str`, *optional*): `"default"` drops the class token, `"full"` keeps it.
            **geometry (`torch.Tensor`):
                Arguments of [`~GeodeModel.get_rationale_features`] or of [`~GeodeModel.reconstruct`].

        Returns:
            Embeddings of shape `(batch_size, sequence_length, hidden_size)`, and a dict of the features in them:
            `image_features`, `scene_features` and `rationale_features`.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        given = dict(mm_encoder_outputs or {})
        for name, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            if pixels is not None and given.get(name) is not None:
                raise ValueError(
                    f"You cannot specify both pixels of shape {tuple(pixels.shape)} and "
                    f"`mm_encoder_outputs[{name!r}]`. Give one of them."
                )
        select = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "return_dict": True,
        }
        image, video = given.get("image"), given.get("video")
        if pixel_values is not None:
            image = self.get_image_features(pixel_values, **select)
        if pixel_values_videos is not None:
            video = self.get_video_features(pixel_values_videos, video_frame_mask, scene_mask, **select)
        geometry = {name: tensor for name, tensor in geometry.items() if tensor is not None}
        frames, frame_mask = geometry.pop("geometry_frames", None), geometry.pop("geometry_frame_mask", None)
        if frames is not None and rationale_features is None:
            geometry |= self.reconstruct(frames, frame_mask, scene_mask)
        fused_features = None
        if "point_features" in geometry and rationale_features is None:
            if video is None:
                raise ValueError(
                    "Geometry needs the frames that query it: give `pixel_values_videos` of the same scenes."
                )
            rationale = self.get_rationale_features(
                video.last_hidden_state, video_frame_mask=video_frame_mask, scene_mask=scene_mask, **geometry
            )
            rationale_features, fused_features = rationale.rationale_features, rationale.fused_features
        media = {
            "image_features": None if image is None else image.pooler_output.flatten(0, 1),
            "scene_features": self._inject(video, fused_features, video_frame_mask, scene_mask),
            "rationale_features": rationale_features,
        }
        merged = self.merge_media(
            inputs_embeds, input_ids, mm_token_type_ids=mm_token_type_ids, scene_mask=scene_mask, **media
        )
        return merged, media

    def _inject(self, video, fused_features, video_frame_mask, scene_mask):
        """The scenes' visual tokens, with fused features added to them if the configuration says so."""
        if video is None:
            return None
        tokens = torch.cat(list(video.pooler_output)) if len(video.pooler_output) else None
        if tokens is None or self.feature_injection is None or fused_features is None:
            return tokens
        mask = torch.ones(fused_features.shape[:3], dtype=torch.bool, device=fused_features.device)
        if video_frame_mask is not None:
            mask = mask & video_frame_mask
        if scene_mask is not None:
            mask = mask & scene_mask[..., None]
        return tokens + self.feature_injection(fused_features[mask]).flatten(0, 1).to(tokens)


def _scatter(inputs_embeds: torch.Tensor, positions: torch.Tensor, features: torch.Tensor, kind: str) -> torch.Tensor:
    torch_compilable_check(
        positions.sum() == features.shape[0],
        lambda: (
            f"{kind} features and {kind.lower()} placeholders do not match: {features.shape[0]} features, "
            f"{int(positions.sum())} placeholders."
        ),
    )
    return inputs_embeds.masked_scatter(positions[..., None], features.to(inputs_embeds))


def _check_geometry(scenes: torch.Tensor, point_mask: torch.Tensor, frame_mask: torch.Tensor) -> None:
    for name, counts in (("points", point_mask.sum(dim=2)), ("frames", frame_mask.sum(dim=2))):
        empty = (scenes & (counts == 0)).nonzero().tolist()
        if empty:
            raise ValueError(
                f"Every scene needs {name}; sample {empty[0][0]}, scene {empty[0][1]} has none. "
                "Give its geometry, or build the inputs with `use_geometry=False`."
            )


__all__ = ["GeodeMediaMixin", "GeodeMultiModalProjector", "pixel_shuffle"]
