# SPDX-License-Identifier: Apache-2.0
"""
Choose questions over many scenes such that no answer, and no answer given a name in the question, is more frequent.

Convention:
    - An account is a running sum over the questions chosen so far, per key: of how much more often an answer was right
      than it would be by chance. A question that would raise an account which is already over its allowance is not
      taken; so a category that is always small is asked about only as often as it is found large.
    - Numbers are levelled over bins that are even on a logarithmic scale (`NUMBER_BINS`).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from geode.data.synthetic_rooms.questions import LETTERS, Question, answer_content, subjects_of


NUMBER_BINS = {
    "object_counting": (1.5, 2.5, 3.5, 4.5, 6.5, 8.5, 12.5),
    "object_abs_distance": tuple(np.geomspace(0.35, 5.0, 9).tolist()),
    "object_size_estimation": tuple(np.geomspace(36.0, 220.0, 9).tolist()),
    "room_size_estimation": tuple(np.geomspace(8.0, 56.0, 8).tolist()),
}
ALLOWANCE = 0.25  # questions above the even share ...
ALLOWANCE_SHARE = 0.01  # ... and this share of those of the same key
MAX_CANDIDATES = 32  # of a scene and a type that are weighed in one round

# One level: what its answers are compared over (the key of its total) and the changes of its accounts.
Level = tuple[tuple, list[tuple[tuple, float]]]


def _number_levels(question: Question) -> list[Level] | None:
    edges = NUMBER_BINS[question.question_type]
    place = int(np.searchsorted(edges, question.value, side="right")) - 1
    if not 0 <= place < len(edges) - 1:
        return None
    names = subjects_of(question.question_type, question.question)
    owners = [("all",), *(("name", name) for name in names)]
    if len(names) == 2:
        owners.append(("pair", *sorted(names)))
    share = 1.0 / (len(edges) - 1)
    return [
        (owner, [((*owner, index), float(index == place) - share) for index in range(len(edges) - 1)])
        for owner in owners
    ]


def _choice_levels(question: Question) -> list[Level]:
    contents = [option[3:] for option in question.options]
    right, share = LETTERS.index(question.ground_truth), 1.0 / len(question.options)
    gains = [float(index == right) - share for index in range(len(contents))]
    levels: list[Level] = [(("letters",), [(("letter", LETTERS[index]), gain) for index, gain in enumerate(gains)])]
    names = subjects_of(question.question_type, question.question)
    if question.question_type == "obj_appearance_order":
        changes: dict[tuple, float] = defaultdict(float)
        for content, gain in zip(contents, gains, strict=True):
            order = content.split(", ")
            for index, first in enumerate(order):
                changes["place", first, index] += gain
                for second in order[index + 1 :]:
                    changes["before", first, second] += gain / 6.0
        for kind in ("place", "before"):
            own = [(key, change) for key, change in changes.items() if key[0] == kind]
            levels.append(((kind, *sorted(names)), own))
        return levels
    roles: list[tuple] = [("content",)]
    if question.question_type == "object_rel_distance":
        roles.append(("target", names[-1]))
    else:
        roles += [("role", index, name) for index, name in enumerate((*names[:2], names[-1]))]
    levels += [
        (role, [((*role, content), gain) for content, gain in zip(contents, gains, strict=True)]) for role in roles
    ]
    return levels


def levels_of(question: Question) -> list[Level] | None:
    """
    Return the accounts that a question would change.

    Args:
        question (`Question`): A candidate.

    Returns:
        `list[Level]`: Per level the key of its total and `(key, change)` pairs; empty for types without a guessable
        answer, and `None` for a number outside the bins, which is never asked.
    """
    if question.question_type in NUMBER_BINS:
        return _number_levels(question)
    return [] if question.options is None else _choice_levels(question)


def _answer_bin(question: Question) -> str | int:
    if question.question_type not in NUMBER_BINS:
        return answer_content(question)
    return int(np.searchsorted(NUMBER_BINS[question.question_type], question.value))


def draw_candidates(questions: Sequence[Question], *, limit: int, seed: Iterable[int]) -> list[Question]:
    """
    Draw some of one scene's questions of one type, such that rare answers are among them.

    Args:
        questions (`Sequence[Question]`): All of them.
        limit (`int`): Largest number to keep.
        seed (`Iterable[int]`): Decides the lots.

    Returns:
        `list[Question]`: In turns one of each answer.
    """
    rng = np.random.default_rng(list(seed))
    piles: dict[str | int, list[tuple[int, int]]] = defaultdict(list)
    for index in rng.permutation(len(questions)).tolist():
        pile = piles[_answer_bin(questions[index])]
        pile.append((len(pile), index))
    # Python's sort is stable: within a turn the answers come in the order of the lots.
    turns = sorted((turn for pile in piles.values() for turn in pile), key=lambda turn: turn[0])
    return [questions[index] for _, index in turns[:limit]]


class _Accounts:
    def __init__(self):
        self.sums: dict[tuple, float] = defaultdict(float)
        self.totals: dict[tuple, int] = defaultdict(int)

    def excess(self, levels: list[Level]) -> float | None:
        """Return by how much a question repeats what is frequent already, or `None` beyond the allowance."""
        total = 0.0
        for owner, changes in levels:
            excess = sum(self.sums[key] * change for key, change in changes)
            if excess > ALLOWANCE + ALLOWANCE_SHARE * self.totals[owner]:
                return None
            total += excess
        return total

    def add(self, levels: list[Level]) -> None:
        for owner, changes in levels:
            self.totals[owner] += 1
            for key, change in changes:
                self.sums[key] += change


def select_evenly(
    scenes: Sequence[Sequence[Question]], *, per_scene: int, seed: Iterable[int]
) -> list[list[Question]]:
    """
    Draw questions of one type from many scenes so that answers are spread evenly over all of them.

    In each round every scene, in an order drawn by lot, gives the candidate that repeats frequent answers least, or
    none. Rounds end with `per_scene` or when no scene has one left to give.

    Args:
        scenes (`Sequence[Sequence[Question]]`): The candidates of each scene, all of one type.
        per_scene (`int`): Largest number of one scene.
        seed (`Iterable[int]`): Decides the lots.

    Returns:
        `list[list[Question]]`: The chosen questions of each scene.
    """
    rng, accounts = np.random.default_rng(list(seed)), _Accounts()
    pools, chosen = [], [[] for _ in scenes]
    for candidates in scenes:
        pool = [(question, levels_of(question)) for question in candidates]
        pools.append([pair for pair in pool if pair[1] is not None])
    for _ in range(per_scene):
        has_given = False
        for number in rng.permutation(len(scenes)):
            pool, best, least = pools[number], None, 0.0
            for index, (_, levels) in enumerate(pool[:MAX_CANDIDATES]):
                excess = accounts.excess(levels)
                if excess is not None and (best is None or excess < least):
                    best, least = index, excess
            if best is None:
                continue
            question, levels = pool.pop(best)
            accounts.add(levels)
            chosen[number].append(question)
            has_given = True
        if not has_given:
            break
    return chosen
