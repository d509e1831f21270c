# SPDX-License-Identifier: Apache-2.0
"""
The score of VSI-Bench, as its authors' scorer gives it, and as a metric of `evaluate`.

This file stands alone, so that `evaluate.load` can read it from its folder or from a Space.

Source: Yang et al., "Thinking in Space" (arXiv 2412.14171), and the behaviour of its scorer, which differs from the paper in one
point: an error of exactly a tolerance is kept.

Convention:
    - A sample's score is from 0 to 1. Everything that is aggregated is in percent.
    - Ten types of question make eight tasks: the three types of direction are averaged by type, not by question.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import datasets
import evaluate
import numpy as np


logger = logging.getLogger(__name__)

CHOICE_TYPES = (
    "object_rel_distance",
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "route_planning",
    "obj_appearance_order",
)
NUMBER_TYPES = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
DIRECTION = "object_rel_direction"
DIRECTION_TYPES = tuple(name for name in CHOICE_TYPES if name.startswith(DIRECTION))
TASKS = (*NUMBER_TYPES, "object_rel_distance", DIRECTION, "route_planning", "obj_appearance_order")
SCORERS = ("official", "lmms_eval")
# As the scorer builds them: other roundings of the same decimals decide some cases otherwise.
TOLERANCES = 1 - np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))
NUM_RESAMPLES = 1000
# Table 1 of the paper, in percent: guesses at random, where there is something to choose, and of the most frequent answer.
RANDOM = {"object_rel_distance": 25.0, DIRECTION: 36.1, "route_planning": 28.3, "obj_appearance_order": 25.0}
FREQUENCY = dict(zip(TASKS, (62.1, 32.0, 29.9, 33.1, 25.1, 47.9, 28.4, 25.2), strict=True))

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ADDENDS = {word: number for number, word in enumerate(_SMALL.split())}
_ADDENDS |= {word: 10 * number for number, word in enumerate(_TENS.split(), start=2)}
_WORD = rf"(?:{'|'.join([*_ADDENDS, 'hundred', 'thousand'])})"
_NUMBER = re.compile(rf"(?P<digits>-?\d+(?:\.\d+)?)|\b{_WORD}\b(?:(?:[\s-]+|\s+and\s+){_WORD}\b)*", re.IGNORECASE)


def first_word(text: str) -> str:
    """Return what stands before the first space, without the full stops and the white space at its end."""
    return text.split(" ")[0].rstrip(".").strip()


def first_number(text: str | float | None) -> float | None:
    """
    Return the first number in a text, in digits or in English words: how lmms-eval 0.7.3 reads an answer.

    Args:
        text (`str`, *optional*): The answer.

    Returns:
        `float` or None: The number; None if there is none.

    Example:
    ```python
    >>> first_number("about 3.5 m, or four"), first_number("Twenty-one chairs"), first_number("none")
    (3.5, 21.0, None)

    ```
    """
    found = None if text is None else _NUMBER.search(str(text))
    if found is None:
        return None
    if found["digits"]:
        return float(found["digits"])
    thousands = rest = 0
    for word in re.split(r"[\s-]+", found[0].lower()):
        if word == "hundred":
            rest = (rest or 1) * 100
        elif word == "thousand":
            thousands, rest = thousands + (rest or 1) * 1000, 0
        else:
            rest += _ADDENDS.get(word, 0)  # "and" adds nothing
    return float(thousands + rest)


def to_float(value: str | float | None) -> float | None:
    """Return a number as Python reads it; None where it reads none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def mean_relative_accuracy(prediction: float, truth: float) -> float:
    """
    Return the share of ten tolerances, 0.5 to 0.05, that the relative error keeps.

    Args:
        prediction (`float`): The answer.
        truth (`float`): The truth.

    Returns:
        `float`: From 0 to 1. A truth below 0 gives 1, as in the original scorer: see [`guarded_score`].

    Raises:
        ZeroDivisionError: If the truth is 0.

    Example:
    ```python
    >>> mean_relative_accuracy(2.6, 2.0)  # an error of 30 % keeps 50, 45, 40, 35 and 30 %
    0.5

    ```
    """
    return float((abs(prediction - truth) / truth <= TOLERANCES).mean())


def score(question_type: str, prediction: str, ground_truth: str, scorer: str = "official") -> float:
    """
    Score one answer exactly as a known scorer does, where it raises as well.

    Args:
        question_type (`str`): One of VSI-Bench's ten.
        prediction (`str`): What the model answered.
        ground_truth (`str`): A decimal number, or a letter.
        scorer (`str`, defaults to `"official"`): `"official"` reads the first word; `"lmms_eval"` is that of lmms-eval 0.7.3,
            which reads the first number anywhere. Figures of the two are never to be mixed.

    Returns:
        `float`: From 0 to 1.

    Raises:
        AttributeError: If the first word of None is asked for.
        ValueError: If the type or the scorer is unknown.
        ZeroDivisionError: If the truth is 0 and the answer a number.
    """
    if scorer not in SCORERS:
        raise ValueError(f"`scorer` must be one of {SCORERS}, got {scorer!r}.")
    if question_type in CHOICE_TYPES:
        return float(first_word(prediction).lower() == ground_truth.lower())
    if question_type not in NUMBER_TYPES:
        known = ", ".join((*NUMBER_TYPES, *CHOICE_TYPES))
        raise ValueError(f"`question_type` must be one of VSI-Bench's ({known}), got {question_type!r}.")
    found = to_float(first_word(prediction)) if scorer == "official" else first_number(prediction)
    truth = to_float(ground_truth)
    if found is None or truth is None:
        return 0.0
    return mean_relative_accuracy(found, truth)


def guarded_score(question_type: str, prediction: str | None, ground_truth: str, scorer: str = "official") -> float:
    """
    Score one answer as [`score`] does, but never raise for an answer or a truth, and never reward a truth that is no measure.

    Args:
        question_type (`str`): One of VSI-Bench's ten.
        prediction (`str`, *optional*): What the model answered; None, nothing, scores 0.
        ground_truth (`str`): A decimal number, or a letter. None, and a number of 0 or below, score 0 and are logged.
        scorer (`str`, defaults to `"official"`): See [`score`].

    Returns:
        `float`: From 0 to 1.
    """
    truth = to_float(ground_truth) if question_type in NUMBER_TYPES else None
    if ground_truth is None or (truth is not None and not truth > 0):
        logger.warning(
            "The truth %r of a question of type %s is no measure: it scores 0.", ground_truth, question_type
        )
        return 0.0
    return 0.0 if prediction is None else score(question_type, prediction, ground_truth, scorer)


def has_whole_directions(question_types: Iterable[str]) -> bool:
    """Tell whether the official scorer gives a score: there is no easy direction, or there are all three types."""
    found = set(question_types).intersection(DIRECTION_TYPES)
    return DIRECTION_TYPES[0] not in found or len(found) == len(DIRECTION_TYPES)


def _tasks_of_types(means: dict[str, float | np.ndarray]) -> dict[str, float | np.ndarray]:
    """Put the types of direction into one task, as the official scorer does, if all three are there."""
    tasks = dict(means)
    if all(name in tasks for name in DIRECTION_TYPES):
        tasks[DIRECTION] = sum(tasks.pop(name) for name in DIRECTION_TYPES) / len(DIRECTION_TYPES)
    return tasks


def aggregate(question_types: Sequence[str], scores: Sequence[float], *, is_strict: bool = True) -> dict[str, float]:
    """
    Put the scores of samples together by the official rule.

    Args:
        question_types (`Sequence[str]`): Type of each sample.
        scores (`Sequence[float]`): Its score, from 0 to 1.
        is_strict (`bool`, defaults to `True`): Raise where the original raises. Otherwise types of direction that are not all there
            stay apart, each a task.

    Returns:
        `dict[str, float]`: In percent, an entry for each task that has samples, and `overall`: the mean over the tasks. Types of
        direction without the easy one stay apart, as in the original.

    Raises:
        KeyError: If there are easy directions, and none of another of the three types.
        ValueError: If there are no samples, or the lengths differ.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in zip(question_types, scores, strict=True):
        groups[name].append(value)
    if not groups:
        raise ValueError("There must be at least one sample to aggregate, got none.")
    if is_strict and not has_whole_directions(groups):
        missing = [name for name in DIRECTION_TYPES if name not in groups]
        raise KeyError(f"The three types of direction are one task, and there are no questions of {missing}.")
    tasks = _tasks_of_types({name: 100.0 * math.fsum(values) / len(values) for name, values in groups.items()})
    return {**tasks, "overall": math.fsum(tasks.values()) / len(tasks)}


def bootstrap(
    question_types: Sequence[str],
    scores: Sequence[float],
    scenes: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """
    Bound what [`aggregate`] gives, by a bootstrap over scenes: questions about one scene are not independent.

    Args:
        question_types (`Sequence[str]`): Type of each sample.
        scores (`Sequence[float]`): Its score, from 0 to 1.
        scenes (`Sequence[str]`): Its scene.
        num_resamples (`int`, defaults to 1000): Draws of as many scenes as there are.
        confidence (`float`, defaults to 0.95): Share of the draws inside.
        seed (`int`, defaults to 0): Decides the draws.

    Returns:
        `dict[str, tuple[float, float]]`: Percentiles in percent, by the keys of [`aggregate`]. A draw without any question of a
        task counts for the others.
    """
    names, columns = np.unique(np.asarray(question_types), return_inverse=True)
    _, rows = np.unique(np.asarray(scenes), return_inverse=True)
    num_scenes = int(rows.max()) + 1
    sums, counts = np.zeros((2, num_scenes, len(names)))
    np.add.at(sums, (rows, columns), np.asarray(scores, dtype=np.float64))
    np.add.at(counts, (rows, columns), 1.0)
    drawn = np.random.default_rng(seed).multinomial(num_scenes, np.full(num_scenes, 1.0 / num_scenes), num_resamples)
    totals = drawn @ counts
    means = np.where(totals > 0, 100.0 * (drawn @ sums) / np.maximum(totals, 1.0), np.nan)
    tasks = _tasks_of_types(dict(zip(names.tolist(), means.T, strict=True)))
    tasks["overall"] = np.nanmean(np.stack(list(tasks.values())), axis=0)
    tails = (0.5 - 0.5 * confidence, 0.5 + 0.5 * confidence)
    return {name: tuple(np.nanquantile(values, tails).tolist()) for name, values in tasks.items()}


def summarise(question_types: Sequence[str], scores: Sequence[float], scenes: Sequence[str] | None = None) -> dict:
    """
    Give every figure that a table may ask for.

    Args:
        question_types (`Sequence[str]`): Type of each sample.
        scores (`Sequence[float]`): Its score, from 0 to 1.
        scenes (`Sequence[str]`, *optional*): Its scene, for intervals.

    Returns:
        `dict`: `tasks` (see [`aggregate`], not strict), `is_official` (whether the official scorer gives a score), `micro` (the mean over questions, in percent), `types` with the mean of each type, `n`
        with the number of its questions, and with scenes `intervals` (see [`bootstrap`]).
    """
    values = np.asarray(scores, dtype=np.float64)
    kinds = np.asarray(question_types)
    found = {
        "tasks": aggregate(question_types, scores, is_strict=False),
        "is_official": has_whole_directions(question_types),
        "micro": 100.0 * float(values.mean()),
        "types": {str(name): 100.0 * float(values[kinds == name].mean()) for name in np.unique(kinds)},
        "n": {str(name): int((kinds == name).sum()) for name in np.unique(kinds)},
    }
    if scenes is not None:
        found["intervals"] = bootstrap(question_types, scores, scenes)
    return found


_DESCRIPTION = (
    "VSI-Bench: accuracy of choices and mean relative accuracy of numbers, over eight tasks, by the official rule."
)
_CITATION = (
    "Yang et al., Thinking in Space: How Multimodal Large Language Models See, Remember, and Recall Spaces (2024)."
)
_INPUTS = """
Args:
    predictions (list of `str`): Answers.
    references (list of `str`): Truths: decimal numbers or letters.
    question_types (list of `str`): VSI-Bench's ten types.
    scenes (list of `str`, *optional*): Scene of each question, for 95 % intervals by a bootstrap over scenes.
    scorer (`str`, defaults to `"official"`): `"official"` or `"lmms_eval"`, which are not to be mixed.
    is_guarded (`bool`, defaults to `True`): A missing answer, and a truth that is no measure, score 0 instead of raising.
Returns:
    `tasks`, with `overall`; `micro`; `types`; `n`; `intervals`. In percent.
"""


class VsiBench(evaluate.Metric):
    """VSI-Bench as a metric of `evaluate`: `evaluate.load("geode/evaluation/vsi_bench")`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = {"predictions": text, "references": text, "question_types": text}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/2412.14171"],
        )

    def _compute(
        self, predictions, references, question_types, scenes=None, scorer="official", is_guarded=True
    ) -> dict:
        rule = guarded_score if is_guarded else score
        scores = [rule(*row, scorer) for row in zip(question_types, predictions, references, strict=True)]
        return summarise(question_types, scores, scenes)


__all__ = [
    "CHOICE_TYPES",
    "FREQUENCY",
    "NUMBER_TYPES",
    "RANDOM",
    "SCORERS",
    "TASKS",
    "TOLERANCES",
    "VsiBench",
    "aggregate",
    "bootstrap",
    "first_number",
    "first_word",
    "guarded_score",
    "has_whole_directions",
    "mean_relative_accuracy",
    "score",
    "summarise",
]
