# SPDX-License-Identifier: Apache-2.0
"""
Other wordings of VSI-Bench's questions about numbers and boxes, in other units: as people ask them.

A model that is trained on the benchmark's templates alone takes any other question for something else. The wordings are ours.
"""

import hashlib

from geode.data.schemas import bare_prompt
from geode.data.synthetic_rooms.questions import PATTERNS
from geode.modeling_geode.answers_geode import convert_from_si, format_number


LENGTH_UNITS = {"meters": "m", "centimeters": "cm", "feet": "ft", "inches": "in"}
AREA_UNITS = {"square meters": "m2", "square feet": "ft2"}
COUNTS = {"": "count"}
NO_UNITS = {"": None}
# `{unit}` is a word of the units; a wording without it is in the SI unit that comes first.
WORDINGS: dict[str, tuple[dict[str, str | None], tuple[str, ...]]] = {
    "object_abs_distance": (
        LENGTH_UNITS,
        (
            "How far is the {0} from the {1}?",
            "How far apart are the {0} and the {1} in {unit}?",
            "What is the distance between the {0} and the {1} in {unit}?",
            "How many {unit} are between the {0} and the {1}?",
        ),
    ),
    "object_size_estimation": (
        LENGTH_UNITS,
        (
            "How large is the {0}?",
            "How long is the longest side of the {0} in {unit}?",
            "What is the largest dimension of the {0} in {unit}?",
            "How many {unit} does the {0} measure along its longest side?",
        ),
    ),
    "room_size_estimation": (
        AREA_UNITS,
        (
            "How large is this room?",
            "What is the floor area of this room in {unit}?",
            "How many {unit} does this room have?",
        ),
    ),
    "object_counting": (
        COUNTS,
        ("How many {0}s are there?", "Count the {0}s.", "What is the number of {0}s in the room?"),
    ),
    "object_localization": (NO_UNITS, ("Where is the {0}?", "Where can I find the {0}?", "Show me the {0}.")),
}


def reworded(record: dict, *, seed: int = 0) -> dict:
    """
    Ask a question in other words, and its number in another unit.

    The value in SI stays, so what is regressed stays. A rationale ends with the answer in the old unit, and is dropped.

    Args:
        record (`dict`): A record as a dict, see [`Record`].
        seed (`int`, defaults to 0): Decides, with the record's `uid`, on words and unit.

    Returns:
        `dict`: The record, as it was if its wording is not one of VSI-Bench's.

    Example:
    ```python
    >>> prompt = (
    ...     "What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the "
    ...     "combined space."
    ... )
    >>> record = reworded({"uid": "0", "prompt": prompt, "value_si": 12.0, "unit": "m2"})
    >>> record["prompt"], record["unit"], record["answer_text"]
    ('How many square feet does this room have?', 'ft2', '129.17')

    ```
    """
    prompt = bare_prompt(record["prompt"])
    matches = ((name, PATTERNS[name].fullmatch(prompt)) for name in WORDINGS)
    name, match = next((found for found in matches if found[1]), (None, None))
    if match is None:
        return record
    units, wordings = WORDINGS[name]
    digest = hashlib.blake2b(record["uid"].encode(), digest_size=8, key=f"reworded {seed}".encode()).digest()
    drawn = int.from_bytes(digest, "big")
    wording = wordings[drawn % len(wordings)]
    words = list(units)
    word = words[drawn // len(wordings) % len(words)] if "{unit}" in wording else words[0]
    changed = {**record, "prompt": wording.format(*match.groups(), unit=word), "rationale": None, "final": None}
    if units[word] is None or record["value_si"] is None:
        return changed
    value = float(f"{convert_from_si(record['value_si'], units[word]):.7g}")
    return {**changed, "value": value, "unit": units[word], "answer_text": format_number(value, units[word])}


__all__ = ["WORDINGS", "reworded"]
