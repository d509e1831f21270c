# SPDX-License-Identifier: Apache-2.0
"""What `geode demo` does: ask the embedded scene its questions, and compare with the truth."""

import json
import math
import os
import time
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from geode import embedded_scene
from geode.commands import GEOMETRY_FOLDER, answer_question, load_checkpoint
from geode.data.synthetic_rooms.draw import draw_scene
from geode.data.synthetic_rooms.questions import prompt_of
from geode.modeling_geode.answers_geode import Answer, Box3D, format_number


PICTURE = "scene.png"


class Comparison(NamedTuple):
    """
    An answer beside the truth.

    Args:
        kind (`str`): `"number"`, `"box"` or `"choice"`.
        predicted (`str`): What the model said, with its unit.
        truth (`str`): What is true, with the same unit.
        error (`float`, *optional*): Absolute error in that unit; between centres, in metres, for a box; 0 or 1 for a
            choice. None if the model gave no such answer.
        unit (`str`, *optional*): The unit of `error`; None for a choice.
        relative_error (`float`, *optional*): A number's error over its truth.
    """

    kind: str
    predicted: str
    truth: str
    error: float | None
    unit: str | None = None
    relative_error: float | None = None


def run_demo(out: str | os.PathLike) -> None:
    """
    Ask the embedded scene its questions with the tiny checkpoint, print a line for each, and draw the scene.

    Args:
        out (`str` or `os.PathLike`):
            The folder for the picture; it is made if needed.

    Raises:
        FileExistsError: If `out` is a file.
    """
    start = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = embedded_scene()
    rows = read_questions(folder / "questions.jsonl")
    checkpoint = load_checkpoint()
    comparisons: list[Comparison] = []
    boxes: list[tuple[str, object]] = []
    for row in rows:
        timed = answer_question(checkpoint, folder / "room.mp4", prompt_of(row), geometry=folder / GEOMETRY_FOLDER)
        comparison = compare(row, timed.answer)
        comparisons.append(comparison)
        boxes += [(_subject(row["question"]), box) for box in timed.answer.boxes]
        print(f"answer: {row['question']} {describe(comparison)}, {timed.seconds:.2f} s", flush=True)
    draw_scene(folder, out / PICTURE, answers=boxes)
    print(summarize(comparisons, seconds=time.perf_counter() - start))
    print("note: the tiny checkpoint was trained on other rendered rooms, and knows nothing else.")
    print(f"picture: {out / PICTURE}")


def read_questions(path: Path) -> list[dict]:
    """Return the rows of a file with one question per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(row: dict, answer: Answer) -> Comparison:
    """
    Compare an answer with a question's truth.

    Args:
        row (`dict`):
            A row of the embedded scene's questions: `ground_truth`, and `value` with `unit`, or `box`, or `options`.
        answer ([`Answer`]):
            The model's answer.

    Returns:
        [`Comparison`]: Both as text, and the error.

    Example:
        >>> from geode.modeling_geode.answers_geode import Answer, Measurement
        >>> answer = Answer(text="180", values=[Measurement("<REG>", 180.0, "cm", 1.8)], boxes=[])
        >>> compare({"value": 150.0, "unit": "cm", "ground_truth": "150"}, answer)[1:]
        ('180.00 cm', '150.00 cm', 30.0, 'cm', 0.2)
    """
    said = " ".join(answer.text.split())
    if row.get("box") is not None:
        box = Box3D.from_values(row["box"])
        if not answer.boxes:
            return Comparison("box", said, box.text, None)
        return Comparison("box", answer.boxes[0].text, box.text, math.dist(answer.boxes[0].center, box.center), "m")
    if row.get("value") is not None:
        truth, unit = row["value"], row["unit"]
        found = [item.value for item in answer.values if item.unit == unit and isinstance(item.value, float)]
        if not found:
            return Comparison("number", said, with_unit(truth, unit), None)
        error = abs(found[0] - truth)
        relative = error / abs(truth) if truth else None
        return Comparison("number", with_unit(found[0], unit), with_unit(truth, unit), error, unit, relative)
    return Comparison("choice", said, row["ground_truth"], float(said[:1].upper() != row["ground_truth"]))


def with_unit(value: float, unit: str) -> str:
    """Write a number with its unit; a count has none."""
    return format_number(value, unit) + ("" if unit == "count" else f" {unit}")


def describe(comparison: Comparison) -> str:
    """Return the part of a line that says prediction, truth and error."""
    text = f"-> {comparison.predicted} (truth {comparison.truth}"
    if comparison.error is None:
        return f"{text}, no {comparison.kind} in the answer)"
    if comparison.unit is None:
        return f"{text}, {'wrong' if comparison.error else 'right'})"
    return f"{text}, error {with_unit(comparison.error, comparison.unit)})"


def summarize(comparisons: list[Comparison], *, seconds: float) -> str:
    """Return one line about all answers."""
    parts = [f"{len(comparisons)} questions in {seconds:.1f} s"]
    relative = [item.relative_error for item in comparisons if item.relative_error is not None]
    if relative:
        parts.append(f"{len(relative)} numbers with a median error of {100 * median(relative):.1f} %")
    centers = [item.error for item in comparisons if item.kind == "box" and item.error is not None]
    if centers:
        parts.append(f"{len(centers)} boxes with a mean error of {mean(centers):.2f} m between centres")
    choices = [item.error for item in comparisons if item.kind == "choice"]
    if choices:
        parts.append(f"{choices.count(0.0)} of {len(choices)} choices right")
    unanswered = sum(item.error is None for item in comparisons)
    if unanswered:
        parts.append(f"{unanswered} without the value that was asked for")
    return f"summary: {'; '.join(parts)}"


def _subject(question: str) -> str:
    """Return the object that a request to locate names: the words after the last article."""
    return question.rstrip(".?! ").rpartition("the ")[2]
