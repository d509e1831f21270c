# SPDX-License-Identifier: Apache-2.0
"""
Checks of the tensors that a caller gives the model.

They read shapes and dtypes, which waits for no device and can be traced. Values are read where that costs nothing: of tokens on
the CPU, of the prompt of `generate` once, and of what an encoder is about to read.
"""

import torch
from transformers.cache_utils import Cache
from transformers.utils import is_tracing

from geode.configuration.configuration_geode import GeodeConfig

from .rationale_geode import CAMERA_POSE_DIM


_WHOLE, _LONG, _BOOLEAN, _FLOAT = "whole numbers", "64-bit whole numbers", "booleans", "floating-point numbers"
_DTYPES = {_WHOLE: (torch.int64, torch.int32), _LONG: (torch.int64,), _BOOLEAN: (torch.bool,)}
_REMEDIES = {
    _WHOLE: "Convert it with `.long()`.",
    _LONG: "Convert it with `.long()`.",
    _BOOLEAN: "Convert it with `.bool()`.",
    _FLOAT: "Convert it with `.float()`; 8-bit images are scaled and normalised by `GeodeProcessor`.",
}
_TOKENS, _SCENES = ("batch_size", "sequence_length"), ("batch_size", "num_scenes")
_EMBEDS, _VALUES = (*_TOKENS, "hidden_size"), (*_TOKENS, "max_dim")
_FRAMES, _GEOMETRY_FRAMES = (*_SCENES, "num_frames"), (*_SCENES, "num_geometry_frames")
_POINTS, _POINT_TOKENS = (*_SCENES, "num_points"), (*_SCENES, "num_tokens")
_PICTURE = (3, "height", "width")
# Dimensions and, where another kind would fail or mean something else, the kind of numbers. A size that two tensors name is
# the same in both, but those of `_FREE`.
_FORMS = {
    "input_ids": (_TOKENS, _WHOLE),
    "inputs_embeds": (_EMBEDS, _FLOAT),
    "media_embeds": (_EMBEDS, _FLOAT),
    "feedback_embeds": (_EMBEDS, _FLOAT),
    "labels": (_TOKENS, _LONG),
    "regression_targets": (_VALUES, _FLOAT),
    "feedback_values": (_VALUES, _FLOAT),
    "mm_token_type_ids": (_TOKENS, _WHOLE),
    "pixel_values": (("num_images", *_PICTURE), _FLOAT),
    "pixel_values_videos": ((*_FRAMES, *_PICTURE), _FLOAT),
    "video_features": ((*_FRAMES, "num_patches", "vision_hidden_size"), None),
    "video_frame_mask": (_FRAMES, _BOOLEAN),
    "scene_mask": (_SCENES, _BOOLEAN),
    "point_features": ((*_POINTS, "in_channels"), None),
    "point_coords": ((*_POINTS, 3), None),
    "point_grid_coords": ((*_POINTS, 3), _WHOLE),
    "point_mask": (_POINTS, _BOOLEAN),
    "point_tokens": ((*_POINT_TOKENS, "point_hidden_size"), None),
    "point_token_positions": ((*_POINT_TOKENS, 3), None),
    "point_token_mask": (_POINT_TOKENS, _BOOLEAN),
    "camera_poses": ((*_SCENES, "num_cameras", CAMERA_POSE_DIM), None),
    "camera_mask": ((*_SCENES, "num_cameras"), _BOOLEAN),
    "log_scale": (_SCENES, None),
    "scale_known": (_SCENES, _BOOLEAN),
    "geometry_frames": ((*_GEOMETRY_FRAMES, *_PICTURE), _FLOAT),
    "geometry_frame_mask": (_GEOMETRY_FRAMES, _BOOLEAN),
    "geometry_content_boxes": ((*_GEOMETRY_FRAMES, 4), _WHOLE),
    "question_input_ids": (("batch_size", "question_length"), _WHOLE),
    "question_attention_mask": (("batch_size", "question_length"), None),
    "rationale_features": ((*_SCENES, "num_rationale_tokens", "hidden_size"), None),
}
_FREE = frozenset(("height", "width"))  # the vision tower and the reconstructor have their own
_MAY_BE_EMPTY = frozenset(("num_rationale_tokens",))
_ENCODER_OUTPUTS = {"image": ("pooler_output",), "video": ("pooler_output", "last_hidden_state"), "encoder_digest": ()}


def check_tensors(tensors: dict, config: GeodeConfig, **sizes: int) -> None:
    """
    Raise unless tensors have the kinds and shapes that the model takes, and agree in the sizes that they share.

    Args:
        tensors (`dict`): Arguments of the model by name. None stands for one that was not given.
        config ([`GeodeConfig`]): Of the model.
        **sizes (`int`): What is known of them before, such as `batch_size`.

    Raises:
        TypeError: If one is no tensor, or of another kind of numbers.
        ValueError: If one has another number of dimensions, another size, or no entries.
    """
    sizes["hidden_size"] = config.text_config.hidden_size
    sizes["in_channels"], sizes["point_hidden_size"] = config.point_config.in_channels, config.point_config.hidden_size
    for name, (dims, kind) in _FORMS.items():  # in this order, so that tokens and frames decide the sizes
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a tensor, got {type(tensor).__name__}. Convert it with `torch.tensor`; what a processor "
                "returns is given as `**inputs`."
            )
        if not _is_of_kind(tensor, kind):
            raise TypeError(f"`{name}` must hold {kind}, got {tensor.dtype}. {_REMEDIES[kind]}")
        expected = [dim if isinstance(dim, int) else sizes.get(dim) for dim in dims]
        fits = tensor.ndim == len(dims) and all(
            (size > 0 or dim in _MAY_BE_EMPTY) if want is None else size == want
            for dim, want, size in zip(dims, expected, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(_wrong_shape(name, tensor, dims, expected))
        sizes.update((dim, size) for dim, size in zip(dims, tensor.shape, strict=True) if dim not in _FREE)


def _is_of_kind(tensor: torch.Tensor, kind: str | None) -> bool:
    if kind is None or kind == _FLOAT:
        return kind is None or tensor.is_floating_point()
    return tensor.dtype in _DTYPES[kind]


def _wrong_shape(name: str, tensor: torch.Tensor, dims: tuple, expected: list) -> str:
    words = [str(dim) if want in (None, dim) else f"{dim}={want}" for dim, want in zip(dims, expected, strict=True)]
    remedy = "The tensors of a batch agree in their sizes and none is empty, as `GeodeProcessor` makes them."
    if tensor.ndim == len(dims) - 1:
        remedy = f"It lacks a dimension; that of a single sample is given as `{name}[None]`."
    elif dims[-1] == "max_dim":
        remedy = "Its last dimension is that of the largest value; fill the rest of a smaller one with NaN."
    return f"`{name}` must have shape ({', '.join(words)}), got {tuple(tensor.shape)}. {remedy}"


def check_prompt(
    config: GeodeConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None = None,
    *,
    attention_mask=None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    **aligned: torch.Tensor | None,
) -> None:
    """
    Raise unless a prompt and what accompanies its tokens agree. Values are not read.

    Args:
        config ([`GeodeConfig`]): Of the model.
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): Tokens.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*): Their embeddings.
        attention_mask (`torch.Tensor`, *optional*):
            Of shape `(batch_size, key_length)` or `(batch_size or 1, heads, sequence_length, key_length)`. `key_length` counts
            the tokens of the cache as well. What is no tensor is that of the library.
        position_ids (`torch.Tensor` of shape `(batch_size or 1, sequence_length)`, *optional*): Positions.
        past_key_values (`Cache`, *optional*): A cache, whose length is not read.
        **aligned (`torch.Tensor`, *optional*): Further tensors for [`check_tensors`].

    Raises:
        TypeError: As [`check_tensors`], or if the cache is none.
        ValueError: As [`check_tensors`], or if mask or positions are of another number of rows or tokens.
    """
    check_tensors({"input_ids": input_ids, "inputs_embeds": inputs_embeds, **aligned}, config)
    rows, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
    if past_key_values is not None and not isinstance(past_key_values, Cache):
        raise TypeError(
            f"`past_key_values` must be a Cache, got {type(past_key_values).__name__}. Pass what an earlier output holds, or a "
            "new `DynamicCache`."
        )
    _check_mask(attention_mask, rows, length, has_cache=past_key_values is not None)
    if position_ids is not None:
        _check_positions(position_ids, rows, length)


def _check_positions(position_ids, rows: int, length: int) -> None:
    if not isinstance(position_ids, torch.Tensor):
        raise TypeError(
            f"`position_ids` must be a tensor, got {type(position_ids).__name__}. Leave them out otherwise."
        )
    # Some language models count along three axes, which come first.
    fits = position_ids.ndim in (2, 3) and position_ids.shape[-2] in (1, rows) and position_ids.shape[-1] == length
    if not fits:
        raise ValueError(
            f"`position_ids` must have shape (batch_size={rows}, sequence_length={length}), got "
            f"{tuple(position_ids.shape)}. Leave them out to count what `attention_mask` shows."
        )


def _check_mask(mask, rows: int, length: int, *, has_cache: bool) -> None:
    if isinstance(mask, list | tuple):
        raise TypeError(
            f"`attention_mask` must be a tensor, got {type(mask).__name__}. Convert it with `torch.tensor`."
        )
    if not isinstance(mask, torch.Tensor):
        return  # the library's own
    is_of_pairs = mask.ndim == 4
    fits = mask.shape[0] in (1, rows) and mask.shape[2] == length if is_of_pairs else mask.shape[:-1] == (rows,)
    if not fits or mask.shape[-1] < length or (mask.shape[-1] > length and not has_cache):
        more = " or more, as the cache has tokens too" if has_cache else ""
        raise ValueError(
            f"`attention_mask` must have shape (batch_size={rows}, sequence_length={length}{more}), or (batch_size, 1, "
            f"sequence_length, key_length) for pairs, got {tuple(mask.shape)}. `GeodeProcessor` makes it with the tokens."
        )


def is_decoding_step(input_ids: torch.Tensor | None, past_key_values: Cache | None) -> bool:
    """Whether this is one more token behind a cache: its prompt was checked, and nothing may slow it down."""
    return past_key_values is not None and isinstance(input_ids, torch.Tensor) and input_ids.shape[1:] == (1,)


def check_token_values(input_ids: torch.Tensor, config: GeodeConfig, *, name: str = "input_ids") -> None:
    """
    Raise unless tokens are of the vocabulary, or of `labels` -100. Waits for the device.

    On a GPU, PyTorch answers such a token by stopping the whole process' use of it.
    """
    if is_tracing(input_ids) or input_ids.device.type == "meta":
        return
    tokens = input_ids if name == "input_ids" else input_ids[input_ids != -100]
    if not tokens.numel():
        return
    low, high = (value.item() for value in tokens.aminmax())
    size = config.text_config.vocab_size
    if low < 0 or high >= size:
        raise ValueError(
            f"`{name}` must hold tokens of the vocabulary, 0 to {size - 1}, got {low if low < 0 else high}. Use the tokenizer "
            "of this checkpoint" + (", and -100 for what is not learned." if name == "labels" else ".")
        )


def check_no_placeholders(input_ids: torch.Tensor, config: GeodeConfig) -> None:
    """Raise if tokens wait for media that were not given. Waits for the device."""
    if is_tracing(input_ids) or input_ids.device.type == "meta":
        return
    for token_id, media in (
        (config.image_token_id, "`pixel_values`, `pixel_values_videos` or `video_features`"),
        (config.rationale_token_id, "a scene's geometry or `rationale_features`"),
    ):
        count = int((input_ids == token_id).sum())
        if count:
            raise ValueError(
                f"`input_ids` has {count} placeholders (token {token_id}) for {media}, got none of them. Give the media with "
                "the tokens, as `GeodeProcessor` returns both."
            )


def check_learned(config: GeodeConfig, max_dim: int, input_ids, inputs_embeds=None, *, labels=None, **values) -> None:
    """Raise unless labels, and values for the regression head, are aligned with the tokens, and labels are tokens."""
    if labels is None and all(tensor is None for tensor in values.values()):
        return
    tensors = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "labels": labels, **values}
    check_tensors(tensors, config, max_dim=max_dim)
    if labels is not None and labels.device.type == "cpu":
        check_token_values(labels, config, name="labels")


def check_encoder_outputs(given) -> None:
    """Raise unless these are outputs of the model's encoders, by name."""
    if not isinstance(given, dict) or set(given) - set(_ENCODER_OUTPUTS):
        got = sorted(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"`mm_encoder_outputs` must be a dict with keys of {sorted(_ENCODER_OUTPUTS)}, got {got}.")
    for name, output in given.items():
        lacking = [field for field in _ENCODER_OUTPUTS[name] if output is not None and not hasattr(output, field)]
        if lacking:
            raise TypeError(
                f"`mm_encoder_outputs[{name!r}]` must have {lacking}, got {type(output).__name__}. Pass what "
                f"`get_{name}_features(...)` returned."
            )


def check_finite(name: str, tensor: torch.Tensor, remedy: str) -> None:
    """Raise if numbers that an encoder is about to read are NaN or infinite: all its tokens would be. Waits for the device."""
    if is_tracing(tensor) or tensor.device.type == "meta" or not tensor.numel():
        return
    # The sum of one that is not finite is none either, and far cheaper than a look at each.
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if not total.isfinite() and not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise ValueError(f"{name} must be finite, got {count} values that are not, of {tensor.numel()}. {remedy}")


__all__ = [
    "check_encoder_outputs",
    "check_finite",
    "check_learned",
    "check_no_placeholders",
    "check_prompt",
    "check_tensors",
    "check_token_values",
    "is_decoding_step",
]
