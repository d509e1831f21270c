# SPDX-License-Identifier: Apache-2.0
"""
Answers with regressed numbers, and the units in which they are asked for.

The regression head gives SI values (metres, square metres, counts) and does not know which. The unit is read from the
question by [`asked_unit`], and the value is converted to it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .shown_geode import shown


METRES_PER_UNIT = {
    "m": 1.0,
    "cm": 0.01,
    "mm": 0.001,
    "km": 1000.0,
    "in": 0.0254,
    "ft": 0.3048,
    "yd": 0.9144,
}
COUNT = "count"
WITHHELD = "unknown"
# The words of each unit. The second entry holds words that also mean something else ("the foot of the bed", "I'm"):
# they are units only where the question says so ("in feet", "how many feet", "(ft)").
_UNIT_WORDS = {
    "m": (("meters", "metres", "meter", "metre"), ("m",)),
    "cm": (("centimeters", "centimetres", "centimeter", "centimetre", "cms", "cm"), ()),
    "mm": (("millimeters", "millimetres", "millimeter", "millimetre", "mm"), ()),
    "km": (("kilometers", "kilometres", "kilometer", "kilometre", "km"), ()),
    "in": (("inches",), ("inch",)),
    "ft": ((), ("feet", "foot", "ft")),
    "yd": ((), ("yards", "yard", "yd")),
}
_UNIT_OF_WORD = {word: unit for unit, words in _UNIT_WORDS.items() for group in words for word in group}
_PLAIN_WORDS = frozenset(word for words in _UNIT_WORDS.values() for word in words[0])
_WORDS = "|".join(sorted(_UNIT_OF_WORD, key=len, reverse=True))
# "square meters", "sq. ft", "m2", "m^2", "m" with a superscript, "meters squared"; the same for cubes.
_UNIT_PATTERN = (
    r"(?P<prefix>(?:square|sq\.?|cubic|cu\.?)[\s-]*)?"
    rf"(?P<word>{_WORDS})"
    "(?P<suffix>\\s+squared|\\s+cubed|\\^?[23]|[\u00b2\u00b3])?"
)
# "sqm" and "sqft" have no separator, so a unit starts after anything but a letter, a digit or an apostrophe ("I'm").
_MENTION = re.compile(rf"(?<![\w'\u2019]){_UNIT_PATTERN}(?!\w)", flags=re.IGNORECASE)
_UNIT_NAME = re.compile(_UNIT_PATTERN, flags=re.IGNORECASE)
_SAYS_UNIT = re.compile(r"(?:\b(?:in|how\s+many)\s+|\()$", flags=re.IGNORECASE)
_QUANTITY = re.compile(r"\d[\s-]*$")
_ASKS_COUNT = re.compile(r"\bhow\s+many\b(?:\s+(?P<noun>\w+))?|\bnumber\s+of\b|^\s*count\b", flags=re.IGNORECASE)
_NOT_COUNTED = frozenset({"degrees", "radians", "seconds", "minutes", "hours", "kilograms", "percent"})


def asked_unit(question: str) -> str | None:
    """
    Read the unit in which a question wants its number.

    A unit that the question names as the answer's ("in meters", "how many feet", "(cm)") comes first, the last one if
    there are several; then "how many", "number of" and "count" ask for a count; then any other unit counts, unless it
    belongs to a number ("the 2 m shelf") or the word has another meaning ("the foot of the bed").

    Args:
        question (`str`):
            The question, in English.

    Returns:
        `str`, *optional*: `"count"`, or one of `"m"`, `"cm"`, `"mm"`, `"km"`, `"in"`, `"ft"`, `"yd"`, with `"2"` or
        `"3"` appended for squares and cubes, such as `"m2"`. None if the question names none.

    Example:
        >>> from geode.modeling_geode.answers_geode import asked_unit
        >>> asked_unit("What is the size of this room (in square meters)?")
        'm2'
        >>> asked_unit("How many chair(s) are in this room?")
        'count'
    """
    explicit, plain = [], []
    for mention in _MENTION.finditer(question):
        before = question[: mention.start()]
        if _QUANTITY.search(before):
            continue
        unit = _unit_of(mention)
        if _SAYS_UNIT.search(before):
            explicit.append(unit)
        elif mention["word"].lower() in _PLAIN_WORDS or unit[-1] in "23":
            plain.append(unit)
    if explicit:
        return explicit[-1]
    count = _ASKS_COUNT.search(question)
    if count and (count["noun"] or "").lower() not in _NOT_COUNTED:
        return COUNT
    return plain[-1] if plain else None


def parse_unit(name: str) -> str:
    """
    Return the short form of a unit's name: `"m2"` for "square meters", "m^2", "sqm" or "m2".

    Args:
        name (`str`):
            A unit as [`asked_unit`] returns it, or in words.

    Returns:
        `str`: The short form.

    Raises:
        ValueError: If the unit is not known.
    """
    if not isinstance(name, str):
        raise ValueError(f"`name` must be the name of a unit, got {name!r}. Use 'm', 'cm2', 'count' and the like.")
    name = name.strip()
    # The short form of inches is not a word that a question may use.
    if name == COUNT or name in METRES_PER_UNIT or (name[-1:] in ("2", "3") and name[:-1] in METRES_PER_UNIT):
        return name
    found = _UNIT_NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"`name` must be 'count' or a length, area or volume of {sorted(METRES_PER_UNIT)}, got {name!r}."
        )
    return _unit_of(found)


def convert_from_si(value: float, unit: str | None) -> float:
    """
    Convert an SI value to a unit. A count is rounded to the nearest whole number that is not negative.

    Args:
        value (`float`):
            Metres, square metres, cubic metres or a count.
        unit (`str`, *optional*):
            A unit of [`asked_unit`]; `None` leaves the value as it is.

    Returns:
        `float`: The value in `unit`. Zero is never negative.

    Raises:
        ValueError: If the value is not finite or the unit is not known.
    """
    value = _checked_number(value)
    if unit is None:
        return value
    unit = parse_unit(unit)
    if unit == COUNT:
        return float(max(0, round(value)))
    return value / _si_factor(unit) + 0.0


def convert_to_si(value: float, unit: str | None) -> float:
    """
    Convert a value in a unit to SI: metres, square metres, cubic metres, or the count itself.

    Args:
        value (`float`):
            The value.
        unit (`str`, *optional*):
            Its unit; `None` says that the value is in SI already.

    Returns:
        `float`: The value in SI.

    Raises:
        ValueError: If the value is not finite or the unit is not known.
    """
    value = _checked_number(value)
    if unit is None:
        return value
    unit = parse_unit(unit)
    return value if unit == COUNT else value * _si_factor(unit)


def format_number(value: float, unit: str | None = None) -> str:
    """
    Write a number the way benchmarks read it: fixed notation, two decimals, counts whole, no unit, never "-0.00".

    Args:
        value (`float`):
            The number, in `unit`.
        unit (`str`, *optional*):
            Its unit. Only `"count"` changes the form.

    Returns:
        `str`: Digits, with a point for all but counts and a minus sign where needed.

    Raises:
        ValueError: If the value is not finite.

    Example:
        >>> from geode.modeling_geode.answers_geode import format_number
        >>> format_number(2.305, "m"), format_number(3.7, "count"), format_number(-0.001)
        ('2.31', '4', '0.00')
    """
    value = _checked_number(value)
    if unit is not None and parse_unit(unit) == COUNT:
        return str(max(0, round(value)))
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def _unit_of(match: re.Match) -> str:
    unit = _UNIT_OF_WORD[match["word"].lower()]
    form = f"{match['prefix'] or ''} {match['suffix'] or ''}".lower()
    if "sq" in form or "2" in form or "\u00b2" in form:
        return unit + "2"
    if "cu" in form or "3" in form or "\u00b3" in form:
        return unit + "3"
    return unit


def _si_factor(unit: str) -> float:
    base, power = (unit[:-1], int(unit[-1])) if unit[-1] in "23" else (unit, 1)
    return METRES_PER_UNIT[base] ** power


def _checked_number(value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`value` must be a finite number, got {shown(value)}.") from error
    if not math.isfinite(number):
        raise ValueError(
            f"`value` must be a finite number, got {number}. A regression head that gives this is not trained, or was "
            "fed non-finite inputs."
        )
    return number + 0.0


@dataclass(frozen=True)
class Measurement:
    """
    One regressed number, or a vector of them.

    Args:
        token (`str`):
            The control token that stood for it, such as `"<REG>"`.
        value (`float` or `tuple[float, ...]`):
            The value in `unit`; a tuple for control tokens of kind `"vector"`.
        unit (`str`, *optional*):
            The asked unit, see [`asked_unit`]. None if the question names none: `value` is then in SI.
        si_value (`float` or `tuple[float, ...]`):
            The regressed value, in metres, square metres or as a count.
        kind (`str`, defaults to `"scalar"`):
            `"scalar"` or `"vector"`.
        interval (`tuple[float, float]` or a tuple of them, *optional*):
            Lower and upper end in `unit`, one pair for each entry of a vector, where the model gives them
            (`drh_config.uncertainty`). Those of a count are whole, and around it.
        si_interval (`tuple[float, float]` or a tuple of them, *optional*):
            The regressed ends, in SI.
        is_withheld (`bool`, defaults to `False`):
            The interval is too wide for the caller's `abstain_above`: the text says "unknown".
    """

    token: str
    value: float | tuple[float, ...]
    unit: str | None
    si_value: float | tuple[float, ...]
    kind: str = "scalar"
    interval: tuple[float, float] | tuple[tuple[float, float], ...] | None = None
    si_interval: tuple[float, float] | tuple[tuple[float, float], ...] | None = None
    is_withheld: bool = False

    @property
    def text(self) -> str:
        """The number as it stands in the answer; a vector is a bracketed list."""
        if self.is_withheld:
            return WITHHELD
        if isinstance(self.value, tuple):
            return "[" + ", ".join(format_number(entry, self.unit) for entry in self.value) + "]"
        return format_number(self.value, self.unit)

    @classmethod
    def from_si(
        cls,
        token: str,
        values: Sequence[float],
        *,
        kind: str,
        unit: str | None = None,
        interval: Sequence[Sequence[float]] | None = None,
        abstain_above: float | None = None,
    ) -> "Measurement":
        """
        Build a measurement from a regressed value.

        Args:
            token (`str`):
                The control token.
            values (`Sequence[float]`):
                Its value in SI: one number for `"scalar"`, one or more for `"vector"`.
            kind (`str`):
                `"scalar"` or `"vector"`.
            unit (`str`, *optional*):
                The asked unit. A vector keeps SI.
            interval (`Sequence[Sequence[float]]`, *optional*):
                Lower and upper end of each value, in SI.
            abstain_above (`float`, *optional*):
                Withhold a value that half the width of its interval exceeds this share of: 0.25 keeps what is known to a
                quarter.

        Returns:
            [`Measurement`]: The value in the asked unit.

        Raises:
            ValueError: If a value is not finite, a scalar has more than one, or `abstain_above` is negative or given
                without intervals.
        """
        numbers = tuple(_checked_number(value) for value in values)
        if kind != "vector" and len(numbers) != 1:
            raise ValueError(f"`values` of a scalar must hold 1 number, got {len(numbers)} for {token}.")
        ends, is_withheld = None, False
        if interval is not None:
            ends = tuple((_checked_number(low), _checked_number(high)) for low, high in interval)
        if abstain_above is not None:
            is_withheld = _is_wide(token, numbers, ends, abstain_above)
        if kind == "vector":
            return cls(token, numbers, None, numbers, kind, interval=ends, si_interval=ends, is_withheld=is_withheld)
        value = convert_from_si(numbers[0], unit)
        return cls(
            token=token,
            value=value,
            unit=unit,
            si_value=numbers[0],
            kind=kind,
            interval=None if ends is None else interval_in(unit, value, *ends[0]),
            si_interval=None if ends is None else ends[0],
            is_withheld=is_withheld,
        )

    def to_dict(self) -> dict:
        """Return plain types that `json.dumps` takes."""
        return {
            "token": self.token,
            "value": _plain(self.value),
            "unit": self.unit,
            "si_value": _plain(self.si_value),
            "kind": self.kind,
            "interval": _plain(self.interval),
            "si_interval": _plain(self.si_interval),
            "is_withheld": self.is_withheld,
        }


@dataclass(frozen=True)
class Box3D:
    """
    An oriented box that stands upright.

    Convention:
        - Scene frame: right-handed, +z up, metres, origin on the floor below the first camera.
        - `size` is (dx, dy, dz), dx along the box's own x axis; `yaw` turns that axis about +z, in radians, and is
          defined up to pi.

    Args:
        center (`tuple[float, float, float]`):
            Centre in metres.
        size (`tuple[float, float, float]`):
            Full edge lengths in metres.
        yaw (`float`):
            Radians.
        frame (`str`, defaults to `"scene"`):
            The frame of `center` and `yaw`.
    """

    center: tuple[float, float, float]
    size: tuple[float, float, float]
    yaw: float
    frame: str = "scene"

    @property
    def text(self) -> str:
        """The box as it stands in the answer."""
        center, size = (", ".join(format_number(value) for value in triple) for triple in (self.center, self.size))
        return f"[center ({center}) m, size ({size}) m, yaw {format_number(self.yaw)} rad]"

    @classmethod
    def from_values(cls, values: Sequence[float]) -> "Box3D":
        """
        Build a box from the seven numbers that a control token of kind `"box3d"` stands for.

        Args:
            values (`Sequence[float]`):
                cx, cy, cz, dx, dy, dz in metres and yaw in radians.

        Returns:
            [`Box3D`]: The box.

        Raises:
            ValueError: If there are not seven finite numbers.
        """
        numbers = tuple(_checked_number(value) for value in values)
        if len(numbers) != 7:
            raise ValueError(f"`values` of a box must be cx, cy, cz, dx, dy, dz, yaw; got {len(numbers)} numbers.")
        return cls(center=numbers[:3], size=numbers[3:6], yaw=numbers[6])

    def to_dict(self) -> dict:
        """Return plain types that `json.dumps` takes."""
        return {"center": list(self.center), "size": list(self.size), "yaw": self.yaw, "frame": self.frame}


@dataclass(frozen=True)
class Answer:
    """
    One answer of the model.

    Args:
        text (`str`):
            The answer, with each regressed value written in its place.
        values (`list[Measurement]`):
            The regressed numbers, in order.
        boxes (`list[Box3D]`):
            The regressed boxes, in order.
    """

    text: str
    values: list[Measurement]
    boxes: list[Box3D]

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[str],
        tokens: Sequence[str],
        values: Sequence[Sequence[float]],
        *,
        kinds: Mapping[str, str],
        unit: str | None = None,
        intervals: Sequence[Sequence[Sequence[float]] | None] | None = None,
        abstain_above: float | None = None,
    ) -> "Answer":
        """
        Join text with the values that stand between.

        Args:
            segments (`Sequence[str]`):
                The text before, between and after the values: one more than there are values.
            tokens (`Sequence[str]`):
                The control token of each value.
            values (`Sequence[Sequence[float]]`):
                The numbers of each value, in SI.
            kinds (`Mapping[str, str]`):
                The kind of each control token: `"scalar"`, `"vector"` or `"box3d"`.
            unit (`str`, *optional*):
                The asked unit.
            intervals (`Sequence[Sequence[Sequence[float]]]`, *optional*):
                Lower and upper ends of the numbers of each value, in SI; None for a box.
            abstain_above (`float`, *optional*):
                See [`Measurement.from_si`].

        Returns:
            [`Answer`]: The answer, its text stripped of surrounding whitespace.
        """
        measurements, boxes, text = [], [], segments[0]
        intervals = [None] * len(tokens) if intervals is None else intervals
        for token, numbers, interval, segment in zip(tokens, values, intervals, segments[1:], strict=True):
            if kinds[token] == "box3d":
                boxes.append(Box3D.from_values(numbers))
                text += boxes[-1].text + segment
            else:
                options = {"unit": unit, "interval": interval, "abstain_above": abstain_above}
                measurements.append(Measurement.from_si(token, numbers, kind=kinds[token], **options))
                text += measurements[-1].text + segment
        return cls(text=text.strip(), values=measurements, boxes=boxes)

    def to_dict(self) -> dict:
        """Return plain types that `json.dumps` takes."""
        return {
            "text": self.text,
            "values": [value.to_dict() for value in self.values],
            "boxes": [box.to_dict() for box in self.boxes],
        }


def split_at_tokens(ids: Sequence[int], tokens: Mapping[int, str]) -> tuple[list[list[int]], list[str]]:
    """
    Split a sequence at its control tokens.

    Args:
        ids (`Sequence[int]`):
            The sequence.
        tokens (`Mapping[int, str]`):
            The control tokens by their ids.

    Returns:
        `tuple[list[list[int]], list[str]]`: What stands before, between and after the control tokens, and the tokens.

    Example:
        >>> split_at_tokens([5, 9, 6, 7], {9: "<REG>"})
        ([[5], [6, 7]], ['<REG>'])
    """
    segments, found = [[]], []
    for token_id in ids:
        if token_id in tokens:
            found.append(tokens[token_id])
            segments.append([])
        else:
            segments[-1].append(token_id)
    return segments, found


def interval_in(unit: str | None, value: float, low: float, high: float) -> tuple[float, float]:
    """
    Convert an interval in SI to a unit.

    Args:
        unit (`str`, *optional*):
            A unit of [`asked_unit`]; None leaves SI.
        value (`float`):
            The value in `unit`.
        low (`float`):
            Lower end in SI.
        high (`float`):
            Upper end in SI.

    Returns:
        `tuple[float, float]`: Both ends in `unit`. Of a count, the whole numbers in between and the count itself.

    Example:
        >>> interval_in("cm", 120.0, 1.0, 1.5), interval_in("count", 3.0, 2.3, 4.8)
        ((100.0, 150.0), (3.0, 4.0))
    """
    if unit is not None and parse_unit(unit) == COUNT:
        return min(value, max(0.0, float(math.ceil(low)))), max(value, float(math.floor(high)))
    return convert_from_si(low, unit), convert_from_si(high, unit)


def _is_wide(token: str, numbers: Sequence[float], ends, limit: float) -> bool:
    check_limit(limit)
    if ends is None:
        raise ValueError(
            f"`abstain_above={limit}` needs an interval, and {token} has none. Use a model with "
            "`drh_config.uncertainty=True`, or leave the option out."
        )
    return any((high - low) / 2.0 > limit * abs(number) for number, (low, high) in zip(numbers, ends, strict=True))


def check_limit(limit) -> None:
    """Raise unless `abstain_above` is a share."""
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit >= 0:
        raise ValueError(
            f"`abstain_above` must not be negative, got {limit!r}. 0.25 keeps what is known to a quarter."
        )


def _plain(value):
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


__all__ = [
    "Answer",
    "Box3D",
    "Measurement",
    "asked_unit",
    "check_limit",
    "convert_from_si",
    "convert_to_si",
    "format_number",
    "interval_in",
    "parse_unit",
    "split_at_tokens",
]
