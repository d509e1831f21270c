# SPDX-License-Identifier: Apache-2.0
"""The processor of GEODE: from chats, images, videos and geometry to model inputs, and from outputs to answers."""

import inspect
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .answers_geode import Answer, asked_unit, split_at_tokens
from .batching_geode import (
    check_count,
    check_geometry_options,
    check_same_number,
    check_sequences,
    check_texts,
    flatten,
    or_tensors,
    pad_rows,
    pad_scenes,
)
from .chat_geode import (
    CHAT_TEMPLATE,
    GENERATION_TAG,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    MEDIA_KEYS,
    PLACEHOLDER,
    RATIONALE_TOKEN,
    TURN_END_TOKEN,
    TURN_START_TOKEN,
    VIDEO_PLACEHOLDER,
    PromptPiece,
    checked_chat,
    for_template,
    ordered_parts,
    render_chat,
    si_values,
    special_token_ids,
    split_rendered,
    with_token_ids,
)
from .hub_geode import CodeOnHubMixin
from .scene_encoding_geode import scenes_to_model_inputs
from .scene_geode import SceneGeometry, collate_scenes
from .shown_geode import shown
from .vggt_processing_geode import VggtImageProcessor
from .video_processing_geode import GeodeImageProcessor, load_frame_sets, load_image, local_path


logger = logging.get_logger(__name__)
# Whether special tokens are split is a state of the tokenizer, which each call sets before it encodes: between two threads, markup
# would become text, and text markup. Not of the processor, which is copied and pickled.
_ENCODING = threading.Lock()


@dataclass
class _Medium:
    """An image or a video. With geometry, and always for a video, it is a scene. One that is encoded has no pixels."""

    kind: str
    num_frames: int
    frames: list[np.ndarray]
    is_scene: bool
    num_rationale_tokens: int = 0
    geometry: SceneGeometry | None = None
    geometry_frames: torch.Tensor | None = None
    content_boxes: torch.Tensor | None = None


@dataclass
class _Prompt:
    """One sample before tokenisation. `values` is None where control tokens may stand without values."""

    pieces: list[PromptPiece]
    media: list[_Medium]
    values: list[list[float]] | None = None


@dataclass
class _Row:
    """One sample after tokenisation."""

    input_ids: list[int]
    is_generated: list[bool]
    mm_token_type_ids: list[int]


@dataclass(frozen=True)
class _Options:
    """What a call of the processor may set."""

    num_frames: int
    num_geometry_frames: int
    num_rationale_tokens: int
    padding_side: str
    use_geometry: bool = True
    padding: bool | str = True
    return_tensors: str | None = "pt"


class GeodeProcessor(CodeOnHubMixin, ProcessorMixin):
    """
    Turns chats about images, videos and 3D scenes into model inputs, and model outputs into answers.

    [`~GeodeProcessor.apply_chat_template`] with `tokenize=True` is the way for text that users wrote: no special token
    of the tokenizer can come out of it. `__call__` and `tokenize=False` take and give *trusted* text, in which special
    tokens are tokens.

    > Parameters of the parts

    Args:
        image_processor ([`GeodeImageProcessor`]):
            Resizes and normalises images and frames.
        tokenizer (`PreTrainedTokenizerBase`):
            A Qwen2-like tokenizer with GEODE's tokens, see `geode.data.tokenizer.add_geode_tokens`. Its
            `padding_side` is respected: generation needs `"left"`.
        chat_template (`str`, *optional*):
            Jinja template; the default is Qwen2's ChatML form with a turn's media before its text.

    > Parameters of videos and geometry

    Args:
        num_frames (`int`, defaults to 16):
            Frames of a video that the language model sees.
        num_geometry_frames (`int`, defaults to 16):
            Frames for the reconstructor, and the largest number of cameras of given geometry.
        num_rationale_tokens (`int`, defaults to 16):
            Rationale tokens per scene, `drm_config.num_rationale_tokens`. A call may ask for fewer.
        image_seq_length (`int`, defaults to 256):
            Visual tokens per image or frame, `config.image_seq_length`.
        grid_size (`float`, defaults to 0.02):
            Voxel edge of the point encoder in metres.
        max_points (`int`, *optional*, defaults to 100000):
            Largest number of voxels of a scene; None has no limit.
        geometry_frame_size (`int`, *optional*):
            Width in pixels of frames for the model's reconstructor, a multiple of 14. None: the model has none.

    > Parameters of the model's options

    Args:
        question_conditioned (`bool`, defaults to `False`):
            Also emit the last user turn's text as `question_input_ids`, for `drm_config.question_conditioned`.
        control_tokens (`dict[str, dict]`, *optional*):
            `config.control_tokens`; the default has `<REG>` and `<3DBBOX>` with the tokenizer's ids.
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template: str | None = None,
        num_frames: int = 16,
        num_geometry_frames: int = 16,
        num_rationale_tokens: int = 16,
        image_seq_length: int = 256,
        grid_size: float = 0.02,
        max_points: int | None = 100_000,
        geometry_frame_size: int | None = None,
        question_conditioned: bool = False,
        control_tokens: dict[str, dict] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.num_frames = num_frames
        self.num_geometry_frames = num_geometry_frames
        self.num_rationale_tokens = num_rationale_tokens
        self.image_seq_length = image_seq_length
        self.grid_size = grid_size
        self.max_points = max_points
        self.geometry_frame_size = geometry_frame_size
        self.question_conditioned = question_conditioned
        for name in ("num_frames", "num_geometry_frames", "num_rationale_tokens", "image_seq_length"):
            check_count(name, getattr(self, name))
        check_geometry_options(grid_size, max_points, geometry_frame_size)
        self.control_tokens = with_token_ids(control_tokens, tokenizer)
        self.image_token, self.rationale_token = IMAGE_TOKEN, RATIONALE_TOKEN
        needed = [IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN, RATIONALE_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN]
        self._token_ids = special_token_ids([*needed, *self.control_tokens], tokenizer)
        self._user_ids = self._encode("user")
        self.image_token_id = self._token_ids[IMAGE_TOKEN]
        self.rationale_token_id = self._token_ids[RATIONALE_TOKEN]

    # ---- inputs ----

    def __call__(self, images=None, text=None, videos=None, geometry=None, scene=None, **kwargs) -> BatchFeature:
        """
        Make model inputs from trusted text.

        The text is taken as it is: special tokens in it are tokens. Use [`~GeodeProcessor.apply_chat_template`] for
        text that you did not write.

        Args:
            images (`list`, *optional*):
                One image for each `<IMG_CONTEXT>` in `text`, in order over all texts; nested lists are flattened. See
                `load_image` for what an image may be.
            text (`str` or `list[str]`):
                Prompts. `<IMG_CONTEXT>` stands for an image and `<video>` for a video; the processor writes the rest
                of the markup.
            videos (`list`, *optional*):
                One video for each `<video>` in `text`, in order over all texts. See `load_video_frames` for what a
                video may be. A video that is a list of frames must stand in a list of videos.
            geometry (`list`, *optional*):
                For each video its geometry (a [`SceneGeometry`] or a saved one's folder) or None.
            scene ([`SceneEncoding`] or `list`, *optional*):
                What `model.encode_scene` returned, in place of videos: one for all texts, or one for each. Each text has one
                `<video>` then.
            **kwargs:
                Options of the call:

                - `num_frames`, `num_geometry_frames`, `num_rationale_tokens` (`int`) override the processor's own;
                  the last may only be lowered.
                - `use_geometry` (`bool`, defaults to `True`): False leaves geometry and rationale tokens out, even
                  where geometry is given.
                - `padding_side` (`str`): `"left"` or `"right"`; default of the tokenizer.
                - `padding` (`bool`, defaults to `True`): Rows are padded to the longest; False is an error where they
                  differ.
                - `return_tensors` (`str`): `"pt"` or None. Tensors are PyTorch's in both cases.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`; with media
            also `mm_token_type_ids` (1 at images, 2 at scenes), `pixel_values` and what `get_rationale_features`
            takes; with encoded scenes what [`SceneEncoding.to_model_inputs`] returns.

        Raises:
            ValueError: If the numbers of placeholders and media differ, or a scene has no geometry and no
            reconstructor.
        """
        if text is None:
            raise ValueError(
                "`text` is required: a prompt with one `<IMG_CONTEXT>` per image and one `<video>` per video."
            )
        options = self._options(kwargs)
        texts = list(text) if isinstance(text, list | tuple) else [text]
        check_texts(texts)
        images = flatten(images) if isinstance(images, list | tuple) else [images][: images is not None]
        videos = list(videos) if isinstance(videos, list | tuple) else [videos][: videos is not None]
        geometry = list(geometry) if isinstance(geometry, list | tuple) else [geometry][: geometry is not None]
        check_same_number(IMAGE_TOKEN, texts, "images", len(images))
        scenes = _scenes_of_texts(scene, texts, len(videos))
        if not scenes:
            check_same_number(VIDEO_PLACEHOLDER, texts, "videos", len(videos))
        if geometry and len(geometry) != len(videos):
            raise ValueError(
                f"`geometry` must have one entry (or None) for each of the {len(videos)} videos, got {len(geometry)}."
            )
        pending_images = iter(images)
        pending_videos = iter(zip(videos, geometry or [None] * len(videos), strict=True))
        prompts = []
        for index, sample in enumerate(texts):
            media = []
            for match in PLACEHOLDER.finditer(sample):
                if match[0] == IMAGE_TOKEN:
                    media.append(self._load_medium("image", next(pending_images), None, options))
                elif scenes:
                    media.append(self._encoded_medium(scenes[index], options))
                else:
                    media.append(self._load_medium("video", *next(pending_videos), options))
            prompts.append(_Prompt([PromptPiece(sample, is_trusted=True, is_generated=False)], media))
        return BatchFeature({**self._build(prompts, options), **scenes_to_model_inputs(scenes)})

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools=None,
        documents=None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        Render chats, and with `tokenize=True` make model inputs from them.

        Text parts never become special tokens when tokenised here, whatever they contain. A turn's media come before
        its text, in any order of its parts.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Turns with `role` (`"system"`, `"user"` or `"assistant"`) and `content`, a string or a list of parts:

                - `{"type": "text", "text": ...}`;
                - `{"type": "image", "image" | "path" | "url": ...}` and `{"type": "video", "video" | "path" | "url":
                  ...}` in user turns, with an optional `"geometry"`: a [`SceneGeometry`] or a saved one's folder;
                - `{"type": "scene", "scene": ...}` in user turns: what `model.encode_scene` returned, in place of its
                  video;
                - `{"type": "value", "token": "<REG>", "value": 2.31, "unit": "m"}` in assistant turns: a value to
                  learn or to remember. Without a unit it is in SI. A box is a list of cx, cy, cz, dx, dy, dz in
                  metres and yaw.
            chat_template (`str`, *optional*):
                Another template than the processor's.
            tools (*optional*):
                Not supported.
            documents (*optional*):
                Not supported.
            add_generation_prompt (`bool`, defaults to `False`):
                End with the head of an assistant turn.
            continue_final_message (`bool`, defaults to `False`):
                Leave the last turn open.
            return_assistant_tokens_mask (`bool`, defaults to `False`):
                Also return `assistant_masks`, 1 at the tokens of assistant turns, their end tokens included.
            tokenize (`bool`, defaults to `False`):
                Return model inputs. Otherwise text, which must then be trusted.
            return_tensors (`str`, *optional*):
                See `__call__`.
            return_dict (`bool`, defaults to `False`):
                Return all inputs; otherwise only `input_ids`.
            processor_kwargs (`dict`, *optional*):
                Options of `__call__`.
            **kwargs:
                The same options, as keywords.

        Returns:
            `str` or `list[str]` if `tokenize` is False, otherwise [`BatchFeature`] or `torch.Tensor` with a batch
            axis.

        Raises:
            ValueError: If a conversation is not as described.
        """
        if tools or documents:
            raise ValueError("`tools` and `documents` are not supported. Write what they say into a system turn.")
        options = self._options({**(processor_kwargs or {}), "return_tensors": or_tensors(return_tensors), **kwargs})
        is_batched = isinstance(conversation, list | tuple) and any(
            isinstance(chat, list | tuple) for chat in conversation
        )
        chats = [checked_chat(chat, self.control_tokens) for chat in (conversation if is_batched else [conversation])]
        template = self._template(chat_template)
        settings = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if not tokenize:
            rendered = [render_chat(template, for_template(chat), settings)[0] for chat in chats]
            return rendered if is_batched else rendered[0]
        if return_assistant_tokens_mask and not GENERATION_TAG.search(template):
            raise ValueError("`return_assistant_tokens_mask` needs a chat template with `{% generation %}` tags.")
        prompts = [self._prompt_from_chat(chat, template, settings, options) for chat in chats]
        batch = self._build(
            prompts,
            options,
            is_prompt=add_generation_prompt,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
        )
        return batch if return_dict else batch["input_ids"]

    def prepare_scene(self, video=None, *, frames=None, geometry=None, **kwargs) -> BatchFeature:
        """
        Make the inputs of `model.encode_scene` for one scene.

        Args:
            video (`str` or `os.PathLike`, *optional*):
                A video, see `load_video_frames`. Exactly one of `video` and `frames` is needed.
            frames (*optional*):
                The frames of a video, in the forms that `load_video_frames` takes.
            geometry ([`SceneGeometry`] or path, *optional*):
                The scene's geometry; without it the model's reconstructor makes it.
            **kwargs:
                `num_frames`, `num_geometry_frames` and `use_geometry`, see `__call__`.

        Returns:
            [`BatchFeature`]: `pixel_values_videos` of shape `(1, 1, num_frames, 3, height, width)` and the other
            tensors of the scene.

        Raises:
            ValueError: If both or none of `video` and `frames` are given, or there is no geometry and no
                reconstructor.
        """
        if (video is None) == (frames is None):
            raise ValueError("Exactly one of `video` and `frames` must be given.")
        options = self._options(kwargs)
        medium = self._load_medium("video", frames if video is None else video, geometry, options)
        return BatchFeature(self._scene_inputs([[medium]], options))

    def _options(self, kwargs: Mapping[str, Any]) -> _Options:
        names = {entry.name for entry in fields(_Options)}
        unknown = sorted(kwargs.keys() - names)
        if unknown:
            raise TypeError(f"Unknown options {unknown}. The processor takes {sorted(names)}.")
        counts = ("num_frames", "num_geometry_frames", "num_rationale_tokens")
        defaults = {name: getattr(self, name) for name in counts}
        given = {name: value for name, value in kwargs.items() if value is not None}
        options = _Options(**{**defaults, "padding_side": self.tokenizer.padding_side, **given})
        for name in defaults:
            check_count(name, getattr(options, name))
        if options.num_rationale_tokens > self.num_rationale_tokens:
            raise ValueError(
                f"`num_rationale_tokens` may be at most {self.num_rationale_tokens}, the number that the model has, "
                f"got {options.num_rationale_tokens}."
            )
        if not isinstance(options.use_geometry, bool):
            raise TypeError(f"`use_geometry` must be True or False, got {shown(options.use_geometry)}.")
        if options.padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` must be 'left' or 'right', got {options.padding_side!r}.")
        if options.padding not in (True, False, "longest"):
            raise ValueError(f"`padding` must be True, False or 'longest', got {options.padding!r}.")
        if options.return_tensors != "pt":
            raise ValueError(f"`return_tensors` must be 'pt' or None, got {options.return_tensors!r}.")
        return options

    def _template(self, chat_template: str | None) -> str:
        template = chat_template or self.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str):
            raise ValueError(
                "The processor has several chat templates and none is called 'default'. Pass `chat_template`."
            )
        return template

    def _load_medium(self, kind: str, source, geometry, options: _Options) -> _Medium:
        if not options.use_geometry:
            geometry = None
        if isinstance(geometry, str | os.PathLike):
            geometry = SceneGeometry.load(local_path(geometry, what="geometry"))
        if geometry is not None and not hasattr(geometry, "to_model_inputs"):
            raise TypeError(f"`geometry` must be a SceneGeometry or the path of one, got {type(geometry).__name__}.")
        if kind == "image":
            is_scene = geometry is not None
            return _Medium(kind, 1, [load_image(source)], is_scene, is_scene * options.num_rationale_tokens, geometry)
        num_rationale_tokens = options.use_geometry * options.num_rationale_tokens
        if geometry is not None or not options.use_geometry:
            ((frames, _),) = load_frame_sets(source, num_frames=[options.num_frames])
            return _Medium(kind, len(frames), frames, True, num_rationale_tokens, geometry)
        if self.geometry_frame_size is None:
            raise ValueError(
                "A video needs geometry, and neither was any given nor has this model a reconstructor. Give `geometry=...` (a "
                "SceneGeometry or the path of one) with the video, attach a reconstructor to the model and set the processor's "
                "`geometry_frame_size`, or pass `use_geometry=False` to answer from the pictures alone."
            )
        counts = [options.num_frames, options.num_geometry_frames]
        (frames, _), (geometry_frames, _) = load_frame_sets(source, num_frames=counts)
        resized = VggtImageProcessor(image_size=self.geometry_frame_size)(geometry_frames)
        tensors = {"geometry_frames": resized["pixel_values"], "content_boxes": resized["content_boxes"]}
        return _Medium(kind, len(frames), frames, True, num_rationale_tokens, **tensors)

    def _encoded_medium(self, scene, options: _Options) -> _Medium:
        """Return the place of a scene that the model has encoded already."""
        if not hasattr(scene, "rationale_tokens"):
            raise TypeError(f"`scene` must be a SceneEncoding, got {type(scene).__name__}.")
        stored = 0 if scene.rationale_tokens is None else len(scene.rationale_tokens)
        needed = options.num_rationale_tokens * (options.use_geometry and stored > 0)
        if needed > stored:
            raise ValueError(
                f"`num_rationale_tokens` may be at most {stored}, the number that the encoded scene has, got {needed}."
            )
        return _Medium("video", scene.num_frames, [], is_scene=True, num_rationale_tokens=needed)

    def _prompt_from_chat(self, chat: list[dict], template: str, settings: dict, options: _Options) -> _Prompt:
        texts, media, values = [], [], []
        for part in ordered_parts(chat):
            if part["type"] == "scene":
                media.append(self._encoded_medium(part["scene"], options))
            elif part["type"] in MEDIA_KEYS:
                source = next(part[key] for key in MEDIA_KEYS[part["type"]] if key in part)
                media.append(self._load_medium(part["type"], source, part.get("geometry"), options))
            elif part["type"] == "value":
                values.append(si_values(part, self.control_tokens[part["token"]]))
        rendered, spans = render_chat(template, for_template(chat, texts), settings)
        return _Prompt(list(split_rendered(rendered, spans, texts)), media, values)

    # ---- tokens ----

    def _build(
        self,
        prompts: Sequence[_Prompt],
        options: _Options,
        *,
        is_prompt: bool = False,
        return_assistant_tokens_mask: bool = False,
    ) -> BatchFeature:
        """Tokenise and pad prompts, and add their pixels, scenes, values and questions."""
        # Prompts about one scene hold the same long markup, which is tokenised once.
        known: dict[str, list[int]] = {}
        rows = [self._tokenize(prompt, known) for prompt in prompts]
        lengths = {len(row.input_ids) for row in rows}
        if not options.padding and len(lengths) > 1:
            raise ValueError(f"Rows of lengths {sorted(lengths)} make no tensor. Pass `padding=True`.")
        if is_prompt and len(lengths) > 1 and options.padding_side == "right":
            logger.warning_once(
                "Prompts of several lengths were padded on the right, and a model continues the padding then. Pass "
                "`padding_side='left'` to generate."
            )
        side = options.padding_side
        data = {
            "input_ids": pad_rows([row.input_ids for row in rows], self._pad_id(), side),
            "attention_mask": pad_rows([[1] * len(row.input_ids) for row in rows], 0, side),
        }
        if return_assistant_tokens_mask:
            data["assistant_masks"] = pad_rows([[int(flag) for flag in row.is_generated] for row in rows], 0, side)
        if any(prompt.media for prompt in prompts):
            data["mm_token_type_ids"] = pad_rows([row.mm_token_type_ids for row in rows], 0, side)
        images = [medium.frames[0] for prompt in prompts for medium in prompt.media if not medium.is_scene]
        # The pixels of encoded scenes are not needed again.
        if images:
            data["pixel_values"] = self._pixels(images)
        scenes = [[medium for medium in prompt.media if medium.is_scene and medium.frames] for prompt in prompts]
        if any(scenes):
            data |= self._scene_inputs(scenes, options)
        if any(prompt.values for prompt in prompts):
            data["regression_targets"] = self._regression_targets(data["input_ids"], prompts)
        if self.question_conditioned:
            questions = [self._question_ids(row.input_ids) for row in rows]
            data["question_input_ids"] = pad_rows(questions, self._pad_id(), side)
            data["question_attention_mask"] = pad_rows([[1] * len(question) for question in questions], 0, side)
        return BatchFeature(data)

    def _tokenize(self, prompt: _Prompt, known: dict[str, list[int]]) -> _Row:
        input_ids, is_generated, pending = [], [], iter(prompt.media)
        for piece in prompt.pieces:
            if piece.is_trusted:
                expanded = PLACEHOLDER.sub(lambda match: self._expand(match[0], next(pending, None)), piece.text)
                if expanded not in known:
                    known[expanded] = self._encode(expanded)
                ids = known[expanded]
            else:
                ids = self._encode_plain(piece.text)
            input_ids += ids
            is_generated += [piece.is_generated] * len(ids)
        types = [
            kind
            for medium in prompt.media
            for kind in [1 + medium.is_scene] * (medium.num_frames * self.image_seq_length)
        ]
        num_rationale_tokens = sum(medium.num_rationale_tokens for medium in prompt.media)
        for token, expected in ((IMAGE_TOKEN, len(types)), (RATIONALE_TOKEN, num_rationale_tokens)):
            found = input_ids.count(self._token_ids[token])
            if found != expected:
                raise ValueError(
                    f"The prompt must have {expected} `{token}` for its media, and it has {found}. The chat template "
                    "or text must name each medium once and leave the markup to the processor."
                )
        pending_types = iter(types)
        mm_token_type_ids = [next(pending_types) if token == self.image_token_id else 0 for token in input_ids]
        self._check_values(input_ids, prompt.values)
        return _Row(input_ids, is_generated, mm_token_type_ids)

    def _expand(self, placeholder: str, medium: _Medium | None) -> str:
        """The markup of one medium, without the newline that ends it."""
        kind = "image" if placeholder == IMAGE_TOKEN else "video"
        if medium is None or medium.kind != kind:
            raise ValueError(
                f"The chat template wrote `{placeholder}` where the conversation has "
                f"{'no further medium' if medium is None else medium.kind}. It must keep the order of the media."
            )
        picture = IMAGE_START_TOKEN + IMAGE_TOKEN * self.image_seq_length + IMAGE_END_TOKEN
        if kind == "image":
            text = picture
        else:
            text = "\n".join(f"Frame{index}: {picture}" for index in range(1, medium.num_frames + 1))
        if medium.num_rationale_tokens:
            text += "\n" * bool(text) + RATIONALE_TOKEN * medium.num_rationale_tokens
        return text

    def _encode(self, text: str) -> list[int]:
        return self._ids_of(text, split_special_tokens=False)

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._ids_of(text, split_special_tokens=True)
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        forged = special.intersection(ids)
        if forged:
            raise ValueError(
                f"The tokenizer makes {self.tokenizer.convert_ids_to_tokens(sorted(forged))} out of plain text. Use a "
                "tokenizer that honours `split_special_tokens`."
            )
        return ids

    def _ids_of(self, text: str, *, split_special_tokens: bool) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False}
        with _ENCODING:
            return self.tokenizer(text, **options)["input_ids"]

    def _pad_id(self) -> int:
        if self.tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer needs a `pad_token`, and has none. Set one, such as '<|endoftext|>'.")
        return self.tokenizer.pad_token_id

    def _check_values(self, input_ids: list[int], values: list[list[float]] | None) -> None:
        control_ids = {entry["token_id"] for entry in self.control_tokens.values()}
        found = sum(token in control_ids for token in input_ids)
        if values is not None and found != len(values):
            raise ValueError(
                f"The conversation has {len(values)} value parts and its prompt {found} control tokens. The chat "
                "template must write the token of each value part once."
            )

    def _regression_targets(self, input_ids: torch.Tensor, prompts: Sequence[_Prompt]) -> torch.Tensor:
        """Values in SI at their control tokens, NaN elsewhere."""
        dim = max(entry["dim"] for entry in self.control_tokens.values())
        control_ids = torch.tensor([entry["token_id"] for entry in self.control_tokens.values()])
        targets = torch.full((*input_ids.shape, dim), float("nan"))
        rows, columns = torch.isin(input_ids, control_ids).nonzero(as_tuple=True)
        values = [value for prompt in prompts for value in prompt.values]
        for row, column, value in zip(rows.tolist(), columns.tolist(), values, strict=True):
            targets[row, column, : len(value)] = torch.tensor(value)
        return targets

    def _question_ids(self, input_ids: Sequence[int]) -> list[int]:
        """The tokens of the last user turn's text; those after the last medium if the text has no turns."""
        ids, role = list(input_ids), self._user_ids
        starts = [
            index + 1 + len(role)
            for index, token in enumerate(ids)
            if token == self._token_ids[TURN_START_TOKEN] and ids[index + 1 : index + 1 + len(role)] == role
        ]
        ids = ids[starts[-1] :] if starts else ids
        if self._token_ids[TURN_END_TOKEN] in ids:
            ids = ids[: ids.index(self._token_ids[TURN_END_TOKEN])]
        media_ids = {self._token_ids[IMAGE_END_TOKEN], self.rationale_token_id}
        last = max((index for index, token in enumerate(ids) if token in media_ids), default=-1)
        ids = ids[last + 1 :]
        # The newline after the role or after the media belongs to the template.
        return ids[1:] if ids and not self.tokenizer.decode(ids[:1]).strip() else ids

    # ---- pixels and scenes ----

    def _pixels(self, frames: list[np.ndarray]) -> torch.Tensor:
        return self.image_processor(frames, input_data_format="channels_last", return_tensors="pt")["pixel_values"]

    def _scene_inputs(self, scenes: list[list[_Medium]], options: _Options) -> dict[str, torch.Tensor]:
        """Frames and geometry of scenes, padded; `scenes` has a list for each sample."""
        every = [medium for sample in scenes for medium in sample]
        lead = (len(scenes), max(len(sample) for sample in scenes))
        pixels = self._pixels([frame for medium in every for frame in medium.frames])
        pixels = pixels.split([len(medium.frames) for medium in every])
        scene_mask = torch.tensor([[column < len(sample) for column in range(lead[1])] for sample in scenes])
        videos, frame_mask = pad_scenes(pixels, scene_mask)
        data = {"pixel_values_videos": videos, "video_frame_mask": frame_mask, "scene_mask": scene_mask}
        if not options.use_geometry:
            return data
        if all(medium.geometry is not None for medium in every):
            limits = {"max_points": self.max_points, "num_cameras": options.num_geometry_frames}
            geometry = [
                [medium.geometry.to_model_inputs(self.grid_size, **limits) for medium in sample] for sample in scenes
            ]
            return {**collate_scenes(geometry), **data}
        if any(medium.geometry is not None for medium in every):
            given = sum(medium.geometry is not None for medium in every)
            raise ValueError(
                f"All scenes of a batch must bring geometry, or none: {given} of {len(every)} do. Split the batch, "
                "or give the rest their `geometry`."
            )
        sizes = {tuple(medium.geometry_frames.shape[-2:]) for medium in every}
        if len(sizes) > 1:
            raise ValueError(
                f"Frames for the reconstructor must have one size in a batch, got (height, width) of {sorted(sizes)}. "
                "Split the batch by aspect ratio, or give `geometry`."
            )
        stacked = [medium.geometry_frames for medium in every]
        data["geometry_frames"], data["geometry_frame_mask"] = pad_scenes(stacked, scene_mask)
        data["geometry_content_boxes"], _ = pad_scenes([medium.content_boxes for medium in every], scene_mask)
        return data

    # ---- outputs ----

    def post_process_answers(
        self,
        output,
        input_ids: torch.Tensor,
        *,
        skip_special_tokens: bool = True,
        abstain_above: float | None = None,
    ) -> list[Answer]:
        """
        Read answers from what `generate` returned.

        Each control token is replaced by its value in the unit that the last user turn asks for, see `asked_unit`.

        Args:
            output (`GeodeGenerateOutput`):
                The result of `generate(..., return_dict_in_generate=True)`. A tensor of sequences will do if no
                control token was generated.
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
                The prompts.
            skip_special_tokens (`bool`, defaults to `True`):
                Leave special tokens out of the text.
            abstain_above (`float`, *optional*):
                Write "unknown" for a number with a wider interval than plus or minus this share of it. Needs a model with
                `drh_config.uncertainty`.

        Returns:
            `list[Answer]`: One for each sequence; those of one prompt stand together.

        Raises:
            ValueError: If values are missing or a value is not finite, or sequences and prompts do not fit.
        """
        is_bare = isinstance(output, torch.Tensor)
        check_sequences(output if is_bare else getattr(output, "sequences", output), input_ids)
        sequences = output if is_bare else output.sequences
        num_prompts = len(input_ids)
        if num_prompts == 0 or len(sequences) % num_prompts:
            raise ValueError(
                f"`output` must have a whole number of sequences for each of the {num_prompts} prompts in "
                f"`input_ids`, got {len(sequences)}."
            )
        prompt_length = input_ids.shape[1] if is_bare else output.prompt_length
        units = [
            asked_unit(self.tokenizer.decode(self._question_ids(row), skip_special_tokens=True))
            for row in input_ids.tolist()
        ]
        answers = []
        for index, row in enumerate(sequences.tolist()):
            values = None if is_bare else [value.tolist() for value in output.values[index]]
            options = {"unit": units[index * num_prompts // len(sequences)], "abstain_above": abstain_above}
            if not is_bare and output.intervals is not None:
                options["intervals"] = [ends if ends is None else ends.tolist() for ends in output.intervals[index]]
            answers.append(self._answer(row[prompt_length:], values, skip_special_tokens, options))
        return answers

    def _answer(self, ids: list[int], values, skip_special_tokens: bool, options: dict) -> Answer:
        by_id = {entry["token_id"]: token for token, entry in self.control_tokens.items()}
        segments, tokens = split_at_tokens(ids, by_id)
        texts = [self.tokenizer.decode(segment, skip_special_tokens=skip_special_tokens) for segment in segments]
        if values is None and tokens:
            raise ValueError(
                f"The sequence has {len(tokens)} control tokens, and a bare tensor has no values for them. Call "
                "`generate(..., return_dict_in_generate=True)` and pass what it returns."
            )
        if len(values or []) != len(tokens):
            raise ValueError(
                f"The sequence has {len(tokens)} control tokens and `output.values` {len(values)} values."
            )
        kinds = {token: entry["kind"] for token, entry in self.control_tokens.items()}
        return Answer.from_segments(texts, tokens, values or [], kinds=kinds, **options)

    # ---- loading and saving ----

    @property
    def model_input_names(self) -> list[str]:
        """Names of all inputs that the processor may give to the model."""
        return [
            "input_ids",
            "attention_mask",
            "mm_token_type_ids",
            "mm_encoder_outputs",
            "rationale_features",
            "pixel_values",
            "pixel_values_videos",
            "video_frame_mask",
            "scene_mask",
            "point_features",
            "point_coords",
            "point_grid_coords",
            "point_mask",
            "camera_poses",
            "camera_mask",
            "log_scale",
            "scale_known",
            "geometry_frames",
            "geometry_frame_mask",
            "geometry_content_boxes",
            "question_input_ids",
            "question_attention_mask",
            "regression_targets",
        ]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The library looks the image processor up among registered classes and remote code. Its class is known here,
        # so that this class loads with neither. Private hook of transformers, checked on 5.23.
        own = set(inspect.signature(cls.__init__).parameters)
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        # With a configuration at hand, the tokenizer's loader does not read the model's, which names remote code.
        config = PreTrainedConfig()
        tokenizer = cls._load_tokenizer_from_pretrained(
            "tokenizer", pretrained_model_name_or_path, **{**kwargs, "config": config}
        )
        kwargs.pop("trust_remote_code", None)
        return [GeodeImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]


def _scenes_of_texts(scene, texts: Sequence[str], num_videos: int) -> list:
    """The encoded scene of each text; empty where there is none."""
    if scene is None:
        return []
    scenes = list(scene) if isinstance(scene, list | tuple) else [scene] * len(texts)
    found = [text.count(VIDEO_PLACEHOLDER) for text in texts]
    if num_videos or len(scenes) != len(texts) or set(found) != {1}:
        raise ValueError(
            f"`scene` must stand in place of videos: one for all texts or one for each, and each text has one "
            f"`{VIDEO_PLACEHOLDER}`. Got {len(scenes)} scenes and {num_videos} videos for {len(texts)} texts with {found} "
            "of them. Give videos, or scenes, or several scenes as parts of a chat."
        )
    return scenes


__all__ = ["GeodeProcessor"]
