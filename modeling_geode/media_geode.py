# SPDX-License-Identifier: Apache-2.0
"""From pixels and geometry to embeddings in the places of their placeholders: the input side of [`GeodeModel`]."""

import os

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from geode.configuration.configuration_geode import GeodeConfig

from .collation_geode import CLOUD_INPUTS, TOKEN_INPUTS, collate_scenes
from .input_checks_geode import check_encoder_outputs, check_finite, check_tensors
from .media_inputs_geode import (
    PackedPoints,
    check_counts,
    check_form,
    check_layer,
    check_media,
    check_pixels,
    check_scene_inputs,
    clouds_to_pack,
    join_clouds,
    pack_tokens,
    scatter,
    summary_of,
    valid_frames,
    valid_points,
)
from .rationale_geode import CAMERA_POSE_DIM, RationaleOutput
from .reconstruction_geode import reconstruct_with_vggt
from .scene_encoding_geode import SceneEncoding, check_encoder_digest, digest_of_parts
from .scene_geode import SceneGeometry
from .vggt_geode import VggtModel
from .video_processing_geode import GeodeImageProcessor, load_image


IMAGE_TOKEN_TYPE, SCENE_TOKEN_TYPE = 1, 2  # values of `mm_token_type_ids`
# What of the configuration decides the tokens of a scene.
ENCODER_SETTINGS = (
    "vision_config",
    "point_config",
    "drm_config",
    "downsample_ratio",
    "projector_hidden_act",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)


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
        mask = valid_frames(pixel_values_videos, video_frame_mask, scene_mask)
        outputs, patches = self._encode_frames(
            pixel_values_videos[mask], vision_feature_layer, vision_feature_select_strategy, **kwargs
        )
        return self._with_scene_tokens(outputs, patches, mask)

    def _stored_video_features(self, video_features, video_frame_mask, scene_mask) -> BaseModelOutputWithPooling:
        """What `get_video_features` returns, from patch features that it returned before."""
        grid, width = self.config.patch_grid, self.config.vision_config.hidden_size
        expected = (grid[0] * grid[1], width)
        if video_features.ndim != 5 or tuple(video_features.shape[3:]) != expected:
            raise ValueError(
                "`video_features` must have shape (batch_size, num_scenes, num_frames, num_patches, vision_hidden_size), "
                f"the last two {expected} for this model, got {tuple(video_features.shape)}."
            )
        mask = valid_frames(video_features, video_frame_mask, scene_mask)
        check_finite("`video_features`", video_features[mask], "Compute the features of that video again.")
        return self._with_scene_tokens(BaseModelOutputWithPooling(), video_features[mask].to(self.dtype), mask)

    def _with_scene_tokens(self, outputs, patches: torch.Tensor, mask: torch.Tensor):
        """Set the fields of `outputs` that the patch features of valid frames, `(num_frames, patches, width)`, make."""
        projected = self._project(patches).flatten(0, 1)
        frames_per_scene = mask.sum(dim=2).flatten()
        lengths = frames_per_scene[frames_per_scene > 0] * self.config.image_seq_length
        padded = patches.new_zeros(*mask.shape, *patches.shape[1:])
        padded[mask] = patches
        outputs.last_hidden_state = padded
        outputs.pooler_output = list(projected.split(lengths.tolist()))
        return outputs

    def _encode_frames(self, pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs):
        """Run the vision tower on `(num_frames, 3, H, W)`; return its output and patch features of the chosen layer."""
        check_pixels(pixel_values, self.config.vision_config.image_size)
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

    def get_point_tokens(
        self,
        point_features: torch.Tensor,
        point_coords: torch.Tensor,
        point_grid_coords: torch.Tensor,
        *,
        point_mask: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Encode the point clouds of scenes, for later use in their place.

        Args:
            point_features (`torch.Tensor` of shape `(batch_size, num_scenes, num_points, 9)`):
                As in [`~GeodeModel.get_rationale_features`], like the arguments that follow.
            point_coords (`torch.Tensor` of shape `(batch_size, num_scenes, num_points, 3)`): Scene frame, metres.
            point_grid_coords (`torch.LongTensor` of shape `(batch_size, num_scenes, num_points, 3)`): Voxel indices.
            point_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_points)`, *optional*): Valid points.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.

        Returns:
            `dict[str, torch.Tensor]`: `point_tokens` of shape `(batch_size, num_scenes, num_tokens, point_hidden_size)`,
            `point_token_positions` `(..., num_tokens, 3)` and `point_token_mask` `(..., num_tokens)`.
        """
        if scene_mask is None:
            scene_mask = torch.ones(point_features.shape[:2], dtype=torch.bool, device=point_features.device)
        packed = self._encode_points(point_features, point_coords, point_grid_coords, point_mask, scene_mask)
        lengths = packed.offset.diff(prepend=packed.offset.new_zeros(1))
        index = torch.arange(int(lengths.max()), device=lengths.device)
        mask = torch.zeros(*scene_mask.shape, len(index), dtype=torch.bool, device=lengths.device)
        mask[scene_mask] = index < lengths[:, None]
        tokens, positions = (part.new_zeros(*mask.shape, part.shape[-1]) for part in packed[:2])
        tokens[mask], positions[mask] = packed.features, packed.positions
        return {"point_tokens": tokens, "point_token_positions": positions, "point_token_mask": mask}

    def _encode_points(self, point_features, point_coords, point_grid_coords, point_mask, scenes) -> PackedPoints:
        """Run the point encoder on the valid points of valid scenes; a scene's result is the same in any batch."""
        keep = valid_points({"point_features": point_features, "point_coords": point_coords}, point_mask, scenes)
        sizes = keep.sum(dim=2)[scenes].tolist()
        # Half precision resolves centimetres, not points.
        cloud = (point_features[keep].float(), point_coords[keep].float(), point_grid_coords[keep])
        groups, parts = clouds_to_pack(cloud[2], sizes, self.config.point_config), []
        for group in groups:
            rows = [torch.cat([tensor.split(sizes)[number] for number in group]) for tensor in cloud]
            offset = torch.tensor([sizes[number] for number in group], device=rows[0].device).cumsum(dim=0)
            points = self.point_encoder(feat=rows[0], coord=rows[1], grid_coord=rows[2], offset=offset)
            parts.append(PackedPoints(points.last_hidden_state, points.coords[-1], points.offsets[-1]))
        return join_clouds(parts, groups)

    def get_rationale_features(
        self,
        video_hidden_states: torch.Tensor,
        point_features: torch.Tensor | None = None,
        point_coords: torch.Tensor | None = None,
        point_grid_coords: torch.Tensor | None = None,
        *,
        point_mask: torch.Tensor | None = None,
        point_tokens: torch.Tensor | None = None,
        point_token_positions: torch.Tensor | None = None,
        point_token_mask: torch.Tensor | None = None,
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
            point_features (`torch.Tensor` of shape `(batch_size, num_scenes, num_points, 9)`, *optional*):
                Centred x y z in metres, r g b in [0, 1], unit normal. Given with the two that follow.
            point_coords (`torch.Tensor` of shape `(batch_size, num_scenes, num_points, 3)`, *optional*): Scene frame,
                metres.
            point_grid_coords (`torch.LongTensor` of shape `(batch_size, num_scenes, num_points, 3)`, *optional*): Voxels.
            point_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_points)`, *optional*): Valid points.
            point_tokens (`torch.Tensor` of shape `(batch_size, num_scenes, num_tokens, point_hidden_size)`, *optional*):
                Instead of a cloud, what [`~GeodeModel.get_point_tokens`] made of it. Given with `point_token_positions`.
            point_token_positions (`torch.Tensor` of shape `(batch_size, num_scenes, num_tokens, 3)`, *optional*):
                Scene frame, metres.
            point_token_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_tokens)`, *optional*): Valid tokens.
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

        Raises:
            ValueError: If the geometry is given in both forms or in none, is not that of the scenes, or is not finite.
        """
        batch_size, num_scenes, num_frames = video_hidden_states.shape[:3]
        device = video_hidden_states.device
        cloud = (point_features, point_coords, point_grid_coords)
        tokens = (point_tokens, point_token_positions)
        sizes = {"batch_size": batch_size, "num_scenes": num_scenes, "num_frames": num_frames}
        check_form(cloud, tokens)
        check_tensors(
            dict(zip((*CLOUD_INPUTS, *TOKEN_INPUTS), (*cloud, *tokens), strict=True))
            | {"point_mask": point_mask, "point_token_mask": point_token_mask, "video_frame_mask": video_frame_mask}
            | {"camera_poses": camera_poses, "camera_mask": camera_mask, "scene_mask": scene_mask}
            | {"log_scale": log_scale, "scale_known": scale_known},
            self.config,
            **sizes,
        )

        def or_default(tensor, *shape, value, dtype):
            return torch.full(shape, value, dtype=dtype, device=device) if tensor is None else tensor.to(device)

        scenes = or_default(scene_mask, batch_size, num_scenes, value=True, dtype=torch.bool)
        frame_mask = or_default(video_frame_mask, batch_size, num_scenes, num_frames, value=True, dtype=torch.bool)
        if camera_poses is None:
            camera_poses = torch.zeros(batch_size, num_scenes, 1, CAMERA_POSE_DIM, device=device)
            camera_mask = torch.zeros(batch_size, num_scenes, 1, dtype=torch.bool, device=device)
        camera_mask = or_default(camera_mask, *camera_poses.shape[:3], value=True, dtype=torch.bool)
        known = log_scale is not None
        log_scale = or_default(log_scale, batch_size, num_scenes, value=0.0, dtype=torch.float32)
        scale_known = or_default(scale_known, batch_size, num_scenes, value=known, dtype=torch.bool)
        check_counts("frames", scenes, frame_mask)
        check_finite(
            "`camera_poses`", camera_poses[scenes], "Leave out cameras that lost tracking; fill padding with 0."
        )
        check_finite("`log_scale`", log_scale[scenes & scale_known], "Where it is unknown, `scale_known` is False.")
        if point_tokens is None:
            points = self._encode_points(*cloud, point_mask, scenes)
        else:
            points = pack_tokens(*tokens, point_token_mask, scenes)
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
            point_features=points.features,
            point_positions=points.positions,
            point_offset=points.offset,
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
        geometry_content_boxes: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Make the geometry of scenes from frames alone (paper, Eq. 1).

        Its scale is unknown, and up is the floor's normal where a floor is seen: see [`SceneGeometry.from_vggt`].

        Args:
            geometry_frames (`torch.Tensor` of shape `(batch_size, num_scenes, num_frames, 3, height, width)`):
                Frames in [0, 1], sides multiples of 14.
            geometry_frame_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_frames)`, *optional*): Valid ones.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.
            geometry_content_boxes (`torch.LongTensor` of shape `(batch_size, num_scenes, num_frames, 4)`, *optional*):
                Where a frame lies in its padding, as `VggtImageProcessor` returns it.

        Returns:
            `dict[str, torch.Tensor]`: Arguments of [`~GeodeModel.get_rationale_features`], on the frames' device.

        Raises:
            ValueError: If the model has no reconstructor, or it finds no cameras or depth.
        """
        scenes = self.reconstruct_scenes(geometry_frames, geometry_frame_mask, scene_mask, geometry_content_boxes)
        collated = collate_scenes([[self._scene_inputs(geometry) for geometry in sample] for sample in scenes])
        return {name: tensor.to(geometry_frames.device) for name, tensor in collated.items() if name != "scene_mask"}

    @torch.no_grad()
    def reconstruct_scenes(
        self,
        geometry_frames: torch.Tensor,
        geometry_frame_mask: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
        geometry_content_boxes: torch.Tensor | None = None,
    ) -> list[list[SceneGeometry]]:
        """Make the geometry of each sample's valid scenes; arguments are those of [`~GeodeModel.reconstruct`]."""
        reconstructor = self._required_reconstructor()
        mask = torch.ones(geometry_frames.shape[:3], dtype=torch.bool)
        if geometry_frame_mask is not None:
            mask &= geometry_frame_mask.bool().cpu()
        if scene_mask is not None:
            mask &= scene_mask.bool().cpu()[..., None]
        scenes = [[] for _ in mask]
        for row, column in mask.any(dim=2).nonzero().tolist():
            keep = mask[row, column]
            frames = geometry_frames[row, column][keep.to(geometry_frames.device)][None]
            boxes = None if geometry_content_boxes is None else geometry_content_boxes[row, column].cpu()[keep]
            output = reconstructor(frames, heads=("camera", "depth"))
            limits = {"max_points": self.config.max_points}
            scenes[row].append(SceneGeometry.from_vggt(output, frames, content_boxes=boxes, **limits))
        return scenes

    def _required_reconstructor(self) -> VggtModel:
        if self.reconstructor is None:
            raise ValueError(
                "Frames alone need a reconstructor, and this model has none (`config.reconstructor_config` is None). Attach "
                "one with `model.attach_reconstructor(...)`, give geometry with the inputs, or build them with "
                "`use_geometry=False`."
            )
        return self.reconstructor

    def _scene_inputs(self, geometry: SceneGeometry) -> dict[str, torch.Tensor]:
        limits = {"max_points": self.config.max_points}
        return geometry.to_model_inputs(self.config.point_config.grid_size, **limits)

    @torch.no_grad()
    def encode_scene(
        self, frames=None, *, geometry: SceneGeometry | None = None, **inputs: torch.Tensor
    ) -> SceneEncoding:
        """
        Encode one scene once, for many questions: reconstructor if there is no geometry, point encoder, vision tower, DRM.

        Args:
            frames (`list` of path, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, or one array of them, *optional*):
                All frames of the scene, uint8, for the language model and for the reconstructor. `GeodeProcessor.prepare_scene`
                reads and samples videos; what it returns goes into `inputs` instead.
            geometry ([`SceneGeometry`], *optional*):
                With `frames`, measured geometry instead of the reconstructor's.
            **inputs (`torch.Tensor`):
                What `GeodeProcessor.prepare_scene` returns, or stored features of one scene.

        Returns:
            [`SceneEncoding`]: On the model's device. Its `to_model_inputs()` goes to `generate`, and a chat names it in a part
            `{"type": "scene", "scene": ...}`.

        Raises:
            ValueError: If both or none of `frames` and `inputs` are given, there is more than one scene, the rationale depends
                on the question, or there is neither geometry nor a reconstructor.

        Example:
            ```python
            scene = model.encode_scene(**processor.prepare_scene(video="room.mp4"))
            messages = [
                {"role": "user", "content": [{"type": "scene", "scene": scene}, {"type": "text", "text": "..."}]}
            ]
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            output = model.generate(**inputs, **scene.to_model_inputs(), return_dict_in_generate=True)
            ```
        """
        if (frames is None) == (not inputs):
            raise ValueError(
                "Give either `frames` or what `GeodeProcessor.prepare_scene` returns; got both or neither."
            )
        if geometry is not None and frames is None:
            raise ValueError("`geometry` belongs to `frames`; `prepare_scene` takes it in its own `geometry`.")
        if self.config.drm_config.question_conditioned:
            raise ValueError("With `drm_config.question_conditioned` a scene is encoded anew for each question.")
        if isinstance(frames, str | os.PathLike):
            raise ValueError(
                f"`frames` must be frames, got the path {frames!s}. `prepare_scene(video=...)` reads videos."
            )
        if frames is not None:
            images = [load_image(frame) for frame in frames]
            height, width = self.config.vision_config.image_size
            resize = GeodeImageProcessor(size={"height": height, "width": width})
            pixels = resize(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
            inputs = {"pixel_values_videos": pixels[None, None]}
            if geometry is None:
                geometry = reconstruct_with_vggt(
                    images, self._required_reconstructor(), max_points=self.config.max_points
                )
        check_scene_inputs(inputs, self.config)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        names = ("geometry_frames", "geometry_frame_mask", "geometry_content_boxes")
        for_reconstructor = {name: inputs.pop(name) for name in names if name in inputs}
        if for_reconstructor:
            ((geometry,),) = self.reconstruct_scenes(**for_reconstructor)
        if geometry is not None:
            tensors = collate_scenes([[self._scene_inputs(geometry)]])
            inputs |= {name: tensor.to(self.device) for name, tensor in tensors.items()}
        features = self.encode_media(**inputs)
        tokens = features["scene_features"].unflatten(0, (-1, self.config.image_seq_length))
        rationale = features["rationale_features"]
        return SceneEncoding(
            visual_tokens=tokens,
            rationale_tokens=tokens.new_zeros(0, tokens.shape[-1]) if rationale is None else rationale[0, 0],
            summary=summary_of(inputs) if geometry is None else geometry.summary(),
            encoder_digest=self.encoder_digest(),
        )

    def encoder_digest(self) -> str:
        """
        Digest of the weights and settings that turn frames and geometry into tokens; the reconstructor is not among them.

        Returns:
            `str`: Equal for two models exactly if their tokens of a scene are interchangeable.
        """
        names = ("vision_tower", "multi_modal_projector", "point_encoder", "drm", "feature_injection")
        return digest_of_parts(self, names, ENCODER_SETTINGS)

    def language_digest(self) -> str:
        """Digest of the weights and settings of the language model, as [`~GeodeModel.encoder_digest`] of the encoders."""
        return digest_of_parts(self, ("language_model",), ("text_config",))

    def reconstructor_digest(self) -> str | None:
        """Digest of the weights and settings of the reconstructor; None without one."""
        if self.reconstructor is None:
            return None
        return digest_of_parts(self, ("reconstructor",), ("reconstructor_config",))

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
            inputs_embeds = scatter(inputs_embeds, image_positions, image_features, "Image")
        if scene_features is not None:
            inputs_embeds = scatter(inputs_embeds, scene_positions, scene_features, "Video")
        if image_features is None and scene_features is None:
            torch_compilable_check(
                ~visual.any(),
                lambda: (
                    f"The input has {int(visual.sum())} visual placeholders, but no images, frames or features of them. Give "
                    "`pixel_values`, `pixel_values_videos` or `video_features`."
                ),
            )
        if rationale_features is not None:
            selected = self._select_rationale_tokens(rationale.sum(dim=1), rationale_features, scene_mask)
            inputs_embeds = scatter(inputs_embeds, rationale, selected, "Rationale")
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
        scene_mask: torch.Tensor | None = None,
        **media: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """
        Embed tokens, run every encoder that the inputs call for, and put the features in the placeholders' places.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Tokens.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Their embeddings, if they are not plain ones.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 at placeholders of images, 2 at those of scenes.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.
            **media (`torch.Tensor`): Arguments of [`~GeodeModel.encode_media`].

        Returns:
            Embeddings of shape `(batch_size, sequence_length, hidden_size)`, and the features in them as
            [`~GeodeModel.encode_media`] returns them, none without media.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features, merged = {}, inputs_embeds
        # Every step of decoding comes here without media.
        if any(value is not None for name, value in media.items() if name != "use_visual_tokens"):
            given = {"mm_token_type_ids": mm_token_type_ids, "scene_mask": scene_mask, **media}
            rows, length = inputs_embeds.shape[:2]
            check_tensors(given, self.config, batch_size=rows, sequence_length=length)
            features = self.encode_media(scene_mask=scene_mask, **media)
            merged = self.merge_media(
                inputs_embeds, input_ids, mm_token_type_ids=mm_token_type_ids, scene_mask=scene_mask, **features
            )
        if self.training and torch.is_grad_enabled():
            merged = merged + self._zero_of_optional_parts().to(merged)
        return merged, features

    def _zero_of_optional_parts(self) -> torch.Tensor:
        """
        A zero that depends on the parts that only some batches use, as those of pictures do not use the injection.

        Distributed training waits for the gradient of each parameter from each rank, and a rank without it hangs the others.
        """
        parts = [part for part in (self.multi_modal_projector, self.feature_injection) if part is not None]
        trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
        return sum((parameter.flatten()[:0].sum() for parameter in trained), torch.zeros((), device=self.device))

    def encode_media(
        self,
        *,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
        video_frame_mask: torch.Tensor | None = None,
        scene_mask: torch.Tensor | None = None,
        rationale_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        use_visual_tokens: bool = True,
        **geometry: torch.Tensor,
    ) -> dict[str, torch.Tensor | None]:
        """
        Run every encoder that the inputs call for.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): Normalised images.
            pixel_values_videos (`torch.Tensor`, *optional*):
                Frames of scenes, of shape `(batch_size, num_scenes, num_frames, 3, height, width)`.
            video_features (`torch.Tensor`, *optional*):
                Instead of them, `last_hidden_state` of [`~GeodeModel.get_video_features`], of shape `(batch_size,
                num_scenes, num_frames, num_patches, vision_hidden_size)`. The projector still runs.
            video_frame_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes, num_frames)`, *optional*): Valid ones.
            scene_mask (`torch.BoolTensor` of shape `(batch_size, num_scenes)`, *optional*): Valid scenes.
            rationale_features (`torch.Tensor`, *optional*): Rationale tokens computed before, instead of geometry.
            mm_encoder_outputs (`dict`, *optional*):
                Outputs of `get_image_features` and `get_video_features` computed before, under `"image"` and `"video"`. Where
                `"encoder_digest"` is given as well, it must be [`~GeodeModel.encoder_digest`].
            vision_feature_layer (`int`, *optional*): Layer of the vision tower that is read; default of the config.
            vision_feature_select_strategy (`str`, *optional*): `"default"` drops the class token, `"full"` keeps it.
            use_visual_tokens (`bool`, defaults to `True`): False where the prompt has no placeholders for the frames of its
                scenes, which then only the rationale module sees.
            **geometry (`torch.Tensor`):
                Arguments of [`~GeodeModel.get_rationale_features`] or of [`~GeodeModel.reconstruct`].

        Returns:
            `dict[str, torch.Tensor | None]`: `image_features` and `scene_features` of shape `(num_tokens, hidden_size)`, and
            `rationale_features` of shape `(batch_size, num_scenes, num_rationale_tokens, hidden_size)`.
        """
        check_encoder_outputs(mm_encoder_outputs or {})
        check_layer(vision_feature_layer, self.config.vision_config.num_hidden_layers)
        given = mm_encoder_outputs or {}
        if given.get("encoder_digest") is not None:
            check_encoder_digest(given["encoder_digest"], self.encoder_digest())
        check_media(pixel_values_videos, video_features, vision_feature_layer, vision_feature_select_strategy)
        video_pixels = pixel_values_videos if video_features is None else video_features
        for name, pixels in (("image", pixel_values), ("video", video_pixels)):
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
        elif video_features is not None:
            video = self._stored_video_features(video_features, video_frame_mask, scene_mask)
        geometry = {name: tensor for name, tensor in geometry.items() if tensor is not None}
        frames, frame_mask, boxes = (
            geometry.pop(name, None) for name in ("geometry_frames", "geometry_frame_mask", "geometry_content_boxes")
        )
        if frames is not None and rationale_features is None:
            geometry |= self.reconstruct(frames, frame_mask, scene_mask, boxes)
        fused_features = None
        if rationale_features is not None:
            check_finite("`rationale_features`", rationale_features, "Compute them again.")
        if geometry.keys() & {*CLOUD_INPUTS, *TOKEN_INPUTS} and rationale_features is None:
            if video is None:
                raise ValueError(
                    "Geometry needs the frames that query it: give `pixel_values_videos` or `video_features` of the same "
                    "scenes."
                )
            rationale = self.get_rationale_features(
                video.last_hidden_state, video_frame_mask=video_frame_mask, scene_mask=scene_mask, **geometry
            )
            rationale_features, fused_features = rationale.rationale_features, rationale.fused_features
        scene_features = self._inject(video, fused_features, video_frame_mask, scene_mask)
        if not use_visual_tokens and scene_features is not None:
            # None of them, rather than no tensor: a placeholder that is there after all is an error.
            scene_features = scene_features[:0]
        return {
            "image_features": None if image is None else image.pooler_output.flatten(0, 1),
            "scene_features": scene_features,
            "rationale_features": rationale_features,
        }

    def _inject(self, video, fused_features, video_frame_mask, scene_mask):
        """The scenes' visual tokens, with fused features added to them if the configuration says so."""
        if video is None:
            return None
        tokens = torch.cat(list(video.pooler_output)) if len(video.pooler_output) else None
        if tokens is None or self.feature_injection is None or fused_features is None:
            return tokens
        mask = valid_frames(fused_features, video_frame_mask, scene_mask)
        return tokens + self.feature_injection(fused_features[mask]).flatten(0, 1).to(tokens)


__all__ = ["GeodeMediaMixin", "GeodeMultiModalProjector", "pixel_shuffle"]
