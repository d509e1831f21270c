# SPDX-License-Identifier: Apache-2.0
"""
The way to an answer in words: where the objects are, what is computed from that, and the answer.

Convention:
    - Plain English with numbers of two decimals, in metres and degrees, in the scene frame (x right and y ahead of the
      first camera, z up). The last sentence is `Answer: ...`, with what the question asks for.
    - What the text computes from its own rounded numbers agrees with the answer to within their rounding.
"""

import math
from collections.abc import Callable

import numpy as np

from geode.data.synthetic_rooms.boxes import box_distance, footprint, is_separated
from geode.data.synthetic_rooms.questions import (
    LETTERS,
    Question,
    answer_content,
    first_appearances,
    subjects_of,
    turn_angle_deg,
)


def _number(value: float) -> str:
    return f"{round(float(value), 2) + 0.0:.2f}"


def _at(values) -> str:
    return f"({', '.join(_number(value) for value in values)})"


def _boxes(scene: dict) -> dict[str, list[np.ndarray]]:
    groups: dict[str, list[np.ndarray]] = {}
    for item in scene["objects"]:
        groups.setdefault(item["category"], []).append(np.asarray(item["box"], dtype=np.float64))
    return groups


def _length(pair: tuple[np.ndarray, np.ndarray]) -> float:
    return float(np.linalg.norm(pair[1] - pair[0]))


def _feet(points: np.ndarray, polygon: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each point with the nearest one of every edge of a polygon."""
    pairs = []
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        along = end - start
        shares = np.clip((points - start) @ along / max(float(along @ along), 1e-12), 0.0, 1.0)
        pairs += [(point, start + share * along) for point, share in zip(points, shares, strict=True)]
    return pairs


def _common_point(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a point that two overlapping rectangles share: the mean of the corners of what they have in common."""
    common = list(first)
    for start, end in zip(second, np.roll(second, -1, axis=0), strict=True):  # counterclockwise: inside is on the left
        sides = [(end[0] - start[0]) * (p[1] - start[1]) - (end[1] - start[1]) * (p[0] - start[0]) for p in common]
        kept = []
        for index, (point, side) in enumerate(zip(common, sides, strict=True)):
            other, beyond = common[index - 1], sides[index - 1]
            if (side >= 0) != (beyond >= 0):
                kept.append(other + (point - other) * beyond / (beyond - side))
            if side >= 0:
                kept.append(point)
        common = kept
    # Rectangles that only touch may lose their one common point to rounding.
    return np.mean(common, axis=0) if common else 0.5 * (first.mean(axis=0) + second.mean(axis=0))


def closest_points(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Return a closest pair of points of two upright boxes.

    Args:
        first (`np.ndarray` of shape `(7,)`): A box.
        second (`np.ndarray` of shape `(7,)`): A box in the same frame.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: A point of each, `(3,)`. Boxes that overlap give points of equal coordinates
        along the axes in which they do.
    """
    corners = footprint(first), footprint(second)
    if not is_separated(*corners):
        flat = (_common_point(*corners),) * 2
    else:
        flat = min((*_feet(*corners), *(pair[::-1] for pair in _feet(*corners[::-1]))), key=_length)
    lows = [box[2] - 0.5 * box[5] for box in (first, second)]
    highs = [box[2] + 0.5 * box[5] for box in (first, second)]
    if lows[0] > highs[1]:
        levels = (lows[0], highs[1])
    elif lows[1] > highs[0]:
        levels = (highs[0], lows[1])
    else:
        level = 0.5 * (max(lows) + min(highs))
        levels = (level, level)
    return np.array([*flat[0], levels[0]]), np.array([*flat[1], levels[1]])


def _counting(names: list[str], question: Question, scene: dict) -> str:
    places = [_at(box[:3]) for box in _boxes(scene)[names[0]]]
    return f"I find a {names[0]} at each of {', '.join(places)}. That makes {len(places)}."


def _distance_between(first: str, second: str, groups: dict[str, list[np.ndarray]]) -> tuple[str, float]:
    boxes = groups[first][0], groups[second][0]
    ends = closest_points(*boxes)
    gaps = [abs(float(value)) for value in ends[1] - ends[0]]
    squares = " + ".join(f"{_number(gap)}^2" for gap in gaps)
    distance = box_distance(*boxes)
    text = f"{_at(ends[0])} on the {first} and {_at(ends[1])} on the {second}: sqrt({squares}) = {_number(distance)} m"
    return text, distance


def _abs_distance(names: list[str], question: Question, scene: dict) -> str:
    groups = _boxes(scene)
    where = " and ".join(f"the {name} at {_at(groups[name][0][:3])}" for name in names)
    return f"I find {where}. The closest points are {_distance_between(names[0], names[1], groups)[0]}."


def _size(names: list[str], question: Question, scene: dict) -> str:
    sides = _boxes(scene)[names[0]][0][3:6]
    listed = " x ".join(_number(side) for side in sides)
    return f"The {names[0]} measures {listed} m. The longest of these is {_number(max(sides))} m."


def _room_size(names: list[str], question: Question, scene: dict) -> str:
    corners = ", ".join(_at(corner) for corner in scene["room"]["floor_polygon"])
    length, width, _ = scene["room"]["size_m"]
    return (
        f"The floor's corners are {corners}, so the room is {_number(length)} m by {_number(width)} m, "
        f"which makes {_number(scene['room']['area_m2'])} square meters."
    )


def _rel_distance(names: list[str], question: Question, scene: dict) -> str:
    groups, target = _boxes(scene), names[-1]
    lines = [_distance_between(name, target, groups)[0] for name in names[:-1]]
    return (
        f"The {target} is at {_at(groups[target][0][:3])}. The closest points are {'; '.join(lines)}. "
        f"The smallest distance is that of the {answer_content(question)}."
    )


def _direction(names: list[str], question: Question, scene: dict) -> str:
    stand, face, look = (_boxes(scene)[name][0][:2] for name in names)
    angle = turn_angle_deg(stand, face, look)
    ahead, aside = face - stand, look - stand
    cross = ahead[0] * aside[1] - ahead[1] * aside[0]
    where = ", ".join(f"the {name} is at {_at(point)}" for name, point in zip(names, (stand, face, look), strict=True))
    return (
        f"In the floor plan {where}. Facing the {names[1]} I look along {_at(ahead)}, and the {names[2]} is along "
        f"{_at(aside)}. Their cross product is {_number(cross)} and their dot product {_number(ahead @ aside)}, a turn of "
        f"{_number(abs(angle))} degrees to the {'left' if angle > 0 else 'right'}."
    )


def _route(names: list[str], question: Question, scene: dict) -> str:
    groups = _boxes(scene)
    points = [groups[name][0][:2] for name in names]
    where = ", ".join(f"the {name} is at {_at(point)}" for name, point in zip(names, points, strict=True))
    steps = []
    words = {"Turn Left": "turn left", "Turn Right": "turn right", "Turn Back": "turn back"}
    for index, turn in enumerate(answer_content(question).split(", "), start=1):
        before, here, after = points[index - 1 : index + 2]
        angle = turn_angle_deg(here, 2 * here - before, after)
        side = "left" if angle > 0 else "right"
        steps.append(
            f"At the {names[index]} I come along {_at(here - before)} and leave along {_at(after - here)}, "
            f"{_number(abs(angle))} degrees to the {side}: {words[turn]}."
        )
    return f"In the floor plan {where}. {' '.join(steps)}"


def _order(names: list[str], question: Question, scene: dict) -> str:
    fps = scene["camera"]["fps"]
    appearances = first_appearances(scene)
    firsts = {name: appearances[name][-1] / fps for name in names}
    where = ", ".join(f"the {name} after {_number(firsts[name])} s" for name in names)
    return f"I first see {where}. In the order of time: {answer_content(question)}."


def _location(names: list[str], question: Question, scene: dict) -> str:
    box = _boxes(scene)[names[0]][0]
    sides = " x ".join(_number(side) for side in box[3:6])
    return (
        f"The {names[0]} is centred at {_at(box[:3])} and measures {sides} m, turned by "
        f"{_number(math.degrees(box[6]))} degrees."
    )


_WRITERS: dict[str, Callable[[list[str], Question, dict], str]] = {
    "object_counting": _counting,
    "object_abs_distance": _abs_distance,
    "object_size_estimation": _size,
    "room_size_estimation": _room_size,
    "object_rel_distance": _rel_distance,
    "object_rel_direction_easy": _direction,
    "object_rel_direction_medium": _direction,
    "object_rel_direction_hard": _direction,
    "route_planning": _route,
    "obj_appearance_order": _order,
    "object_localization": _location,
}
_UNITS = {"m": " meters", "cm": " centimeters", "m2": " square meters", "count": ""}


def write_rationale(question: Question, scene: dict) -> str:
    """
    Write down how a question is answered from a scene's record.

    Args:
        question (`Question`): The question, of any type.
        scene (`dict`): The record that it was made from.

    Returns:
        `str`: Some sentences; the last one is the answer.

    Example:
    ```python
    >>> scene = {"objects": [{"category": "bed", "box": [0.0, 2.0, 0.25, 2.1, 1.4, 0.5, 0.0]}]}
    >>> question = Question(
    ...     "object_size_estimation",
    ...     "What is the length of the longest dimension (length, width, or height) of the bed, measured in centimeters?",
    ...     "210",
    ...     value=210.0,
    ...     unit="cm",
    ... )
    >>> write_rationale(question, scene)
    'The bed measures 2.10 x 1.40 x 0.50 m. The longest of these is 2.10 m. Answer: 210 centimeters.'

    ```
    """
    names = subjects_of(question.question_type, question.question)
    text = _WRITERS[question.question_type](names, question, scene)
    if question.box is not None:
        return f"{text} Answer: the box {question.ground_truth}."
    if question.options is not None:
        return f"{text} Answer: {question.options[LETTERS.index(question.ground_truth)]}."
    return f"{text} Answer: {question.ground_truth}{_UNITS[question.unit]}."
