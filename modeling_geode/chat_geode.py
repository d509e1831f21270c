# SPDX-License-Identifier: Apache-2.0
"""Chats: the template, the checks of turns and parts, and the separation of markup from what users wrote."""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from geode.configuration.configuration_geode import default_control_tokens

from .answers_geode import convert_to_si
from .batching_geode import check_unicode
from .shown_geode import shown


try:
    from jinja2 import TemplateError
except ImportError:
    TemplateError = ValueError  # without jinja2, transformers says so when a template is rendered

IMAGE_TOKEN = "<IMG_CONTEXT>"
IMAGE_START_TOKEN = "<img>"
IMAGE_END_TOKEN = "</img>"
RATIONALE_TOKEN = "<spatio>"
TURN_START_TOKEN = "<|im_start|>"
TURN_END_TOKEN = "<|im_end|>"
# A name for a video in templates and trusted text. It is not a token: the processor replaces it by the video's frames.
VIDEO_PLACEHOLDER = "<video>"

CHAT_TEMPLATE = (
    "{%- macro body(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'video' -%}{{ '<video>\\n' }}"
    "{%- elif part['type'] == 'image' -%}{{ '<IMG_CONTEXT>\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- elif part['type'] == 'value' -%}{{ part['token'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ body(message['content']) + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}"
    "{%- else -%}{{ body(message['content']) + '<|im_end|>\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
ROLES = ("system", "user", "assistant")
MEDIA_KEYS = {"image": ("image", "path", "url"), "video": ("video", "path", "url")}
_PART_KEYS = {
    "text": {"text"},
    "image": {"image", "path", "url", "geometry"},
    "video": {"video", "path", "url", "geometry"},
    "scene": {"scene"},
    "value": {"token", "value", "unit"},
}
_VISUAL_TYPES = ("image", "video", "scene")
PLACEHOLDER = re.compile(f"{re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_PLACEHOLDER)}")
# What a text part becomes while the template runs: its number between two private-use characters. The text itself is
# absent then, so nothing that a user writes can act as markup.
_SENTINEL = re.compile("\ue000([0-9]+)\ue001")
# The library keeps compiled templates, and one that tracks where the assistant speaks is in use until it is rendered.
_RENDERING = threading.Lock()
# What a template may raise while it runs, beside its own kind: it adds, indexes and calls itself.
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class PromptPiece(NamedTuple):
    """A stretch of a prompt. In trusted text special tokens are tokens; elsewhere they are plain characters."""

    text: str
    is_trusted: bool
    is_generated: bool


def special_token_ids(tokens: Sequence[str], tokenizer) -> dict[str, int]:
    """Return the identifiers of tokens that must be special, or the text of users could hold them."""
    known = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    missing = [token for token in tokens if token not in known]
    if missing:
        raise ValueError(
            f"The tokenizer lacks the special tokens {missing}. Add them with `geode.data.tokenizer.add_geode_tokens`."
        )
    return {token: known[token] for token in tokens}


def with_token_ids(control_tokens: dict[str, dict] | None, tokenizer) -> dict[str, dict]:
    """Check the ids of control tokens against the tokenizer; the defaults take the tokenizer's."""
    is_default = control_tokens is None
    entries = default_control_tokens() if is_default else control_tokens
    if not isinstance(entries, Mapping) or not entries:
        raise TypeError(
            f"`control_tokens` must be a dict of tokens, got {shown(entries)}. Take those of the configuration."
        )
    ids = special_token_ids(list(entries), tokenizer)
    if is_default:
        return {token: {**entry, "token_id": ids[token]} for token, entry in entries.items()}
    for token, entry in entries.items():
        if not isinstance(entry, Mapping) or not {"token_id", "dim", "kind"} <= entry.keys():
            raise ValueError(
                f"`control_tokens[{token!r}]` must have `token_id`, `dim` and `kind`, got {shown(entry)}. Take those of the "
                "configuration."
            )
        if entry["token_id"] != ids[token]:
            raise ValueError(
                f"`control_tokens[{token!r}]` has `token_id` {entry['token_id']}, and the tokenizer has "
                f"{ids[token]}. Take the tokenizer that belongs to the configuration."
            )
    return entries


def checked_chat(chat, control_tokens: Mapping[str, dict]) -> list[dict]:
    """Return the turns of a conversation with their content as lists of parts, every one checked."""
    if not isinstance(chat, list | tuple) or not chat:
        raise ValueError(f"A conversation must be a list of at least one turn, got {chat!r}.")
    turns = []
    for turn in chat:
        keys = {key for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else set()
        if keys != {"role", "content"}:
            raise ValueError(
                f"A turn must have `role` and `content` and nothing else, got {sorted(map(str, keys))} in {shown(turn)}."
            )
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            raise ValueError(f"`role` must be one of {ROLES}, got {role!r}.")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list | tuple):
            raise ValueError(f"`content` must be a string or a list of parts, got {type(content).__name__}.")
        turns.append({"role": role, "content": [_checked_part(part, role, control_tokens) for part in content]})
    return turns


def _checked_part(part, role: str, control_tokens: Mapping[str, dict]) -> dict:
    """Return a part without its None entries, which columns of unlike parts have in a dataset."""
    part = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PART_KEYS:
        raise ValueError(f"A part must have a `type` of {sorted(_PART_KEYS)}, got {shown(kind)}.")
    unknown = sorted(map(str, part.keys() - _PART_KEYS[kind] - {"type"}))
    if unknown:
        raise ValueError(f"A part of type {kind!r} takes {sorted(_PART_KEYS[kind])}, got also {unknown}.")
    if kind == "text":
        _check_text(part.get("text"))
    if kind in MEDIA_KEYS:
        given = [key for key in MEDIA_KEYS[kind] if key in part]
        if len(given) != 1:
            raise ValueError(f"A part of type {kind!r} needs exactly one of {MEDIA_KEYS[kind]}, got {given}.")
    if kind == "scene" and "scene" not in part:
        raise ValueError("A part of type 'scene' needs a `scene`, what `model.encode_scene` returned.")
    if kind in _VISUAL_TYPES:
        if role != "user":
            raise ValueError(f"A part of type {kind!r} belongs into a user turn, got one in a turn of {role!r}.")
    if kind == "value":
        if role != "assistant":
            raise ValueError(f"A part of type 'value' belongs into an assistant turn, got one in a turn of {role!r}.")
        token = part.get("token")
        if not isinstance(token, str) or token not in control_tokens:
            raise ValueError(f"`token` of a value must be one of {sorted(control_tokens)}, got {shown(token)}.")
    return part


def _check_text(text) -> None:
    if not isinstance(text, str):
        raise ValueError(f"A part of type 'text' needs a string `text`, got {shown(text)}.")
    check_unicode("text", text)


def si_values(part: Mapping[str, Any], entry: Mapping[str, Any]) -> list[float]:
    """Return the numbers of a value part in SI."""
    value, unit, dim = part.get("value"), part.get("unit"), entry["dim"]
    is_vector = isinstance(value, list | tuple) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim > 0)
    numbers = list(value) if is_vector else [value]
    if len(numbers) != dim or any(number is None for number in numbers):
        raise ValueError(f"The `value` of {part['token']} must have {dim} numbers, got {shown(value)}.")
    if entry["kind"] != "scalar" and unit not in (None, "m"):
        raise ValueError(f"The `value` of {part['token']} must be in SI, without a `unit` or with 'm', got {unit!r}.")
    return [convert_to_si(number, unit if entry["kind"] == "scalar" else None) for number in numbers]


def ordered_parts(chat: list[dict]) -> Iterator[dict]:
    """Yield the parts in the order of the prompt: in each turn the media first."""
    for turn in chat:
        yield from (part for part in turn["content"] if part["type"] in _VISUAL_TYPES)
        yield from (part for part in turn["content"] if part["type"] not in _VISUAL_TYPES)


def for_template(chat: list[dict], texts: list[str] | None = None) -> list[dict]:
    """Return what the template sees. With `texts`, each text goes there and a sentinel into its place."""

    def visible(part: dict) -> dict:
        if part["type"] == "scene":
            return {"type": "video"}
        if part["type"] != "text":
            return {key: part[key] for key in ("type", "token") if key in part}
        if texts is None:
            return {"type": "text", "text": part["text"]}
        texts.append(part["text"])
        return {"type": "text", "text": f"\ue000{len(texts) - 1}\ue001"}

    return [{"role": turn["role"], "content": [visible(part) for part in turn["content"]]} for turn in chat]


def render_chat(template: str, chat: list[dict], settings: dict) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and where in it the assistant speaks."""
    tracks = bool(GENERATION_TAG.search(template)) and not settings["continue_final_message"]
    try:
        with _RENDERING:
            (rendered,), spans = render_jinja_template(
                conversations=[chat], chat_template=template, return_assistant_tokens_mask=tracks, **settings
            )
    except _TEMPLATE_ERRORS as error:
        raise ValueError(
            f"The chat template {template[:80]!r} cannot render this conversation: {type(error).__name__}: {str(error)[:200]}. "
            "Correct the template, or leave `chat_template` out."
        ) from error
    return rendered, spans[0] if tracks else []


def split_rendered(rendered: str, spans: Sequence[tuple[int, int]], texts: Sequence[str]) -> Iterator[PromptPiece]:
    """Cut a rendered chat into trusted markup and plain text, at the ends of the assistant's turns as well."""
    cuts = sorted({0, len(rendered), *(edge for span in spans for edge in span)})
    for start, end in pairwise(cuts):
        is_generated = any(first <= start and end <= last for first, last in spans)
        plain = ""
        for match in _SENTINEL.finditer(rendered, start, end):
            if match.start() > start:
                # Text parts that touch are tokenised as one.
                if plain:
                    yield PromptPiece(plain, is_trusted=False, is_generated=is_generated)
                yield PromptPiece(rendered[start : match.start()], is_trusted=True, is_generated=is_generated)
                plain = ""
            number = int(match[1])
            if number >= len(texts):
                raise ValueError(
                    f"The chat has {len(texts)} texts, and the chat template wrote a private-use mark that stands for number "
                    f"{number}. Take the marks U+E000 and U+E001 out of the template."
                )
            plain += texts[number]
            start = match.end()
        if plain:
            yield PromptPiece(plain, is_trusted=False, is_generated=is_generated)
        if start < end:
            yield PromptPiece(rendered[start:end], is_trusted=True, is_generated=is_generated)


__all__ = [
    "CHAT_TEMPLATE",
    "GENERATION_TAG",
    "IMAGE_END_TOKEN",
    "IMAGE_START_TOKEN",
    "IMAGE_TOKEN",
    "MEDIA_KEYS",
    "PLACEHOLDER",
    "RATIONALE_TOKEN",
    "TURN_END_TOKEN",
    "TURN_START_TOKEN",
    "VIDEO_PLACEHOLDER",
    "PromptPiece",
    "checked_chat",
    "for_template",
    "ordered_parts",
    "render_chat",
    "si_values",
    "special_token_ids",
    "split_rendered",
    "with_token_ids",
]
