# SPDX-License-Identifier: Apache-2.0
"""
The pieces of furniture. Each function draws one piece from a random generator and returns its parts.

Convention:
    - Object frame: +z up, +y the front (away from the wall that the piece stands or hangs at), metres.
    - Parts may run into one another, but no two of them share a visible plane, which would flicker.
"""

import itertools
from collections.abc import Callable

import numpy as np

from geode.data.synthetic_rooms.shapes import Material, PartList


Generator = np.random.Generator

METAL = Material((0.62, 0.63, 0.66), pattern="solid")
DARK = Material((0.13, 0.13, 0.15), pattern="noise", scale_m=0.05)
WHITE = Material((0.93, 0.92, 0.89), pattern="noise", scale_m=0.3)
BRASS = Material((0.80, 0.62, 0.25), pattern="solid")
WOODS = ((0.72, 0.51, 0.30), (0.50, 0.31, 0.17), (0.85, 0.69, 0.47), (0.36, 0.22, 0.14), (0.62, 0.36, 0.22))
FABRICS = (
    (0.20, 0.42, 0.62),
    (0.72, 0.29, 0.22),
    (0.28, 0.50, 0.38),
    (0.80, 0.62, 0.22),
    (0.47, 0.33, 0.55),
    (0.22, 0.52, 0.55),
    (0.78, 0.47, 0.50),
    (0.55, 0.56, 0.60),
)
BOOKS = (
    (0.70, 0.18, 0.16),
    (0.15, 0.30, 0.55),
    (0.20, 0.45, 0.28),
    (0.85, 0.70, 0.30),
    (0.90, 0.87, 0.80),
    (0.35, 0.2, 0.4),
)


def _wood(rng: Generator) -> Material:
    color = WOODS[rng.integers(len(WOODS))]
    return Material(color, tuple(0.72 * np.asarray(color)), "wood", 0.06)


def _fabric(rng: Generator) -> Material:
    return Material(FABRICS[rng.integers(len(FABRICS))], pattern="noise", scale_m=0.04)


def _lighter(material: Material, share: float = 0.25) -> Material:
    color = tuple(float(value) for value in (1 - share) * np.asarray(material.color) + share)
    return Material(color, None, material.pattern, material.scale_m)


def _legs(parts: PartList, width: float, depth: float, height: float, radius: float, material: Material) -> None:
    for x in (-width / 2 + 1.6 * radius, width / 2 - 1.6 * radius):
        for y in (-depth / 2 + 1.6 * radius, depth / 2 - 1.6 * radius):
            parts.tube((x, y), radius, (0.0, height), material, taper=1.3)


def sofa(rng: Generator) -> PartList:
    """Draw a sofa with two or three seats."""
    width, depth, height = rng.uniform(1.6, 2.5), rng.uniform(0.8, 0.98), rng.uniform(0.72, 0.92)
    cloth = _fabric(rng)
    arm, seat = rng.uniform(0.14, 0.22), rng.uniform(0.40, 0.46)
    parts = PartList()
    parts.box((-width / 2 + 0.02, width / 2 - 0.02), (-depth / 2 + 0.04, depth / 2 - 0.06), (0.08, seat - 0.12), cloth)
    parts.box((-width / 2 + 0.03, width / 2 - 0.03), (-depth / 2, -depth / 2 + 0.24), (0.07, height), cloth)
    for sign in (-1, 1):
        x = sorted((sign * width / 2, sign * (width / 2 - arm)))
        parts.box(x, (-depth / 2 + 0.03, depth / 2 - 0.02), (0.06, seat + 0.16), cloth)
        parts.tube((seat + 0.16, np.mean(x)), arm / 2 + 0.015, (-depth / 2 + 0.02, depth / 2), cloth, axis=1)
    count = 2 if width < 2.0 else 3
    step = (width - 2 * arm) / count
    for index in range(count):
        x = -width / 2 + arm + index * step
        parts.box(
            (x + 0.015, x + step - 0.015), (-depth / 2 + 0.2, depth / 2 - 0.03), (seat - 0.16, seat), _lighter(cloth)
        )
        back = (-depth / 2 + 0.16, -depth / 2 + 0.36)
        parts.box((x + 0.025, x + step - 0.025), back, (seat - 0.02, height - 0.05), _lighter(cloth, 0.18))
    for x in (-width / 2 + 0.12, width / 2 - 0.12):
        for y in (-depth / 2 + 0.12, depth / 2 - 0.14):
            parts.tube((x, y), 0.03, (0.0, 0.1), DARK)
    return parts


def armchair(rng: Generator) -> PartList:
    """Draw an upholstered chair with rolled arms."""
    width, depth, height = rng.uniform(0.72, 0.95), rng.uniform(0.75, 0.92), rng.uniform(0.8, 1.05)
    cloth, seat = _fabric(rng), 0.43
    parts = PartList()
    parts.box((-width / 2 + 0.05, width / 2 - 0.05), (-depth / 2 + 0.05, depth / 2 - 0.04), (0.12, seat - 0.1), cloth)
    parts.box((-width / 2 + 0.06, width / 2 - 0.06), (-depth / 2, -depth / 2 + 0.18), (0.11, height - 0.08), cloth)
    parts.tube((-depth / 2 + 0.1, height - 0.1), 0.1, (-width / 2 + 0.055, width / 2 - 0.055), cloth, axis=0)
    parts.box(
        (-width / 2 + 0.17, width / 2 - 0.17), (-depth / 2 + 0.15, depth / 2), (seat - 0.12, seat), _lighter(cloth)
    )
    for sign in (-1, 1):
        x = sign * (width / 2 - 0.09)
        parts.box((x - 0.07, x + 0.07), (-depth / 2 + 0.06, depth / 2 - 0.05), (0.10, seat + 0.15), cloth)
        parts.tube((seat + 0.15, x), 0.09, (-depth / 2 + 0.04, depth / 2 - 0.03), cloth, axis=1)
    _legs(parts, width - 0.1, depth - 0.1, 0.13, 0.025, DARK)
    return parts


def coffee_table(rng: Generator) -> PartList:
    """Draw a low table, rectangular or round."""
    height, wood, parts = rng.uniform(0.36, 0.5), _wood(rng), PartList()
    if rng.random() < 0.35:
        radius = rng.uniform(0.35, 0.5)
        parts.tube((0, 0), radius, (height - 0.04, height), wood)
        parts.tube((0, 0), 0.06, (0.03, height - 0.03), METAL)
        parts.tube((0, 0), 0.6 * radius, (0.0, 0.04), METAL)
        return parts
    width, depth = rng.uniform(0.8, 1.3), rng.uniform(0.5, 0.7)
    parts.box((-width / 2, width / 2), (-depth / 2, depth / 2), (height - 0.05, height), wood)
    parts.box(
        (-width / 2 + 0.06, width / 2 - 0.06), (-depth / 2 + 0.06, depth / 2 - 0.06), (0.12, 0.15), _lighter(wood)
    )
    for x in (-width / 2 + 0.05, width / 2 - 0.05):
        for y in (-depth / 2 + 0.05, depth / 2 - 0.05):
            parts.box((x - 0.03, x + 0.03), (y - 0.03, y + 0.03), (0.0, height - 0.03), wood)
    return parts


def table(rng: Generator) -> PartList:
    """Draw a dining table."""
    width, depth, height = rng.uniform(1.1, 2.0), rng.uniform(0.75, 1.0), rng.uniform(0.70, 0.78)
    wood, parts = _wood(rng), PartList()
    parts.box((-width / 2, width / 2), (-depth / 2, depth / 2), (height - 0.045, height), wood)
    rail = (height - 0.13, height - 0.03)
    parts.box((-width / 2 + 0.08, width / 2 - 0.08), (-depth / 2 + 0.08, depth / 2 - 0.08), rail, _lighter(wood, 0.1))
    _legs(parts, width - 0.04, depth - 0.04, height - 0.04, 0.035, wood)
    return parts


def desk(rng: Generator) -> PartList:
    """Draw a desk with a drawer unit."""
    width, depth, height = rng.uniform(1.1, 1.7), rng.uniform(0.6, 0.78), rng.uniform(0.70, 0.78)
    wood, parts = _wood(rng), PartList()
    parts.box((-width / 2, width / 2), (-depth / 2, depth / 2), (height - 0.04, height), wood)
    parts.box(
        (-width / 2 + 0.02, -width / 2 + 0.05), (-depth / 2 + 0.02, depth / 2 - 0.02), (0.0, height - 0.02), wood
    )
    parts.box((width / 2 - 0.42, width / 2 - 0.02), (-depth / 2 + 0.03, depth / 2 - 0.04), (0.0, height - 0.03), wood)
    for index in range(3):
        low = 0.06 + index * (height - 0.12) / 3
        drawer = (low, low + (height - 0.12) / 3 - 0.025)
        parts.box((width / 2 - 0.40, width / 2 - 0.04), (depth / 2 - 0.06, depth / 2 - 0.025), drawer, _lighter(wood))
        parts.ball((width / 2 - 0.22, depth / 2 - 0.018, np.mean(drawer)), 0.016, METAL)
    return parts


def chair(rng: Generator) -> PartList:
    """Draw a chair with slats."""
    width, depth, height = rng.uniform(0.40, 0.52), rng.uniform(0.42, 0.54), rng.uniform(0.80, 1.05)
    wood, seat, parts = _wood(rng), rng.uniform(0.43, 0.48), PartList()
    cushion = _fabric(rng)
    parts.box((-width / 2, width / 2), (-depth / 2 + 0.01, depth / 2), (seat - 0.05, seat - 0.01), wood)
    parts.box(
        (-width / 2 + 0.02, width / 2 - 0.02),
        (-depth / 2 + 0.06, depth / 2 - 0.02),
        (seat - 0.03, seat + 0.02),
        cushion,
    )
    for x in (-width / 2 + 0.03, width / 2 - 0.03):
        parts.box((x - 0.02, x + 0.02), (depth / 2 - 0.06, depth / 2 - 0.02), (0.0, seat - 0.02), wood)
        parts.box((x - 0.022, x + 0.022), (-depth / 2, -depth / 2 + 0.045), (0.0, height), wood)
    for index in range(3):
        low = seat + 0.1 + index * (height - seat - 0.12) / 3
        y = (-depth / 2 + 0.01, -depth / 2 + 0.032)
        parts.box((-width / 2 + 0.03, width / 2 - 0.03), y, (low, low + 0.09), wood)
    return parts


def stool(rng: Generator) -> PartList:
    """Draw a round stool."""
    radius, height = rng.uniform(0.16, 0.22), rng.uniform(0.42, 0.72)
    wood, parts = _wood(rng), PartList()
    parts.tube((0, 0), radius, (height - 0.06, height), _fabric(rng))
    parts.tube((0, 0), radius - 0.02, (height - 0.09, height - 0.05), wood)
    _legs(parts, 1.7 * radius, 1.7 * radius, height - 0.07, 0.018, wood)
    parts.tube((0, 0), 0.72 * radius, (0.16, 0.18), METAL)
    return parts


def bookshelf(rng: Generator) -> PartList:
    """Draw an open shelf full of books."""
    width, depth, height = rng.uniform(0.7, 1.3), rng.uniform(0.28, 0.38), rng.uniform(1.3, 2.1)
    wood, parts = _wood(rng), PartList()
    parts.box(
        (-width / 2 + 0.01, width / 2 - 0.01),
        (-depth / 2 + 0.005, -depth / 2 + 0.02),
        (0.01, height - 0.01),
        _lighter(wood, 0.1),
    )
    for sign in (-1, 1):
        x = sorted((sign * width / 2, sign * (width / 2 - 0.03)))
        parts.box(x, (-depth / 2, depth / 2), (0.0, height), wood)
    levels = max(3, round(height / 0.36))
    bounds = np.linspace(0.06, height - 0.02, levels + 1)
    for z in bounds:
        parts.box(
            (-width / 2 + 0.01, width / 2 - 0.01), (-depth / 2 + 0.01, depth / 2 - 0.006), (z - 0.02, z + 0.005), wood
        )
    for low, high in itertools.pairwise(bounds):
        x = -width / 2 + 0.05
        while x < width / 2 - 0.12:
            thick = rng.uniform(0.025, 0.055)
            tall, deep = rng.uniform(0.55, 0.85) * (high - low), rng.uniform(0.6, 0.85) * depth
            if rng.random() < 0.86:
                book = Material(BOOKS[rng.integers(len(BOOKS))], pattern="solid")
                parts.box((x, x + thick - 0.003), (-depth / 2 + 0.015, -depth / 2 + deep), (low, low + tall), book)
            x += thick
    return parts


def cabinet(rng: Generator) -> PartList:
    """Draw a sideboard with two or three doors."""
    width, depth, height = rng.uniform(0.8, 1.6), rng.uniform(0.38, 0.5), rng.uniform(0.75, 1.1)
    wood, parts = _wood(rng), PartList()
    parts.box((-width / 2, width / 2), (-depth / 2, depth / 2 - 0.03), (0.08, height - 0.03), wood)
    parts.box(
        (-width / 2 - 0.015, width / 2 + 0.015),
        (-depth / 2 - 0.005, depth / 2),
        (height - 0.035, height),
        _lighter(wood, 0.35),
    )
    _legs(parts, width - 0.06, depth - 0.1, 0.1, 0.02, DARK)
    count = 2 if width < 1.2 else 3
    for index in range(count):
        low = -width / 2 + 0.02 + index * (width - 0.04) / count
        high = low + (width - 0.04) / count
        parts.box((low + 0.008, high - 0.008), (0.0, depth / 2 - 0.012), (0.1, height - 0.06), _lighter(wood, 0.12))
        knob = high - 0.06 if index % 2 == 0 else low + 0.06
        parts.ball((knob, depth / 2 - 0.008, 0.55 * height), 0.018, BRASS)
    return parts


def tv_stand(rng: Generator) -> PartList:
    """Draw a low, wide piece of furniture for a television."""
    width, depth, height = rng.uniform(1.1, 1.8), rng.uniform(0.36, 0.48), rng.uniform(0.38, 0.56)
    wood, parts = _wood(rng), PartList()
    parts.box((-width / 2, width / 2), (-depth / 2, depth / 2), (height - 0.04, height), wood)
    parts.box(
        (-width / 2 + 0.01, width / 2 - 0.01), (-depth / 2 + 0.01, depth / 2 - 0.02), (0.05, height - 0.03), DARK
    )
    for index in range(3):
        low = -width / 2 + 0.03 + index * (width - 0.06) / 3
        span = (low, low + (width - 0.06) / 3 - 0.015)
        parts.box(span, (0.0, depth / 2 - 0.005), (0.075, height - 0.06), _lighter(wood, 0.15))
    parts.box((-width / 2 + 0.05, width / 2 - 0.05), (-depth / 2 + 0.05, depth / 2 - 0.05), (0.0, 0.06), DARK)
    return parts


def _screen(rng: Generator, width: float, share: float, foot: float, glow: Material) -> PartList:
    height, parts = width * share, PartList()
    parts.box((-width / 2, width / 2), (-0.025, 0.02), (foot, foot + height), DARK)
    parts.box((-width / 2 + 0.02, width / 2 - 0.02), (0.0, 0.025), (foot + 0.025, foot + height - 0.02), glow)
    parts.box((-0.04, 0.04), (-0.035, -0.005), (0.01, foot + 0.1), DARK)
    parts.box((-0.16 * width - 0.08, 0.16 * width + 0.08), (-0.1, 0.1), (0.0, 0.018), DARK)
    return parts


def tv(rng: Generator) -> PartList:
    """Draw a television on its foot."""
    glow = Material((0.10, 0.22, 0.42), (0.18, 0.48, 0.62), "painting", 0.25, emission=0.35)
    return _screen(rng, rng.uniform(0.85, 1.35), 0.57, 0.07, glow)


def monitor(rng: Generator) -> PartList:
    """Draw a computer monitor that shows a bright screen."""
    glow = Material((0.55, 0.75, 0.95), (0.92, 0.95, 0.98), "stripes", 0.07, emission=0.45)
    return _screen(rng, rng.uniform(0.5, 0.72), 0.58, 0.1, glow)


def lamp(rng: Generator) -> PartList:
    """Draw a floor lamp with a glowing shade."""
    height, radius, parts = rng.uniform(1.35, 1.75), rng.uniform(0.17, 0.25), PartList()
    shade = Material((1.0, 0.86, 0.62), pattern="solid", emission=0.75)
    parts.tube((0, 0), 0.75 * radius, (0.0, 0.03), DARK)
    parts.tube((0, 0), 0.014, (0.02, height - 0.1), METAL)
    parts.tube((0, 0), radius, (height - rng.uniform(0.26, 0.34), height), shade, taper=0.68)
    return parts


def plant(rng: Generator) -> PartList:
    """Draw a pot plant."""
    height, pot, parts = rng.uniform(0.55, 1.4), rng.uniform(0.13, 0.2), PartList()
    clay = Material(((0.78, 0.43, 0.28), (0.88, 0.86, 0.82), (0.25, 0.35, 0.42))[rng.integers(3)])
    rim = 1.5 * pot
    parts.tube((0, 0), pot, (0.0, rim), clay, taper=1.35)
    parts.tube((0, 0), 0.88 * pot, (rim - 0.03, rim + 0.008), Material((0.22, 0.15, 0.10)))
    parts.tube((0, 0), 0.02, (rim, 0.8 * height), Material((0.35, 0.26, 0.15)))
    spread = rng.uniform(0.2, 0.32)
    for index in range(11):
        angle, lift = 2.4 * index, (index + 1) / 11
        reach = spread * (1.0 - 0.65 * lift)
        center = (reach * np.cos(angle), reach * np.sin(angle), rim + 0.08 + (height - rim - 0.18) * lift)
        green = Material((0.16 + 0.1 * rng.random(), 0.42 + 0.2 * rng.random(), 0.17), pattern="noise", scale_m=0.03)
        parts.ball(center, (0.11, 0.11, 0.075), green)
    return parts


def bed(rng: Generator) -> PartList:
    """Draw a bed with a headboard, two pillows and a blanket."""
    width, depth, height = rng.uniform(0.95, 1.85), rng.uniform(1.9, 2.15), rng.uniform(0.42, 0.56)
    wood, cloth, parts = _wood(rng), _fabric(rng), PartList()
    parts.box((-width / 2, width / 2), (-depth / 2, -depth / 2 + 0.06), (0.0, height + 0.5), wood)
    parts.box((-width / 2 + 0.01, width / 2 - 0.01), (-depth / 2 + 0.03, depth / 2), (0.1, height - 0.18), wood)
    parts.box(
        (-width / 2 + 0.03, width / 2 - 0.03), (-depth / 2 + 0.05, depth / 2 - 0.03), (height - 0.2, height), WHITE
    )
    blanket = Material(cloth.color, _lighter(cloth, 0.5).color, "stripes", 0.3)
    parts.box(
        (-width / 2 + 0.015, width / 2 - 0.015),
        (-depth / 2 + 0.62, depth / 2 - 0.015),
        (height - 0.16, height + 0.03),
        blanket,
    )
    for x in (-width / 4, width / 4):
        parts.ball((x, -depth / 2 + 0.32, height + 0.03), (0.22 * width, 0.2, 0.09), WHITE)
    _legs(parts, width - 0.04, depth - 0.1, 0.12, 0.03, DARK)
    return parts


def nightstand(rng: Generator) -> PartList:
    """Draw a small chest of two drawers."""
    width, depth, height = rng.uniform(0.38, 0.55), rng.uniform(0.34, 0.45), rng.uniform(0.42, 0.62)
    wood, parts = _wood(rng), PartList()
    parts.box((-width / 2, width / 2), (-depth / 2, depth / 2 - 0.02), (0.05, height), wood)
    parts.box((-width / 2 + 0.03, width / 2 - 0.03), (-depth / 2 + 0.03, depth / 2 - 0.05), (0.0, 0.06), DARK)
    for low in (0.08, 0.08 + (height - 0.1) / 2):
        face = (low, low + (height - 0.1) / 2 - 0.02)
        parts.box((-width / 2 + 0.02, width / 2 - 0.02), (0.0, depth / 2 - 0.005), face, _lighter(wood))
        parts.ball((0.0, depth / 2, np.mean(face)), 0.018, BRASS)
    return parts


def wardrobe(rng: Generator) -> PartList:
    """Draw a tall closet with two or three doors."""
    width, depth, height = rng.uniform(0.9, 1.8), rng.uniform(0.5, 0.65), rng.uniform(1.8, 2.2)
    wood, parts = _wood(rng), PartList()
    parts.box((-width / 2, width / 2), (-depth / 2, depth / 2 - 0.025), (0.0, height), wood)
    count = 2 if width < 1.3 else 3
    for index in range(count):
        low = -width / 2 + 0.015 + index * (width - 0.03) / count
        high = low + (width - 0.03) / count
        parts.box((low + 0.008, high - 0.008), (0.0, depth / 2), (0.08, height - 0.05), _lighter(wood, 0.22))
        handle = high - 0.06 if index % 2 == 0 else low + 0.06
        parts.box((handle - 0.01, handle + 0.01), (0.0, depth / 2 + 0.02), (0.9, 1.15), METAL)
    return parts


def trash_bin(rng: Generator) -> PartList:
    """Draw an open waste-paper bin."""
    radius, height, parts = rng.uniform(0.12, 0.19), rng.uniform(0.26, 0.5), PartList()
    color = ((0.30, 0.55, 0.62), (0.60, 0.62, 0.65), (0.75, 0.35, 0.25))[rng.integers(3)]
    parts.tube((0, 0), radius, (0.0, height), Material(color, None, "stripes", 0.05), taper=1.25)
    parts.tube((0, 0), 0.9 * radius, (height - 0.04, height + 0.004), DARK)
    return parts


def ball(rng: Generator) -> PartList:
    """Draw a striped ball."""
    radius, parts = rng.uniform(0.11, 0.32), PartList()
    pair = (((0.88, 0.25, 0.2), (0.95, 0.92, 0.85)), ((0.2, 0.4, 0.8), (0.95, 0.8, 0.2)))[rng.integers(2)]
    parts.ball((0, 0, radius), radius, Material(pair[0], pair[1], "stripes", 0.8 * radius))
    return parts


def radiator(rng: Generator) -> PartList:
    """Draw a ribbed heater."""
    count, height, parts = int(rng.integers(6, 16)), rng.uniform(0.45, 0.65), PartList()
    for index in range(count):
        parts.box((0.08 * index, 0.08 * index + 0.055), (-0.05, 0.05), (0.06, height), WHITE)
    width = 0.08 * (count - 1) + 0.055
    for z in (0.1, height - 0.08):
        parts.box((0.01, width - 0.01), (-0.03, 0.03), (z, z + 0.04), WHITE)
    for x in (0.0275, width - 0.0275):
        parts.box((x - 0.02, x + 0.02), (-0.02, 0.02), (0.0, 0.09), METAL)
    return parts


def picture(rng: Generator) -> PartList:
    """Draw a framed picture; its extent is the frame's."""
    width, height, parts = rng.uniform(0.4, 1.1), rng.uniform(0.4, 0.8), PartList()
    frame = (DARK, BRASS, WHITE, Material(WOODS[1], pattern="wood", scale_m=0.05))[rng.integers(4)]
    parts.box((-width / 2, width / 2), (-0.015, 0.015), (0.0, height), frame)
    canvas = Material((0.93, 0.91, 0.86), pattern="solid")
    parts.box((-width / 2 + 0.03, width / 2 - 0.03), (-0.01, 0.017), (0.03, height - 0.03), canvas)
    first, second = rng.choice(len(FABRICS), 2, replace=False)
    art = Material(FABRICS[first], FABRICS[second], "painting", rng.uniform(0.1, 0.25))
    parts.box((-width / 2 + 0.08, width / 2 - 0.08), (-0.01, 0.019), (0.08, height - 0.08), art)
    return parts


def clock(rng: Generator) -> PartList:
    """Draw a round wall clock."""
    radius, parts = rng.uniform(0.14, 0.24), PartList()
    parts.tube((radius, 0.0), radius, (-0.02, 0.02), DARK, axis=1)
    parts.tube((radius, 0.0), 0.88 * radius, (-0.01, 0.024), WHITE, axis=1)
    parts.box((-0.012, 0.012), (0.0, 0.028), (radius, 1.7 * radius), DARK)
    parts.box((0.0, 0.5 * radius), (0.0, 0.03), (radius - 0.014, radius + 0.014), DARK)
    return parts


def door(rng: Generator) -> PartList:
    """Draw a closed door with its frame, two panels and a knob."""
    width, height, parts = rng.uniform(0.82, 1.0), rng.uniform(1.98, 2.12), PartList()
    color = ((0.90, 0.89, 0.86), (0.55, 0.36, 0.22), (0.40, 0.51, 0.58))[rng.integers(3)]
    paint = Material(color, tuple(0.9 * np.asarray(color)), "noise", 0.5)
    trim = _lighter(paint, 0.3) if color[0] < 0.8 else Material((0.79, 0.78, 0.74), pattern="solid")
    parts.box((-width / 2, width / 2), (-0.02, 0.01), (0.0, height), paint)
    for low, high in ((0.18, 0.88), (1.08, height - 0.16)):
        parts.box((-width / 2 + 0.14, width / 2 - 0.14), (0.0, 0.022), (low, high), trim)
    for sign in (-1, 1):
        x = sorted((sign * (width / 2 - 0.01), sign * (width / 2 + 0.08)))
        parts.box(x, (-0.02, 0.035), (0.0, height + 0.02), trim)
    parts.box((-width / 2 - 0.1, width / 2 + 0.1), (-0.02, 0.04), (height - 0.005, height + 0.085), trim)
    parts.tube((1.0, width / 2 - 0.09), 0.012, (0.0, 0.06), METAL, axis=1)
    parts.ball((width / 2 - 0.09, 0.07, 1.0), 0.03, METAL)
    return parts


def window(rng: Generator) -> PartList:
    """Draw a bright window with its bars and sill."""
    width, height, parts = rng.uniform(0.9, 1.8), rng.uniform(0.95, 1.35), PartList()
    sky = Material((0.50, 0.72, 0.98), (0.45, 0.60, 0.35), "sky", 0.5 * height, emission=1.35)
    frame = Material((0.90, 0.89, 0.86), pattern="solid")
    parts.box((-width / 2 + 0.03, width / 2 - 0.03), (-0.02, 0.0), (0.05, height - 0.03), sky)
    for x in (-width / 2, width / 2 - 0.07):
        parts.box((x, x + 0.07), (-0.02, 0.035), (0.02, height), frame)
    for z in (0.02, height - 0.07):
        parts.box((-width / 2 + 0.005, width / 2 - 0.005), (-0.02, 0.03), (z, z + 0.065), frame)
    parts.box((-0.025, 0.025), (-0.02, 0.02), (0.04, height - 0.04), frame)
    parts.box((-width / 2 + 0.04, width / 2 - 0.04), (-0.02, 0.015), (0.6 * height, 0.6 * height + 0.035), frame)
    parts.box((-width / 2 - 0.06, width / 2 + 0.06), (-0.02, 0.13), (0.0, 0.035), frame)
    return parts


CATEGORIES: dict[str, Callable[[Generator], PartList]] = {
    "armchair": armchair,
    "ball": ball,
    "bed": bed,
    "bookshelf": bookshelf,
    "cabinet": cabinet,
    "chair": chair,
    "clock": clock,
    "coffee table": coffee_table,
    "desk": desk,
    "door": door,
    "lamp": lamp,
    "monitor": monitor,
    "nightstand": nightstand,
    "picture": picture,
    "plant": plant,
    "radiator": radiator,
    "sofa": sofa,
    "stool": stool,
    "table": table,
    "trash bin": trash_bin,
    "tv": tv,
    "tv stand": tv_stand,
    "wardrobe": wardrobe,
    "window": window,
}
