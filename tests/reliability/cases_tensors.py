# SPDX-License-Identifier: Apache-2.0
"""Bad tensors, given to `forward` and `generate` by a caller who made or changed them without the processor."""

from collections.abc import Callable
from functools import partial

import torch

from tests.reliability.common_reliability import Case, World


def called(method: str, *left_out: str, like: str = "input_ids", **changes: Callable[[torch.Tensor], object]):
    """
    Call the model with a batch of which some tensors are not what the processor made.

    Args:
        method (`str`): `"forward"` or `"generate"`.
        *left_out (`str`): Tensors that are not given.
        like (`str`): From which tensor one is made that the processor does not make.
        **changes (`Callable`): Make a tensor of the batch a bad one.

    Returns:
        `Callable`: The call, in a [`World`].
    """

    def call(world: World):
        inputs = {name: tensor for name, tensor in world.batch.items() if name not in left_out}
        for name, change in changes.items():
            inputs[name] = change(world.batch.get(name, world.batch[like]))
        if method == "forward":
            return world.model(**inputs)
        return world.model.generate(**inputs, max_new_tokens=1)

    return call


forward, generate = partial(called, "forward"), partial(called, "generate")


def with_token(token: int):
    """The prompts with another token at the end of the last one."""
    return lambda tokens: torch.cat([tokens.flatten()[:-1], torch.tensor([token])]).view_as(tokens)


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one number that is none."""
    return torch.cat([tensor.flatten()[:-1], torch.tensor([torch.nan])]).view_as(tensor)


def as_bytes(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 100).to(torch.uint8)


def half_of_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., : tensor.shape[-1] // 2]


def half_of_points(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :, : tensor.shape[2] // 2]


def one_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1]


def no_batch(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[0]


as_list, as_float, as_long = torch.Tensor.tolist, torch.Tensor.float, torch.Tensor.long
GEOMETRY = ("point_features", "point_coords", "point_grid_coords", "point_mask")
_F, _G = "`model.forward`", "`model.generate`"

CASES = (
    Case(_F, "nothing", lambda world: world.model(), ValueError, "got both or neither", "exactly one of `input_ids` and `inputs_embeds`"),
    Case(_F, "tokens in a list", forward(input_ids=as_list), TypeError, "got list", "Convert it with `torch.tensor`"),
    Case(_F, "tokens without a batch", forward(input_ids=no_batch), ValueError, "(batch_size, sequence_length), got (", "is given as `input_ids[None]`"),
    Case(_F, "tokens with a dimension too many", forward(input_ids=lambda ids: ids[None]), ValueError, "got (1, 2, ", "(batch_size, sequence_length)"),
    Case(_F, "no tokens", forward(input_ids=lambda ids: ids[:, :0]), ValueError, "got (2, 0)", "none is empty"),
    Case(_F, "tokens in floating point", forward(input_ids=as_float), TypeError, "got torch.float32", "Convert it with `.long()`"),
    Case(_F, "a token beyond the vocabulary", forward(input_ids=with_token(10**6)), ValueError, "got 1000000", "must hold tokens of the vocabulary, 0 to"),
    Case(_F, "a negative token", forward(input_ids=with_token(-1)), ValueError, "got -1", "Use the tokenizer of this checkpoint"),
    Case(_F, "embeddings of another width", forward("input_ids", inputs_embeds=lambda ids: torch.zeros(*ids.shape, 3)), ValueError, ", 3)", "`inputs_embeds` must have shape (batch_size, sequence_length, hidden_size="),
    Case(_F, "a mask of another length", forward(attention_mask=half_of_last), ValueError, "`attention_mask` must have shape (batch_size=2, sequence_length=", "`GeodeProcessor` makes it with the tokens"),
    Case(_F, "a mask of another batch", forward(attention_mask=one_row), ValueError, "got (1, ", "must have shape (batch_size=2, sequence_length="),
    Case(_F, "a mask without a batch", forward(attention_mask=no_batch), ValueError, "`attention_mask` must have shape (batch_size=2, sequence_length=", "`GeodeProcessor` makes it with the tokens"),
    Case(_F, "a mask in a list", forward(attention_mask=as_list), TypeError, "got list", "Convert it with `torch.tensor`"),
    Case(_F, "positions of another length", forward(position_ids=half_of_last), ValueError, "`position_ids` must have shape (batch_size=2, sequence_length=", "Leave them out"),
    Case(_F, "a cache that is none", forward(past_key_values=lambda ids: [ids]), TypeError, "got list", "must be a Cache"),
    Case(_F, "labels of another length", forward(labels=half_of_last), ValueError, "`labels` must have shape (batch_size=2, sequence_length=", "agree in their sizes"),
    Case(_F, "labels in floating point", forward(labels=as_float), TypeError, "got torch.float32", "Convert it with `.long()`"),
    Case(_F, "a label beyond the vocabulary", forward(labels=with_token(10**6)), ValueError, "got 1000000", "-100 for what is not learned"),
    Case(_F, "a negative label other than -100", forward(labels=with_token(-5)), ValueError, "got -5", "-100 for what is not learned"),
    Case(_F, "targets of another last dimension", forward(regression_targets=lambda ids: torch.full((*ids.shape, 6), torch.nan)), ValueError, ", 6)", "fill the rest of a smaller one with NaN"),
    Case(_F, "a target for each prompt", forward(regression_targets=lambda ids: torch.zeros(len(ids))), ValueError, "got (2,)", "max_dim=7)"),
    Case(_F, "targets in whole numbers", forward(regression_targets=lambda ids: ids[..., None].expand(-1, -1, 7)), TypeError, "got torch.int64", "must hold floating-point numbers"),
    Case(_F, "a target that is not at a control token", forward(regression_targets=lambda ids: torch.zeros(*ids.shape, 7)), ValueError, "at sample 0, position 0", "is no control token"),
    Case(_F, "`feedback_values` without feedback", forward(feedback_values=lambda ids: torch.zeros(*ids.shape, 7)), ValueError, "`drh_config.value_feedback` is false", "Drop them"),
    Case(_F, "images in a list", forward(pixel_values=as_list), TypeError, "got list", "Convert it with `torch.tensor`"),
    Case(_F, "images without a batch", forward(pixel_values=no_batch), ValueError, "(num_images, 3, height, width), got (3, ", "is given as `pixel_values[None]`"),
    Case(_F, "images of another size", forward(pixel_values=half_of_last), ValueError, "got (2, 3, ", "`GeodeProcessor` resizes them"),
    Case(_F, "images of 8 bits", forward(pixel_values=as_bytes), TypeError, "got torch.uint8", "scaled and normalised by `GeodeProcessor`"),
    Case(_F, "images of NaN", forward(pixel_values=with_nan), ValueError, "got 1 values that are not", "check what normalises them"),
    Case(_F, "an image too few", forward(pixel_values=one_row), ValueError, "Image features and image placeholders do not match", "Give tokens and media of the same chats"),
    Case(_F, "no images, but frames", forward("pixel_values"), ValueError, "Video features and video placeholders do not match", "Give tokens and media of the same chats"),
    Case(_F, "placeholders without media", lambda world: world.model(input_ids=world.batch["input_ids"]), ValueError, "got none of them", "`GeodeProcessor` returns both"),
    Case(_F, "frames without a batch", forward(pixel_values_videos=no_batch), ValueError, "got (1, 1, 3, ", "is given as `pixel_values_videos[None]`"),
    Case(_F, "frames of another batch", forward(pixel_values_videos=one_row), ValueError, "got (1, 1, 1, 3, ", "(batch_size=2, num_scenes, num_frames, 3, height, width)"),
    Case(_F, "no frames", forward(pixel_values_videos=lambda frames: frames[:, :, :0]), ValueError, "got (2, 1, 0, 3, ", "none is empty"),
    Case(_F, "frames of infinity", forward(pixel_values_videos=lambda frames: frames / 0), ValueError, "values that are not", "check what normalises them"),
    Case(_F, "a scene's mask in whole numbers", forward(scene_mask=as_long), TypeError, "got torch.int64", "Convert it with `.bool()`"),
    Case(_F, "a scene's mask of more scenes", forward(scene_mask=lambda mask: mask.expand(2, 3)), ValueError, "got (2, 3)", "`scene_mask` must have shape (batch_size=2, num_scenes=1)"),
    Case(_F, "a mask of more frames", forward(video_frame_mask=lambda mask: mask.expand(2, 1, 5)), ValueError, "got (2, 1, 5)", "(batch_size=2, num_scenes=1, num_frames=1)"),
    Case(_F, "geometry without frames", forward("pixel_values_videos", "video_frame_mask"), ValueError, "needs the frames", "give `pixel_values_videos` or `video_features`"),
    Case(_F, "frames without geometry", forward(*GEOMETRY), ValueError, "rationale placeholders, but no geometry", "Give the scene's geometry"),
    Case(_F, "points without coordinates", forward("point_coords"), ValueError, "got ['point_features', 'point_grid_coords']", "Give all of one form"),
    Case(_F, "points of another batch", forward(point_features=one_row), ValueError, "got (1, 1, ", "`point_features` must have shape (batch_size=2, num_scenes=1, "),
    Case(_F, "points of another width", forward(point_features=half_of_last), ValueError, ", 4)", "in_channels=9)"),
    Case(_F, "fewer coordinates than points", forward(point_coords=half_of_points), ValueError, "got (2, 1, ", "`point_coords` must have shape (batch_size=2, num_scenes=1, num_points="),
    Case(_F, "fewer voxels than points", forward(point_grid_coords=half_of_points), ValueError, "got (2, 1, ", "`point_grid_coords` must have shape (batch_size=2, num_scenes=1, num_points="),
    Case(_F, "voxels in floating point", forward(point_grid_coords=as_float), TypeError, "got torch.float32", "Convert it with `.long()`"),
    Case(_F, "points of NaN", forward(point_coords=with_nan), ValueError, "got 1 values that are not", "Drop those points"),
    Case(_F, "a mask of fewer points", forward(point_mask=half_of_last), ValueError, "got (2, 1, ", "`point_mask` must have shape (batch_size=2, num_scenes=1, num_points="),
    Case(_F, "a mask of points in whole numbers", forward(point_mask=as_long), TypeError, "got torch.int64", "Convert it with `.bool()`"),
    Case(_F, "cameras of another last dimension", forward(camera_poses=half_of_last), ValueError, ", 5)", "num_cameras, 11)"),
    Case(_F, "cameras without a batch", forward(camera_poses=no_batch), ValueError, "got (1, 8, 11)", "is given as `camera_poses[None]`"),
    Case(_F, "cameras of NaN", forward(camera_poses=with_nan), ValueError, "got 1 values that are not", "Leave out cameras that lost tracking"),
    Case(_F, "a mask of fewer cameras", forward(camera_mask=half_of_last), ValueError, "got (2, 1, 4)", "num_cameras=8)"),
    Case(_F, "a scale for each sample", forward(log_scale=lambda scale: scale[:, 0]), ValueError, "got (2,)", "`log_scale` must have shape (batch_size=2, num_scenes=1)"),
    Case(_F, "a scale of NaN", forward(log_scale=with_nan), ValueError, "got 1 values that are not", "`scale_known` is False"),
    Case(_F, "rationale tokens of another width", forward(rationale_features=lambda ids: torch.zeros(2, 1, 16, 3)), ValueError, "got (2, 1, 16, 3)", "num_rationale_tokens, hidden_size="),
    Case(_F, "encoders' outputs in a list", forward(mm_encoder_outputs=as_list), ValueError, "got list", "must be a dict with keys of ['encoder_digest', 'image', 'video']"),
    Case(_F, "encoders' outputs that are none", forward("pixel_values", mm_encoder_outputs=lambda ids: {"image": ids}), TypeError, "got Tensor", "Pass what `get_image_features(...)` returned"),
    Case(_F, "a layer that the vision tower lacks", forward(vision_feature_layer=lambda ids: 99), ValueError, "got 99", "Leave it out"),
    Case(_G, "media without tokens", generate("input_ids", "attention_mask"), ValueError, "got no `input_ids`", "Give what the processor returns as `**inputs`"),
    Case(_G, "a batch that is not unpacked", lambda world: world.model.generate(world.batch), TypeError, "got dict", "is given as `**inputs`"),
    Case(_G, "tokens without a batch", generate(input_ids=no_batch), ValueError, "(batch_size, sequence_length), got (", "is given as `input_ids[None]`"),
    Case(_G, "tokens in floating point", generate(input_ids=as_float), TypeError, "got torch.float32", "Convert it with `.long()`"),
    Case(_G, "a token beyond the vocabulary", generate(input_ids=with_token(10**6)), ValueError, "got 1000000", "must hold tokens of the vocabulary, 0 to"),
    Case(_G, "a mask of another length", generate(attention_mask=half_of_last), ValueError, "`attention_mask` must have shape (batch_size=2, sequence_length=", "`GeodeProcessor` makes it with the tokens"),
    Case(_G, "a mask in a list", generate(attention_mask=as_list), TypeError, "got list", "Convert it with `torch.tensor`"),
    Case(_G, "a cache that is none", generate(past_key_values=lambda ids: (ids,)), TypeError, "got tuple", "must be a Cache"),
    Case(_G, "images of 8 bits", generate(pixel_values=as_bytes), TypeError, "got torch.uint8", "scaled and normalised by `GeodeProcessor`"),
    Case(_G, "images of NaN", generate(pixel_values=with_nan), ValueError, "got 1 values that are not", "check what normalises them"),
    Case(_G, "an image too few", generate(pixel_values=one_row), ValueError, "Image features and image placeholders do not match", "Give tokens and media of the same chats"),
    Case(_G, "placeholders without media", lambda world: world.model.generate(world.batch["input_ids"], max_new_tokens=1), ValueError, "got none of them", "`GeodeProcessor` returns both"),
    Case(_G, "kinds of tokens of another length", generate(mm_token_type_ids=half_of_last), ValueError, "got (2, ", "`mm_token_type_ids` must have shape (batch_size=2, sequence_length="),
    Case(_G, "fewer coordinates than points", generate(point_coords=half_of_points), ValueError, "got (2, 1, ", "`point_coords` must have shape (batch_size=2, num_scenes=1, num_points="),
    Case(_G, "cameras of another last dimension", generate(camera_poses=half_of_last), ValueError, ", 5)", "num_cameras, 11)"),
    Case(_G, "`feedback_values` without feedback", generate(feedback_values=lambda ids: torch.zeros(*ids.shape, 7)), ValueError, "`drh_config.value_feedback` is false", "Drop them"),
    Case(_G, "a tensor of another name", generate(pixel_value=one_row), ValueError, "['pixel_value']", "are not used by the model"),
)  # fmt: skip

__all__ = ["CASES"]
