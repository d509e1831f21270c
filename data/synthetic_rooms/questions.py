# SPDX-License-Identifier: Apache-2.0
"""
Questions about a scene in the wording of VSI-Bench, with answers computed from its record.

Source: Yang et al., *Thinking in Space* (2025), and its public data: columns, wording, options. `Locate the ...` and the
columns `value`, `unit`, `value_si`, `box` and `answer` are ours.

Convention:
    - Only objects that the video shows are asked about, and only where a small change of the geometry leaves the answer
      as it is: see the constants below.
    - Distances are between the closest points of two boxes. A direction is judged in the floor plan between the boxes'
      centres, and must be the same from every corner of the box that one stands by.
    - `value` is in `unit`, the unit that the question asks for; `value_si` is in metres, square metres or counts.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from geode.data.synthetic_rooms.boxes import box_distance, footprint, is_separated


MIN_DISTANCE_M = 0.3  # nearer pairs are not asked about: a third of a metre is the scale of a box's own slack
MIN_DISTANCE_LEAD_M = 0.25  # the closest object leads the next one by this much
MIN_DIRECTION_REACH_M = 0.9  # between the centres of any two of the three objects
DIRECTION_MARGIN_DEG = 12.0  # from the boundary between two answers
ORDER_SHARES = (0.002, 0.01)  # of the pixels: the order must hold whichever of them counts as seen
ORDER_FRAMES = (8, 16, 32)  # and for each of these numbers of frames
CLEAR_VIEW_SHARE = 0.006
ROUTE_CLEARANCE_M = 0.1
MAX_COUNT = 6
LETTERS = "ABCD"
SI_UNITS = {"m": ("m", 1.0), "cm": ("m", 0.01), "m2": ("m2", 1.0), "count": ("count", 1.0)}

COUNTING = "How many {}(s) are in this room?"
DISTANCE = "Measuring from the closest point of each object, what is the direct distance between the {} and the {} (in meters)?"
SIZE = "What is the length of the longest dimension (length, width, or height) of the {}, measured in centimeters?"
ROOM_SIZE = (
    "What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the combined "
    "space."
)
NEAREST = "Measuring from the closest point of each object, which of these objects ({}) is the closest to the {}?"
STANDING = "If I am standing by the {} and facing the {}, is the {} "
EASY = STANDING + "to the left or the right of the {}?"
MEDIUM = (
    STANDING + "to my left, right, or back? An object is to my back if I would have to turn at least 135 degrees in "
    "order to face it."
)
HARD = (
    STANDING + "to my front-left, front-right, back-left, or back-right? The directions refer to the quadrants of a "
    "Cartesian plane (if I am standing at the origin and facing along the positive y-axis)."
)
ROUTE = (
    "You are a robot beginning at the {} and facing the {}. You want to navigate to the {}. You will perform the "
    "following actions (Note: for each [please fill in], choose either 'turn back,' 'turn left,' or 'turn right.'): {} "
    "You have reached the final destination."
)
ORDER = "What will be the first-time appearance order of the following categories in the video: {}?"
LOCATE = "Locate the {}."

QUESTION_TYPES = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
    "object_rel_distance",
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "route_planning",
    "obj_appearance_order",
    "object_localization",
)


@dataclass(frozen=True)
class Question:
    """
    One question with its answer.

    Args:
        question_type (`str`): One of `QUESTION_TYPES`.
        question (`str`): The bare question.
        ground_truth (`str`): A decimal number, a letter, or seven numbers as JSON.
        options (`list[str]`, *optional*): `"A. ..."` and so on for a choice.
        value (`float`, *optional*): The number in `unit`.
        unit (`str`, *optional*): `"m"`, `"cm"`, `"m2"` or `"count"`.
        value_si (`float`, *optional*): The number in metres, square metres or counts.
        box (`list[float]`, *optional*): `(cx, cy, cz, dx, dy, dz, yaw)` in the scene frame.
    """

    question_type: str
    question: str
    ground_truth: str
    options: list[str] | None = None
    value: float | None = None
    unit: str | None = None
    value_si: float | None = None
    box: list[float] | None = None

    def answer_parts(self) -> list[dict]:
        """Return the assistant's turn as chat parts: a regressed value, a regressed box, or the letter."""
        if self.box is not None:
            return [{"type": "value", "token": "<3DBBOX>", "value": self.box}]
        if self.value_si is not None:
            unit = SI_UNITS[self.unit][0]
            return [{"type": "value", "token": "<REG>", "value": self.value_si, "unit": unit}]
        return [{"type": "text", "text": self.ground_truth}]

    def row(self, number: int, scene: dict) -> dict:
        """Return the question as a line of a data set: VSI-Bench's columns, then ours."""
        fields = asdict(self)
        ours = {name: fields.pop(name) for name in ("value", "unit", "value_si", "box")}
        head = {"id": number, "dataset": scene["dataset"], "scene_name": scene["scene_name"]}
        return {**head, **fields, "pruned": False, **ours, "answer": self.answer_parts()}


def prompt_of(row: dict) -> str:
    """
    Return the text that asks a question, with its options where there are some.

    Args:
        row (`dict`):
            A line of the data set, with `question` and `options`.

    Returns:
        `str`: The question, and one line for each option.
    """
    return "\n".join([row["question"], *(["Options:", *row["options"]] if row.get("options") else [])])


def _number(question_type: str, question: str, value: float, unit: str, digits: int) -> Question:
    truth = f"{value:.{digits}f}"
    return Question(question_type, question, truth, None, value, unit, round(value * SI_UNITS[unit][1], 8))


def _choice(question_type: str, question: str, right: str, wrong: Iterable[str], rng: np.random.Generator) -> Question:
    contents = [right, *wrong]
    contents = [contents[index] for index in rng.permutation(len(contents))]
    options = [f"{LETTERS[index]}. {content}" for index, content in enumerate(contents)]
    return Question(question_type, question, LETTERS[contents.index(right)], options)


def _clearly_seen(item: dict, share: float = CLEAR_VIEW_SHARE) -> bool:
    return max(item["pixel_shares"]) >= share


def _by_category(scene: dict) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for item in scene["objects"]:
        groups.setdefault(item["category"], []).append(item)
    return {name: groups[name] for name in sorted(groups)}


def _unique(scene: dict) -> dict[str, np.ndarray]:
    """Return the boxes of the categories that occur once and are clearly seen."""
    groups = _by_category(scene)
    return {
        name: np.asarray(items[0]["box"])
        for name, items in groups.items()
        if len(items) == 1 and _clearly_seen(items[0])
    }


def _counting(scene: dict, max_count: int, view_share: float) -> list[Question]:
    return [
        _number("object_counting", COUNTING.format(name), float(len(items)), "count", 0)
        for name, items in _by_category(scene).items()
        if 2 <= len(items) <= max_count and all(_clearly_seen(item, view_share) for item in items)
    ]


def _abs_distance(scene: dict, rng: np.random.Generator) -> list[Question]:
    boxes, questions = _unique(scene), []
    for first, second in itertools.permutations(boxes, 2):
        distance = box_distance(boxes[first], boxes[second])
        if distance >= MIN_DISTANCE_M:
            text = DISTANCE.format(first, second)
            questions.append(_number("object_abs_distance", text, round(distance, 6), "m", 2))
    return questions


def _size(scene: dict, rng: np.random.Generator) -> list[Question]:
    return [
        _number("object_size_estimation", SIZE.format(name), round(100.0 * float(max(box[3:6])), 4), "cm", 0)
        for name, box in _unique(scene).items()
    ]


def _room_size(scene: dict, rng: np.random.Generator) -> list[Question]:
    return [_number("room_size_estimation", ROOM_SIZE, scene["room"]["area_m2"], "m2", 1)]


def _rel_distance(scene: dict, rng: np.random.Generator) -> list[Question]:
    boxes, questions = _unique(scene), []
    for target in boxes:
        distances = {name: box_distance(boxes[target], boxes[name]) for name in boxes if name != target}
        for names in itertools.combinations([name for name in distances if distances[name] >= MIN_DISTANCE_M], 4):
            nearest, second = sorted(names, key=distances.__getitem__)[:2]
            if distances[second] - distances[nearest] < MIN_DISTANCE_LEAD_M:
                continue
            wrong = [name for name in names if name != nearest]
            question = _choice("object_rel_distance", "", nearest, wrong, rng)
            listed = ", ".join(option[3:] for option in question.options)
            text = NEAREST.format(listed, target)
            questions.append(Question("object_rel_distance", text, question.ground_truth, question.options))
    return questions


def turn_angle_deg(stand: np.ndarray, face: np.ndarray, look: np.ndarray) -> float:
    """
    Return the angle by which one turns from facing one point to facing another.

    Args:
        stand (`np.ndarray` of shape `(2,)`): Where one stands in the floor plan.
        face (`np.ndarray` of shape `(2,)`): The point that one faces.
        look (`np.ndarray` of shape `(2,)`): The point in question.

    Returns:
        `float`: Degrees in (-180, 180], positive to the left.

    Example:
    ```python
    >>> turn_angle_deg(np.array([0.0, 0.0]), np.array([0.0, 1.0]), np.array([-1.0, 0.0]))
    90.0

    ```
    """
    ahead, aside = face - stand, look - stand
    cross = float(ahead[0] * aside[1] - ahead[1] * aside[0])
    return math.degrees(math.atan2(cross, float(ahead @ aside)))


def _direction_words(angle: float, margin: float) -> dict[str, str | None]:
    """Return the answers of the three question types for an angle, `None` within `margin` of a boundary."""
    size, side = abs(angle), "left" if angle > 0 else "right"
    is_sided = margin <= size <= 180.0 - margin
    medium = side if margin <= size <= 135.0 - margin else "back" if size >= 135.0 + margin else None
    ahead = "front" if size <= 90.0 - margin else "back" if size >= 90.0 + margin else None
    return {
        "easy": side if is_sided else None,
        "medium": medium,
        "hard": f"{ahead}-{side}" if ahead and is_sided else None,
    }


def _directions(scene: dict, rng: np.random.Generator) -> list[Question]:
    boxes, questions = _unique(scene), []
    answers = {
        "easy": (EASY, ("left", "right")),
        "medium": (MEDIUM, ("left", "right", "back")),
        "hard": (HARD, ("front-left", "front-right", "back-left", "back-right")),
    }
    for names in itertools.permutations(boxes, 3):
        stand, face, look = (boxes[name] for name in names)
        pairs = itertools.combinations((stand, face, look), 2)
        if any(np.linalg.norm(a[:2] - b[:2]) < MIN_DIRECTION_REACH_M for a, b in pairs):
            continue
        words = _direction_words(turn_angle_deg(stand[:2], face[:2], look[:2]), DIRECTION_MARGIN_DEG)
        around = [_direction_words(turn_angle_deg(corner, face[:2], look[:2]), 0.0) for corner in footprint(stand)]
        for level, (form, contents) in answers.items():
            if words[level] is None or any(other[level] != words[level] for other in around):
                continue
            text = form.format(*names, names[1])
            wrong = [content for content in contents if content != words[level]]
            questions.append(_choice(f"object_rel_direction_{level}", text, words[level], wrong, rng))
    return questions


def _turn(angle: float) -> str | None:
    if abs(angle) >= 150.0:
        return "Turn Back"
    if 45.0 <= abs(angle) <= 120.0:
        return "Turn Left" if angle > 0 else "Turn Right"
    return None


def _obstacles(scene: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the boxes that stand near the floor, with their corners in the plan."""
    boxes = [np.asarray(item["box"]) for item in scene["objects"]]
    return [(box, footprint(box)) for box in boxes if box[2] - 0.5 * box[5] < 0.3]


def _is_clear(obstacles: list[tuple[np.ndarray, np.ndarray]], first: np.ndarray, second: np.ndarray) -> bool:
    """Tell whether no other piece of furniture on the floor lies between two boxes' centres."""
    along = second[:2] - first[:2]
    lane = np.array([*(0.5 * (first[:2] + second[:2])), 0, np.linalg.norm(along), 2 * ROUTE_CLEARANCE_M, 1])
    corners = footprint(np.append(lane, math.atan2(along[1], along[0])))
    for box, plan in obstacles:
        is_end = np.array_equal(box, first) or np.array_equal(box, second)
        if not is_end and not is_separated(corners, plan):
            return False
    return True


def _routes(scene: dict, rng: np.random.Generator) -> list[Question]:
    boxes, questions = _unique(scene), []
    obstacles = _obstacles(scene)
    legs = {
        way
        for pair in itertools.combinations(boxes, 2)
        if np.linalg.norm(boxes[pair[0]][:2] - boxes[pair[1]][:2]) >= MIN_DIRECTION_REACH_M
        and _is_clear(obstacles, boxes[pair[0]], boxes[pair[1]])
        for way in (pair, pair[::-1])
    }
    for length in (3, 4):
        for stops in itertools.permutations(boxes, length):
            if any(leg not in legs for leg in itertools.pairwise(stops)):
                continue
            points = [boxes[name][:2] for name in stops]
            turns = [
                _turn(turn_angle_deg(b, 2 * b - a, c)) for a, b, c in zip(points, points[1:], points[2:], strict=False)
            ]
            if None in turns:
                continue
            steps = [f"Go forward until the {stops[1]}"]
            for name in stops[2:]:
                steps += ["[please fill in]", f"Go forward until the {name}"]
            listed = " ".join(f"{index}. {step}" for index, step in enumerate(steps, start=1)) + "."
            every = [
                ", ".join(way)
                for way in itertools.product(("Turn Back", "Turn Left", "Turn Right"), repeat=length - 2)
            ]
            right = ", ".join(turns)
            wrong = [way for way in every if way != right]
            wrong = [wrong[index] for index in rng.permutation(len(wrong))[:3]]
            text = ROUTE.format(stops[0], stops[1], stops[-1], listed)
            questions.append(_choice("route_planning", text, right, wrong, rng))
    return questions


def _sampled_frames(num_frames: int, count: int) -> list[np.ndarray]:
    """Return the two usual ways to take `count` of `num_frames`: with both ends, and the middles of equal parts."""
    count = min(count, num_frames)
    ends = np.linspace(0, num_frames - 1, count).round().astype(int)
    middles = np.floor((np.arange(count) + 0.5) * num_frames / count).astype(int)
    return [ends, middles]


def first_appearances(scene: dict) -> dict[str, list[float]]:
    """
    Return when each category is first seen, under every threshold and every sampling of the frames.

    Args:
        scene (`dict`): The record.

    Returns:
        `dict[str, list[float]]`: Per category one frame index per case, infinite if it is never seen. The last case
        is every frame and the larger threshold.
    """
    num_frames = scene["camera"]["num_frames"]
    samplings = [frames for count in ORDER_FRAMES for frames in _sampled_frames(num_frames, count)]
    firsts = {}
    for name, items in _by_category(scene).items():
        shares = np.max([item["pixel_shares"] for item in items], axis=0)
        cases = [(threshold, frames) for threshold in ORDER_SHARES for frames in samplings]
        firsts[name] = [
            float(frames[np.argmax(shares[frames] >= threshold)]) if (shares[frames] >= threshold).any() else math.inf
            for threshold, frames in cases
        ]
    return firsts


def _appearance_order(scene: dict, rng: np.random.Generator) -> list[Question]:
    firsts, questions = first_appearances(scene), []
    num_cases = len(next(iter(firsts.values()), []))
    for names in itertools.combinations(firsts, 4):
        right = sorted(names, key=lambda name: firsts[name][-1])
        series = [[firsts[name][case] for name in right] for case in range(num_cases)]
        if any(a >= b or math.isinf(b) for line in series for a, b in itertools.pairwise(line)):
            continue
        others = [list(way) for way in itertools.permutations(names) if list(way) != right]
        wrong = [", ".join(others[index]) for index in rng.permutation(len(others))[:3]]
        listed = ", ".join(names[index] for index in rng.permutation(4))
        questions.append(_choice("obj_appearance_order", ORDER.format(listed), ", ".join(right), wrong, rng))
    return questions


def _locations(scene: dict, rng: np.random.Generator) -> list[Question]:
    questions = []
    for name, box in _unique(scene).items():
        values = [float(value) for value in box]
        truth = json.dumps([round(value, 3) for value in values])
        questions.append(Question("object_localization", LOCATE.format(name), truth, box=values))
    return questions


def scene_questions(
    scene: dict, *, seed: int, max_count: int = MAX_COUNT, count_view_share: float = CLEAR_VIEW_SHARE
) -> list[Question]:
    """
    Ask every question that a scene's record answers without ambiguity.

    Args:
        scene (`dict`): The record, see `describe_scene`.
        seed (`int`): Decides the order of options.
        max_count (`int`, defaults to 6): Largest number that is asked for by counting.
        count_view_share (`float`, defaults to 0.006): Share of some frame's pixels that each counted object must show.

    Returns:
        `list[Question]`: Grouped by type. There may be thousands: see `select_questions`.
    """
    rng = np.random.default_rng([seed, 2_000_003])
    makers = (
        _abs_distance,
        _size,
        _room_size,
        _rel_distance,
        _directions,
        _routes,
        _appearance_order,
        _locations,
    )
    counts = _counting(scene, max_count, count_view_share)
    return [*counts, *(question for maker in makers for question in maker(scene, rng))]


def _pattern(form: str) -> re.Pattern:
    return re.compile("(.+)".join(re.escape(text) for text in form.split("{}")))


PATTERNS = {
    "object_counting": _pattern(COUNTING),
    "object_abs_distance": _pattern(DISTANCE),
    "object_size_estimation": _pattern(SIZE),
    "room_size_estimation": _pattern(ROOM_SIZE),
    "object_rel_distance": _pattern(NEAREST),
    "object_rel_direction_easy": _pattern(EASY),
    "object_rel_direction_medium": _pattern(MEDIUM),
    "object_rel_direction_hard": _pattern(HARD),
    "route_planning": _pattern(ROUTE),
    "obj_appearance_order": _pattern(ORDER),
    "object_localization": _pattern(LOCATE),
}


def subjects_of(question_type: str, text: str) -> list[str]:
    """
    Read the categories that a question names, in the order of its wording.

    Args:
        question_type (`str`): One of `QUESTION_TYPES`.
        text (`str`): The bare question.

    Returns:
        `list[str]`: The categories. The last one of `object_rel_distance` is the target; those of `route_planning` are
        the stops of the way.

    Raises:
        ValueError: If the text is not of the type's wording.

    Example:
    ```python
    >>> subjects_of("object_rel_distance", NEAREST.format("sofa, tv, door, bed", "lamp"))
    ['sofa', 'tv', 'door', 'bed', 'lamp']

    ```
    """
    match = PATTERNS[question_type].fullmatch(text) if question_type in PATTERNS else None
    if match is None:
        raise ValueError(
            f"`text` must be a question of type {question_type!r} in this package's wording, got {text!r}."
        )
    found = list(match.groups())
    if question_type == "route_planning":
        return [found[0], *re.findall(r"Go forward until the ([a-z ]+?)(?= \d|\.)", found[3])]
    if question_type.startswith("object_rel_direction"):
        return found[:3]
    return [name for part in found for name in part.split(", ")]


def answer_content(question: Question) -> str:
    """Return what the answer says: the words behind the letter of a choice, otherwise the ground truth."""
    if question.options is None:
        return question.ground_truth
    return question.options[LETTERS.index(question.ground_truth)][3:]


def select_questions(questions: list[Question], limits: dict[str, int], *, seed: int) -> list[Question]:
    """
    Draw some questions of each type so that answers are spread evenly.

    Each draw takes the candidate whose answer is rarest so far, by content and by letter, ties by lot.

    Args:
        questions (`list[Question]`): The candidates.
        limits (`dict[str, int]`): Largest number per question type; types that are not named are left out.
        seed (`int`): Decides the lots.

    Returns:
        `list[Question]`: At most the wanted numbers, in the order of `limits`.
    """
    rng, chosen = np.random.default_rng([seed, 3_000_017]), []
    for question_type, limit in limits.items():
        pool = [question for question in questions if question.question_type == question_type]
        pool = [pool[index] for index in rng.permutation(len(pool))]
        contents: dict[str, int] = {}
        letters: dict[str, int] = {}
        for _ in range(min(limit, len(pool))):
            rarest = min(
                range(len(pool)),
                key=lambda index: (
                    contents.get(answer_content(pool[index]), 0) + letters.get(pool[index].ground_truth, 0)
                ),
            )
            question = pool.pop(rarest)
            contents[answer_content(question)] = contents.get(answer_content(question), 0) + 1
            letters[question.ground_truth] = letters.get(question.ground_truth, 0) + 1
            chosen.append(question)
    return chosen
