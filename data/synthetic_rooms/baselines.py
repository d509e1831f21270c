# SPDX-License-Identifier: Apache-2.0
"""
What one scores without looking: guesses from the answers' frequencies and from the names in a question.

Source: accuracy and mean relative accuracy (MRA) of Yang et al., *Thinking in Space* (2025), with the ten thresholds of
its public code.

Convention:
    - Scores are in percent. Guesses are fitted on one split and scored on another.
    - `BLIND` guesses see the answers alone; `READING` guesses also read the question (not the video).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from geode.data.synthetic_rooms.questions import LETTERS, QUESTION_TYPES, subjects_of


# Built as the benchmark's code builds them: decimal constants would move cases at the edges.
TOLERANCES = 1.0 - np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2))
BLIND = ("majority letter", "majority content", "most frequent number", "median", "best constant")
READING = ("contents by name", "best constant by name", "best constant by names")
MIN_ROWS_PER_KEY = 8  # of the fitting split: below, a guess for a key would be noise
SMOOTHING = 4.0
NUM_CONSTANTS = 160


def mean_relative_accuracy(prediction: float, truth: np.ndarray) -> np.ndarray:
    """
    Score a number by VSI-Bench's mean relative accuracy.

    Args:
        prediction (`float`): The guess.
        truth (`np.ndarray` of shape `(num_questions,)`): The true numbers, positive.

    Returns:
        `np.ndarray` of shape `(num_questions,)`: Scores in [0, 1].

    Example:
    ```python
    >>> mean_relative_accuracy(3.0, np.array([3.0, 2.0, 6.0, 1.0])).round(3).tolist()
    [1.0, 0.1, 0.1, 0.0]

    ```
    """
    error = np.abs(prediction - truth) / truth
    return (error[..., None] <= TOLERANCES).mean(axis=-1)


def best_constant(truth: np.ndarray) -> float:
    """
    Return the one number that scores best for some questions.

    Args:
        truth (`np.ndarray` of shape `(num_questions,)`): The true numbers.

    Returns:
        `float`: Of up to 160 quantiles of the true numbers, the one of the highest mean relative accuracy.
    """
    values = np.unique(truth)
    if len(values) > NUM_CONSTANTS:
        values = np.quantile(truth, np.linspace(0.0, 1.0, NUM_CONSTANTS))
    scores = [float(mean_relative_accuracy(value, truth).mean()) for value in values]
    return float(values[int(np.argmax(scores))])


def _numbers(train: list[dict], test: list[dict]) -> dict[str, float]:
    truth = np.array([float(row["ground_truth"]) for row in train])
    held_out = np.array([float(row["ground_truth"]) for row in test])
    names = [subjects_of(row["question_type"], row["question"]) for row in train]
    constant = best_constant(truth)
    by_key: dict[tuple, list[float]] = defaultdict(list)
    for value, found in zip(truth, names, strict=True):
        for key in {*((name,) for name in found), tuple(sorted(found))}:
            by_key[key].append(value)
    fitted = {
        key: best_constant(np.array(values))
        for key, values in sorted(by_key.items())
        if len(values) >= MIN_ROWS_PER_KEY and key
    }

    def by_name(found: list[str]) -> float:
        logs = [math.log(fitted.get((name,), constant)) for name in found]
        return math.exp(sum(logs) / len(logs)) if logs else constant

    def by_names(found: list[str]) -> float:
        return fitted.get(tuple(sorted(found)), by_name(found))

    def score(guess: Callable[[list[str]], float]) -> float:
        found = [subjects_of(row["question_type"], row["question"]) for row in test]
        return 100.0 * float(
            np.mean([mean_relative_accuracy(guess(one), value) for one, value in zip(found, held_out, strict=True)])
        )

    mode = min(Counter(truth.tolist()).items(), key=lambda item: (-item[1], item[0]))[0]
    return {
        "most frequent number": score(lambda _: mode),
        "median": score(lambda _: float(np.median(truth))),
        "best constant": score(lambda _: constant),
        "best constant by name": score(by_name),
        "best constant by names": score(by_names),
    }


def _cues(row: dict, content: str) -> Iterable[tuple]:
    """Yield what a reader of the question could go by for one option."""
    names = subjects_of(row["question_type"], row["question"])
    if row["question_type"] == "obj_appearance_order":
        order = content.split(", ")
        yield from (("place", name, index) for index, name in enumerate(order))
        yield from (("before", a, b) for index, a in enumerate(order) for b in order[index + 1 :])
    elif row["question_type"] == "object_rel_distance":
        yield from (("content", content), ("target", names[-1], content))
    else:
        yield ("content", content)
        yield from (("role", index, name, content) for index, name in enumerate((*names[:2], names[-1])))


def _win_rates(rows: list[dict], cues: Callable[[dict, str], Iterable[tuple]]) -> dict[tuple, float]:
    """Return per cue the log of how much more often than by chance it was right, drawn towards 0 where it is rare."""
    wins: dict[tuple, float] = defaultdict(float)
    chances: dict[tuple, float] = defaultdict(float)
    for row in rows:
        for letter, option in zip(LETTERS, row["options"], strict=False):
            for cue in cues(row, option[3:]):
                wins[cue] += float(letter == row["ground_truth"])
                chances[cue] += 1.0 / len(row["options"])
    return {cue: math.log((wins[cue] + SMOOTHING) / (chances[cue] + SMOOTHING)) for cue in chances}


def _choices(train: list[dict], test: list[dict]) -> dict[str, float]:
    letters = Counter(row["ground_truth"] for row in train)
    majority = min(letters, key=lambda letter: (-letters[letter], letter))

    def score(guess: Callable[[dict], str]) -> float:
        return 100.0 * float(np.mean([guess(row) == row["ground_truth"] for row in test]))

    def by_cues(cues: Callable[[dict, str], Iterable[tuple]]) -> float:
        rates = _win_rates(train, cues)

        def guess(row: dict) -> str:
            sums = [sum(rates.get(cue, 0.0) for cue in cues(row, option[3:])) for option in row["options"]]
            return LETTERS[int(np.argmax(sums))]

        return score(guess)

    return {
        "chance": 100.0 * float(np.mean([1.0 / len(row["options"]) for row in test])),
        "majority letter": score(lambda _: majority),
        "majority content": by_cues(lambda _, content: [("content", content)]),
        "contents by name": by_cues(_cues),
    }


def blind_baselines(train_rows: Iterable[dict], test_rows: Iterable[dict]) -> dict[str, dict[str, float]]:
    """
    Score the guesses of one who does not see the video.

    Args:
        train_rows (`Iterable[dict]`): Rows in VSI-Bench's columns; the guesses are fitted on them.
        test_rows (`Iterable[dict]`): Rows of other scenes.

    Returns:
        `dict[str, dict[str, float]]`: Per question type that both splits have, in the order of `QUESTION_TYPES`:
        `n` (questions scored) and the score of each guess in percent: accuracy for choices, where `chance` stands
        beside them, and mean relative accuracy for numbers. Localisation has no such score and is left out.
    """
    groups: list[dict[str, list[dict]]] = []
    for rows in (train_rows, test_rows):
        groups.append(defaultdict(list))
        for row in rows:
            groups[-1][row["question_type"]].append(row)
    table = {}
    for question_type in QUESTION_TYPES:
        train, test = groups[0].get(question_type, []), groups[1].get(question_type, [])
        if question_type == "object_localization" or not train or not test:
            continue
        scores = _choices(train, test) if test[0]["options"] else _numbers(train, test)
        table[question_type] = {"n": float(len(test)), **scores}
    return table


def best_blind(scores: dict[str, float]) -> float:
    """
    Return the best score among the guesses that do not read the question.

    Args:
        scores (`dict[str, float]`): One row of the table of `blind_baselines`.

    Returns:
        `float`: Percent.
    """
    return max(scores[name] for name in BLIND if name in scores)
