# SPDX-License-Identifier: Apache-2.0
"""
Rooms for a data set: as `rooms.py` furnishes them, with ranges so wide that a name tells little about a number.

A piece of any category is stretched to a length drawn on a logarithmic scale, floors span a factor of seven, and one or
two categories are repeated two to twelve times in rows, grids and around tables. `rooms.make_room` keeps the narrow
ranges.

Convention:
    - Frames as in `rooms.py`. `LENGTHS_M` bounds the longest side of a piece, not the room's share of it: what does not
      fit is drawn smaller.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from geode.data.synthetic_rooms.boxes import rotation_about_z
from geode.data.synthetic_rooms.furniture import CATEGORIES
from geode.data.synthetic_rooms.rooms import (
    WALK_GAP_M,
    Layout,
    Light,
    Room,
    RoomObject,
    build_structure,
    daylight,
    free_ellipse,
    lamplight,
)
from geode.data.synthetic_rooms.shapes import Material, PartList


AREA_M2 = (8.0, 56.0)
COUNTS = (2, 12)
NUM_EXTRAS = (5, 9)
AREA_PER_EXTRA_M2 = 8.0  # and one more for each of these: large floors would look empty
MAX_ATTEMPTS = 60
MAX_TRIES = 40
FREE_TRIES = 14  # with the length that was drawn; after that it shrinks
SHRINKAGE = 0.95

# Shortest and longest main side in metres, and the axis that takes the stretching ("all": the piece keeps its shape).
LENGTHS_M = {
    "armchair": (0.6, 1.4, "all"),
    "ball": (0.25, 1.1, "all"),
    "bed": (1.4, 2.3, "y"),
    "bookshelf": (0.4, 2.3, "xz"),
    "cabinet": (0.4, 2.2, "xz"),
    "chair": (0.55, 1.4, "all"),
    "clock": (0.25, 1.0, "all"),
    "coffee table": (0.4, 2.1, "x"),
    "desk": (0.7, 2.2, "x"),
    "door": (1.9, 2.25, "z"),
    "lamp": (0.4, 2.15, "z"),
    "monitor": (0.4, 1.0, "all"),
    "nightstand": (0.3, 0.9, "all"),
    "picture": (0.35, 2.1, "all"),
    "plant": (0.35, 2.15, "z"),
    "radiator": (0.4, 2.1, "x"),
    "sofa": (1.1, 3.0, "x"),
    "stool": (0.35, 1.1, "all"),
    "table": (0.6, 2.6, "x"),
    "trash bin": (0.28, 1.0, "all"),
    "tv": (0.4, 2.1, "all"),
    "tv stand": (0.45, 2.4, "x"),
    "wardrobe": (1.2, 2.4, "z"),
    "window": (0.5, 2.4, "x"),
}
# What makes a room of its type: the first piece is required, the others come unless they do not fit.
FURNISHINGS = {
    "living room": (
        ("sofa", "anchor"),
        ("coffee table", "before sofa"),
        ("tv stand", "opposite"),
        ("tv", "on tv stand"),
        ("lamp", "beside sofa"),
    ),
    "bedroom": (("bed", "anchor"), ("nightstand", "beside bed"), ("wardrobe", "wall"), ("lamp", "beside bed")),
    "study": (("desk", "anchor"), ("monitor", "on desk"), ("chair", "before desk"), ("bookshelf", "wall")),
    "dining room": (("table", "off centre"), ("cabinet", "wall")),
}
COMMON_EXTRAS = (
    ("armchair", "free"),
    ("ball", "free"),
    ("bookshelf", "wall"),
    ("cabinet", "wall"),
    ("clock", "mounted"),
    ("lamp", "wall"),
    ("picture", "mounted"),
    ("plant", "wall"),
    ("radiator", "wall"),
    ("stool", "free"),
    ("trash bin", "wall"),
)
EXTRAS = {
    "living room": (("table", "wall"), ("desk", "wall"), ("chair", "wall")),
    "bedroom": (("desk", "wall"), ("tv stand", "wall"), ("tv", "on tv stand"), ("table", "wall"), ("chair", "wall")),
    "study": (("table", "wall"), ("tv stand", "wall"), ("tv", "on tv stand"), ("sofa", "wall")),
    "dining room": (("tv stand", "wall"), ("tv", "on tv stand"), ("desk", "wall"), ("coffee table", "free")),
}
REPEATABLE = ("armchair", "ball", "bookshelf", "chair", "lamp", "picture", "plant", "stool", "trash bin")
IN_GRIDS = ("armchair", "ball", "chair", "stool")  # the others only along walls


def _tinted(parts: PartList, gains: np.ndarray) -> PartList:
    """Multiply the colours of all surfaces that do not glow."""

    def tint(color):
        return None if color is None else tuple(float(v) for v in np.clip(np.asarray(color) * gains, 0.03, 0.97))

    def repaint(material: Material) -> Material:
        if material.emission > 0:
            return material
        return replace(material, color=tint(material.color), second=tint(material.second))

    return PartList(replace(part, material=repaint(part.material)) for part in parts)


def _stretched(parts: PartList, factors: np.ndarray) -> PartList:
    """Scale parts about the middle of the piece's underside."""
    return PartList(
        replace(
            part,
            low=tuple(float(v) for v in np.asarray(part.low) * factors),
            high=tuple(float(v) for v in np.asarray(part.high) * factors),
        )
        for part in parts
    )


@dataclass
class _VariedLayout(Layout):
    """A layout that draws pieces of widely varying length."""

    base: PartList = field(default_factory=PartList)
    length_m: float = 0.0
    axis: int = -1

    def choose(self, category: str) -> None:
        """Draw a piece and the length that it gets."""
        low, high, axes = LENGTHS_M[category]
        self.length_m = math.exp(self.rng.uniform(math.log(low), math.log(high)))
        self.axis = -1 if axes == "all" else "xyz".index(axes[self.rng.integers(len(axes))])
        gains = math.exp(self.rng.uniform(-0.35, 0.3)) * np.exp(self.rng.uniform(-0.22, 0.22, size=3))
        self.base = _tinted(CATEGORIES[category](self.rng).centred(), gains)

    def shrink(self, category: str) -> None:
        """Make the piece a little smaller, down to the least length of its category."""
        self.length_m = max(SHRINKAGE * self.length_m, LENGTHS_M[category][0])

    def draw(self, category: str) -> PartList:
        """Return the piece that was chosen at its present length."""
        size = self.base.size()
        if self.axis < 0:
            factors = np.full(3, self.length_m / size.max())
        else:
            # The other two sides follow halfway, so that a long piece is not as tall as it is long.
            factor = self.length_m / size[self.axis]
            factors = np.full(3, factor**0.5 if self.axis == 2 else factor**0.35)
            factors[self.axis] = factor
        return _stretched(self.base, factors)

    def fits(self, box: np.ndarray, *, ignore: RoomObject | None = None) -> bool:
        """Tell whether a box is free as in `Layout`, and below the ceiling."""
        return box[2] + 0.5 * box[5] < self.size[2] - 0.05 and super().fits(box, ignore=ignore)

    def place(self, category: str, where: str, anchor_wall: int) -> bool:
        """Place one piece, smaller where the length that was drawn does not fit."""
        self.choose(category)
        parts = self.draw(category)
        for number in range(MAX_TRIES):
            if number >= FREE_TRIES:
                self.shrink(category)
                parts = self.draw(category)
            if where.startswith("on ") and not self._is_carried(parts, where[3:]):
                continue
            if self._place_once(category, parts, where, anchor_wall):
                return True
        return False

    def _is_carried(self, parts: PartList, category: str) -> bool:
        parent = self.find(category)
        return parent is not None and bool((parts.size()[:2] <= parent.parts.size()[:2] * (1.1, 0.95)).all())

    def place_group(self, category: str, count: int) -> bool:
        """Place `count` equal pieces in an arrangement, or none."""
        self.choose(category)
        self.length_m *= count**-0.15
        arrangements = [self._line]
        if category in IN_GRIDS and self.rng.random() < 0.5:
            arrangements.insert(0, self._grid)
        if category == "chair" and self.find("table") is not None:
            arrangements.insert(0, self._around_table)
        for number in range(MAX_TRIES // 2):
            if number >= 2:
                self.shrink(category)
            parts = self.draw(category)
            for arrange in arrangements:
                before = len(self.objects)
                if arrange(category, parts, count):
                    return True
                del self.objects[before:]
        return False

    def _line(self, category: str, parts: PartList, count: int) -> bool:
        """Line the walls, from a drawn one onwards, with equal steps; pictures hang in one or two rows."""
        width, _, height = parts.size()
        step = width * self.rng.uniform(1.15, 1.7) + 0.08
        levels = [0.0]
        if category == "picture":
            is_double = height < 0.55 and self.rng.random() < 0.6
            levels = [1.28 - 0.5 * height, 1.92 - 0.5 * height] if is_double else [1.6 - 0.5 * height]
        first, placed = int(self.rng.integers(4)), 0
        for wall in ((first + offset) % 4 for offset in (0, 2, 1, 3)):
            stretch = 0.5 * self.size[0 if wall < 2 else 1] - 0.5 * width - 0.05
            at = -stretch
            while at <= stretch and placed < count:
                spots = [self._at_wall(parts, wall, at / max(stretch, 1e-6), level) for level in levels]
                done = [self.add(category, parts, *spot) for spot in spots[: count - placed]]
                placed += sum(done)
                at += step if any(done) else 0.12
        return placed == count

    def _at_wall(self, parts: PartList, wall: int, along: float, z: float) -> tuple[np.ndarray, float]:
        position, yaw = self.against_wall(parts, wall, along, z)
        position = np.array(position)
        if z > 0:
            across = 1 if wall < 2 else 0
            # As for single pieces, a centimetre off the wall: in the wall's plane the back would flicker.
            position[across] = math.copysign(0.5 * (self.size[across] - parts.size()[1]) - 0.012, position[across])
        return position, yaw

    def _grid(self, category: str, parts: PartList, count: int) -> bool:
        """Set up rows of equal distance that look the same way, somewhere on the floor."""
        columns = int(self.rng.integers(min(2, count), max(2, math.ceil(math.sqrt(count)) + 1) + 1))
        rows = math.ceil(count / columns)
        step = parts.size()[:2] * self.rng.uniform(1.25, 1.8, size=2) + 0.08
        turn = 0.5 * math.pi * int(self.rng.integers(4))
        place = np.arange(count)
        local = np.stack([place % columns - 0.5 * (columns - 1), place // columns - 0.5 * (rows - 1)], axis=1) * step
        turned = local @ rotation_about_z(turn)[:2, :2].T
        room = 0.5 * np.asarray(self.size[:2]) - np.abs(turned).max(axis=0) - 0.5 * parts.size()[:2].max() - 0.05
        if (room < 0).any():
            return False
        for _ in range(10):
            before, center = len(self.objects), self.rng.uniform(-room, room)
            if all(self.add(category, parts, (*(center + spot), 0.0), turn) for spot in turned):
                return True
            del self.objects[before:]
        return False

    def _around_table(self, category: str, parts: PartList, count: int) -> bool:
        """Draw up chairs on the four sides of the table, as many on a side as its length takes."""
        table = self.find("table")
        half, depth = 0.5 * table.parts.size()[:2], 0.5 * parts.size()[1]
        per_side = [0, 0, 0, 0]
        for _ in range(count):  # the side with most room per chair takes the next one
            room = [2 * half[0 if side < 2 else 1] / (per_side[side] + 1) for side in range(4)]
            per_side[int(np.argmax(room))] += 1
        gap = self.rng.uniform(0.08, 0.2)
        rotation = rotation_about_z(table.yaw)
        for side, number in enumerate(per_side):
            axis, sign = (0, 1.0 - 2.0 * side) if side < 2 else (1, 5.0 - 2.0 * side)
            for index in range(number):
                spot = np.zeros(3)
                spot[axis] = half[axis] * ((2 * index + 1) / number - 1.0)
                spot[1 - axis] = sign * (half[1 - axis] + depth + gap)
                turn = (math.pi if sign > 0 else 0.0) if axis == 0 else (0.5 * math.pi * sign)
                position = np.asarray(table.position) + rotation @ spot
                if not self.add(category, parts, position, table.yaw + turn):
                    return False
        return True


def _fixtures(size: tuple[float, float, float]) -> tuple[tuple[float, float], ...]:
    """Return where the ceiling lamps hang: one, two or four, by the floor's area."""
    x, y = 0.25 * size[0], 0.25 * size[1]
    if size[0] * size[1] < 18.0:
        return ((0.0, 0.0),)
    if size[0] * size[1] < 34.0:
        return ((-x, 0.0), (x, 0.0)) if size[0] > size[1] else ((0.0, -y), (0.0, y))
    return ((-x, -y), (x, -y), (-x, y), (x, y))


def _varied_lights(rng: np.random.Generator, layout: Layout, fixtures) -> list[Light]:
    angle, warmth = 2.399963 * np.arange(8), rng.uniform(-1.0, 1.0)
    radius = 0.25 * np.sqrt((np.arange(8) + 0.5) / 8)
    disc = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(8, layout.size[2] - 0.12)], axis=1)
    color = np.array([1.0, 0.93 - 0.04 * warmth, 0.84 - 0.14 * warmth])
    # Small rooms get light back from near walls, which single-bounce shading leaves out: hence the square root.
    power = 4.0 * (layout.size[0] * layout.size[1] / 20.0) ** 0.75 / len(fixtures) ** 0.8
    strength = math.exp(rng.uniform(-0.4, 0.25)) * power
    lights = [Light(disc + np.array([x, y, 0.0]), np.array([0.0, 0.0, -1.0]), strength * color) for x, y in fixtures]
    day = math.exp(rng.uniform(-0.7, 0.3))
    for item in layout.objects:
        if item.category == "window":
            light = daylight(rng, item)
            lights.append(replace(light, color=day * light.color))
    lamps = [item for item in layout.objects if item.category == "lamp"]
    # A row of twelve lamps is lit like four: each light costs as many rays as the others.
    lights += [lamplight(item) for item in lamps[:: max(1, math.ceil(len(lamps) / 4))]]
    return lights


def _furnish(layout: _VariedLayout, room_type: str, wall: int) -> tuple[float, float, float, float] | None:
    """Place everything; return the floor that stays free for the camera, or `None` if the room must be drawn anew."""
    rng = layout.rng
    if not layout.place("door", "mounted", wall) or not layout.place("window", "mounted", wall):
        return None
    entrance = layout.objects[0]
    front = np.asarray(entrance.position) + rotation_about_z(entrance.yaw) @ [0.0, 0.4, 1.0]
    layout.reserved.append(np.array([*front, 0.85, 0.7, 2.0, entrance.yaw]))
    repeated = rng.choice(len(REPEATABLE), int(rng.integers(1, 3)), replace=False)
    groups = {
        REPEATABLE[index]: int(math.exp(rng.uniform(math.log(COUNTS[0]), math.log(COUNTS[1] + 1))))
        for index in repeated
    }
    if room_type == "dining room" and "chair" not in groups:
        groups["chair"] = int(math.exp(rng.uniform(math.log(COUNTS[0]), math.log(COUNTS[1] + 1))))
    for number, (category, where) in enumerate(FURNISHINGS[room_type]):
        is_placed = category not in groups and layout.place(category, where, wall)
        if number == 0 and not is_placed:
            return None
    if "chair" in groups and layout.find("table") is not None:
        layout.place_group("chair", groups.pop("chair"))
    short = min(layout.size[:2])
    walk_area = free_ellipse(layout, max_reach_m=max(0.45, min(2.4, 0.27 * short)), margin_m=0.55)
    if walk_area is None:
        return None
    x, y, half_x, half_y = walk_area
    layout.reserved.append(np.array([x, y, 1.1, 2 * (half_x + WALK_GAP_M), 2 * (half_y + WALK_GAP_M), 2.2, 0.0]))
    for category, count in groups.items():
        layout.place_group(category, count)
    extras = [*COMMON_EXTRAS, *EXTRAS[room_type]]
    wanted = int(rng.integers(NUM_EXTRAS[0], NUM_EXTRAS[1] + 1) + layout.size[0] * layout.size[1] / AREA_PER_EXTRA_M2)
    chosen = sorted(rng.permutation(len(extras))[:wanted])
    for category, where in (extras[index] for index in chosen):
        if category not in groups and layout.find(category) is None:
            layout.place(category, where, wall)
    return walk_area


def make_varied_room(seed: int, *, room_type: str | None = None) -> Room:
    """
    Furnish a room with wide ranges. The same arguments give the same room.

    Args:
        seed (`int`): Any non-negative number.
        room_type (`str`, *optional*): A key of `FURNISHINGS`; `None` draws one.

    Returns:
        `Room`: See `rooms.make_room`.

    Raises:
        ValueError: If the type is unknown.
        RuntimeError: If no attempt left room for the camera beside the piece that makes the room's type.
    """
    if room_type is not None and room_type not in FURNISHINGS:
        raise ValueError(f"`room_type` must be one of {sorted(FURNISHINGS)}, got {room_type!r}.")
    rng = np.random.default_rng([seed, 4_000_037])
    kind = sorted(FURNISHINGS)[rng.integers(len(FURNISHINGS))]
    area, aspect = math.exp(rng.uniform(*np.log(AREA_M2))), rng.uniform(0.72, 1.4)
    size = (math.sqrt(area * aspect), math.sqrt(area / aspect), rng.uniform(2.4, 3.2))
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng([seed, 4_000_037, attempt])
        layout = _VariedLayout(rng, size)
        walk_area = _furnish(layout, room_type or kind, int(rng.integers(4)))
        if walk_area is None:
            continue
        fixtures = _fixtures(size)
        structure = build_structure(rng, size, 0.5 * np.asarray(walk_area[:2]), fixtures=fixtures)
        structure = _tinted(structure, math.exp(rng.uniform(-0.25, 0.08)) * np.exp(rng.uniform(-0.1, 0.1, size=3)))
        lights, height = _varied_lights(rng, layout, fixtures), rng.uniform(1.25, 1.7)
        return Room(
            seed, room_type or kind, size, layout.objects, structure, lights, walk_area, (height - 0.03, height + 0.03)
        )
    raise RuntimeError(
        f"`make_varied_room` must fit a {room_type or kind} into {area:.1f} m2, but {MAX_ATTEMPTS} attempts with `seed` "
        f"{seed} failed. Try another seed."
    )
