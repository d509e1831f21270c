# SPDX-License-Identifier: Apache-2.0
"""
ViCA-thinking-2.68k: one question about each of 2,680 videos, answered with written thoughts.

Source: https://huggingface.co/datasets/nkkbr/ViCA-thinking-2.68k. Answers mark their parts with `<|im_start|>`, which opens
a turn in the language model's own format, so the parts are taken apart here and the marks dropped. Keys of the rows
are assumed to be those of ViCA-322K, and the licence is not stated where we could read it. By the authors' report, answers of
this form lower the score on VSI-Bench: use the thoughts as rationales, not the form.
"""

import re

from datasets import Features

from geode.data.readers.common import CONVERSATIONS, TEXT, medium_of, names_its_row, optional_text, scene_of
from geode.data.schemas import Record, paired_turns, text_fields


NAME = "ViCA-thinking-2.68k"
REPO_ID = "nkkbr/ViCA-thinking-2.68k"
LICENSE = None
DATA_FILES = ("*.json", "*.jsonl", "**/*.json", "**/*.jsonl")
FEATURES = Features({"id": TEXT, "video": TEXT, "image": TEXT, "question_type": TEXT, "conversations": CONVERSATIONS})
_PART = re.compile(r"<\|im_start\|>(think|response|final)")
_MARK = re.compile(r"<\|im_(?:start|end)\|>")
_BOXED = re.compile(r"\\boxed\s*\{")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\s*\{")
_DISPLAY = re.compile(r"\\[\[\]]")


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    r"""
    Read a row: the thoughts become `rationale`, the response the answer, and what `\boxed` holds `final`.

    Args:
        row (`dict`): `video` (or `image`) and `conversations`.
        file (`str`): The file's path below the dataset's root.
        index (`int`): The row's number in the file.

    Returns:
        [`Record`]: The record, always text. Parts that the answer lacks are None; without a response, the answer is `final`.

    Raises:
        ValueError: If the row is malformed, or an answer has neither response nor final part.
    """
    media_type, media = medium_of(row)
    pairs, thoughts, final = [], [], None
    for question, answer in paired_turns(row.get("conversations")):
        parts = split_answer(answer)
        response = parts["response"] or parts["final"]
        if response is None:
            raise ValueError(f"An answer must have a response or a final part, got {answer!r:.200}.")
        pairs.append([_unmarked(question), response])
        thoughts += [parts["think"]] if parts["think"] else []
        final = parts["final"]
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type=media_type,
        media=media,
        question_type=optional_text(row, "question_type"),
        rationale="\n".join(thoughts) or None,
        final=final,
        scene=scene_of(media),
        **text_fields(pairs),
    )


def split_answer(answer: str) -> dict[str, str | None]:
    r"""
    Take an answer with marked parts apart.

    Args:
        answer (`str`): The answer; without marks it is a response.

    Returns:
        `dict[str, str]`: `"think"`, `"response"` and `"final"`; None where there is none. No mark stays.

    Example:
    ```python
    >>> split_answer("<|im_start|>think\nTwo.\n<|im_start|>final\n\\[\\boxed{\\text{2}}\\]")
    {'think': 'Two.', 'response': None, 'final': '2'}

    ```
    """
    before, *marked = _PART.split(answer)
    texts = {"think": [], "response": [before], "final": []}
    for name, text in zip(marked[::2], marked[1::2], strict=True):
        texts[name].append(text)
    parts = {name: _unmarked("\n".join(entries)) or None for name, entries in texts.items()}
    found = _boxed(parts["final"] or parts["response"] or "")
    if found is not None:
        content, around = found
        if parts["final"] is None:
            parts["response"] = around or None
        parts["final"] = content or None
    elif parts["final"] is not None:
        parts["final"] = _DISPLAY.sub("", parts["final"]).strip() or None
    # What was taken out of a text may have joined a mark.
    return {name: _unmarked(text or "") or None for name, text in parts.items()}


def _unmarked(text: str) -> str:
    # Again until nothing is left: a mark that is removed may leave another one behind.
    while _MARK.search(text):
        text = _MARK.sub("", text)
    return text.strip()


def _boxed(text: str) -> tuple[str, str] | None:
    r"""Return what the last `\boxed{}` holds, without `\text{}`, and the text around it; None if there is none."""
    starts = list(_BOXED.finditer(text))
    if not starts:
        return None
    content, end = _braced(text, starts[-1].end())
    around = _DISPLAY.sub("", text[: starts[-1].start()] + text[end:]).strip()
    while (match := _TEXT.match(content)) and _braced(content, match.end())[1] == len(content):
        content = _braced(content, match.end())[0]
    return content.strip(), around


def _braced(text: str, start: int) -> tuple[str, int]:
    """Return the text up to the brace that closes the one before `start`, and the place behind it."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place].strip(), place + 1
    return text[start:].strip(), len(text)


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row", "split_answer"]
