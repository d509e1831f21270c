# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint's numbers have not moved. See `tests/golden_tiny.py`."""

import json

import pytest

from tests.golden_tiny import PATH, digests, measure


GOLDEN = json.loads(PATH.read_text(encoding="ascii"))
# float32 sums in another order, on another processor, differ by less; a changed resize, template or kernel by more.
RELATIVE, ABSOLUTE = 1e-3, 1e-3


@pytest.fixture(scope="module")
def numbers():
    return measure()


def test_numbers_are_of_the_checkpoint_and_the_room_that_are_shipped():
    assert digests() == GOLDEN["of"], "the checkpoint or the embedded room has changed: run `make golden`"


@pytest.mark.parametrize("name", sorted(GOLDEN["numbers"]))
def test_number_has_not_moved(numbers, name):
    found, expected = numbers[name], GOLDEN["numbers"][name]
    if isinstance(expected, str) or name == "answers":
        assert found == expected
        return
    rows = list(zip(flat(found), flat(expected), strict=True))
    assert rows
    for one, other in rows:
        assert one == pytest.approx(other, rel=RELATIVE, abs=ABSOLUTE), f"{name}, made with {GOLDEN['made_with']}"


def flat(values) -> list[float]:
    """Numbers of nested lists, each list with its length before it."""
    if not isinstance(values, list):
        return [values]
    return [float(len(values)), *(number for value in values for number in flat(value))]
