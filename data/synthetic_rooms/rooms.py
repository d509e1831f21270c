# SPDX-License-Identifier: Apache-2.0
"""
Rooms: a floor, four walls, and furniture that stands where furniture stands.

Convention:
    - Room frame: metres, +z up, origin at the centre of the floor, axes along the walls. The scene frame of a video
      (origin on the floor below its first camera) comes with the walk, see `walks.py`.
    - Instance 0 is the structure (walls, floor, ceiling, rug); objects count from 1.
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np

from geode.data.synthetic_rooms.boxes import box_distance, canonical_box, rotation_about_z
from geode.data.synthetic_rooms.furniture import CATEGORIES
from geode.data.synthetic_rooms.shapes import Material, Part, PartList, part_mesh


WALL_GAP_M = 0.03
OBJECT_GAP_M = 0.06
WALK_GAP_M = 0.25
WALL_NORMALS = ((0.0, -1.0), (0.0, 1.0), (-1.0, 0.0), (1.0, 0.0))  # inward, of the walls at +y, -y, +x, -x
MAX_ATTEMPTS = 300

# What a room of each type holds besides a door, windows and pictures: the anchor on one wall and its companions,
# then (category, smallest count, largest count, where). A piece beyond the smallest count may be left out.
ROOM_TYPES = {
    "living room": (
        ("sofa", 1, 1, "anchor"),
        ("coffee table", 1, 1, "before sofa"),
        ("tv stand", 1, 1, "opposite"),
        ("tv", 1, 1, "on tv stand"),
        ("lamp", 1, 2, "beside sofa"),
        ("bookshelf", 1, 1, "wall"),
        ("armchair", 1, 2, "free"),
        ("plant", 2, 3, "wall"),
        ("stool", 1, 2, "free"),
        ("radiator", 0, 1, "wall"),
        ("cabinet", 0, 1, "wall"),
        ("ball", 0, 1, "free"),
        ("clock", 0, 1, "mounted"),
    ),
    "bedroom": (
        ("bed", 1, 1, "anchor"),
        ("nightstand", 1, 2, "beside bed"),
        ("wardrobe", 1, 1, "wall"),
        ("desk", 0, 1, "wall"),
        ("chair", 0, 1, "before desk"),
        ("plant", 1, 3, "wall"),
        ("lamp", 1, 2, "wall"),
        ("stool", 0, 2, "free"),
        ("radiator", 0, 1, "wall"),
        ("ball", 0, 2, "free"),
        ("clock", 0, 1, "mounted"),
    ),
    "study": (
        ("desk", 1, 1, "anchor"),
        ("monitor", 1, 1, "on desk"),
        ("chair", 1, 1, "before desk"),
        ("bookshelf", 1, 3, "wall"),
        ("armchair", 1, 2, "free"),
        ("lamp", 1, 2, "wall"),
        ("cabinet", 1, 1, "wall"),
        ("trash bin", 1, 2, "wall"),
        ("plant", 1, 4, "wall"),
        ("stool", 0, 1, "free"),
        ("radiator", 0, 1, "wall"),
        ("clock", 0, 1, "mounted"),
    ),
    "dining room": (
        ("table", 1, 1, "off centre"),
        ("chair", 2, 6, "around table"),
        ("cabinet", 1, 2, "wall"),
        ("lamp", 1, 1, "wall"),
        ("plant", 1, 4, "wall"),
        ("trash bin", 0, 1, "wall"),
        ("radiator", 0, 1, "wall"),
        ("stool", 0, 2, "free"),
        ("clock", 0, 1, "mounted"),
    ),
}
WALL_COLORS = ((0.88, 0.84, 0.76), (0.78, 0.84, 0.86), (0.84, 0.87, 0.78), (0.90, 0.80, 0.74), (0.86, 0.86, 0.88))
ACCENT_COLORS = ((0.36, 0.52, 0.56), (0.66, 0.42, 0.34), (0.45, 0.52, 0.40), (0.48, 0.44, 0.58), (0.76, 0.62, 0.40))
FLOORS = (
    Material((0.66, 0.47, 0.30), (0.48, 0.32, 0.19), "planks", 0.14),
    Material((0.52, 0.36, 0.24), (0.36, 0.23, 0.15), "planks", 0.11),
    Material((0.80, 0.78, 0.74), (0.55, 0.53, 0.50), "tiles", 0.45),
    Material((0.78, 0.64, 0.46), (0.62, 0.48, 0.32), "planks", 0.18),
)
RUGS = (
    ((0.62, 0.20, 0.22), (0.86, 0.76, 0.58)),
    ((0.20, 0.32, 0.48), (0.78, 0.80, 0.78)),
    ((0.30, 0.42, 0.34), (0.88, 0.82, 0.66)),
)


@dataclass(frozen=True)
class RoomObject:
    """
    One piece of furniture where it stands.

    Args:
        instance_id (`int`): Its number, from 1.
        category (`str`): A key of `furniture.CATEGORIES`.
        parts (`PartList`): Its solids in the object's frame, centred in x and y, from z = 0.
        position (`tuple[float, float, float]`): Centre of its underside, room frame, metres.
        yaw (`float`): Its turn about +z, radians.
    """

    instance_id: int
    category: str
    parts: PartList
    position: tuple[float, float, float]
    yaw: float

    @functools.cached_property
    def box(self) -> np.ndarray:
        """`np.ndarray` of shape `(7,)`: The tight canonical box in the room frame."""
        size = self.parts.size()
        center = np.asarray(self.position) + np.array([0.0, 0.0, 0.5 * size[2]])
        return canonical_box(np.concatenate([center, size, [self.yaw]]))

    @property
    def color(self) -> tuple[float, float, float]:
        """`tuple[float, float, float]`: Colour of the part with the largest surface, sRGB in [0, 1]."""

        def surface(part: Part) -> float:
            a, b, c = np.asarray(part.high) - np.asarray(part.low)
            return a * b + b * c + c * a

        return max(self.parts, key=surface).material.color


@dataclass(frozen=True)
class Light:
    """
    An area light as sample points; radiance falls off with the square of the distance.

    Args:
        points (`np.ndarray` of shape `(num_points, 3)`): Samples in the room frame.
        direction (`np.ndarray` of shape `(3,)`, *optional*): Main direction (cosine law); `None` shines everywhere.
        color (`np.ndarray` of shape `(3,)`): Linear colour times power.
    """

    points: np.ndarray
    direction: np.ndarray | None
    color: np.ndarray


@dataclass(frozen=True)
class Room:
    """
    A furnished room.

    Args:
        seed (`int`): The seed that it was made from.
        room_type (`str`): A key of `ROOM_TYPES`.
        size (`tuple[float, float, float]`): Inner extent along x, y and z in metres.
        objects (`list[RoomObject]`): The furniture, `objects[i].instance_id == i + 1`.
        structure (`PartList`): Walls, floor, ceiling and rug.
        lights (`list[Light]`): Light sources.
        walk_area (`tuple[float, float, float, float]`): Free floor `(center x, center y, half x, half y)`.
    """

    seed: int
    room_type: str
    size: tuple[float, float, float]
    objects: list[RoomObject]
    structure: PartList
    lights: list[Light]
    walk_area: tuple[float, float, float, float]
    camera_heights_m: tuple[float, float] = (1.44, 1.58)

    @property
    def area(self) -> float:
        """`float`: Floor area in square metres."""
        return self.size[0] * self.size[1]

    @functools.cached_property
    def triangles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Material]]:
        """
        Collect every triangle of the room.

        Returns:
            `tuple`: Corners `(num_triangles, 3, 3)` and normals of the same shape in the room frame, per triangle
            `(instance_id, index of its material)` as integers `(num_triangles, 2)`, and the materials.
        """
        corners, normals, labels, materials = [], [], [], []
        bodies = [(0, self.structure, np.zeros(3), 0.0)]
        bodies += [(item.instance_id, item.parts, np.asarray(item.position), item.yaw) for item in self.objects]
        for instance_id, parts, position, yaw in bodies:
            rotation = rotation_about_z(yaw)
            for part in parts:
                triangles, part_normals = part_mesh(part)
                corners.append(triangles @ rotation.T + position)
                normals.append(part_normals @ rotation.T)
                labels.append(np.tile([instance_id, len(materials)], (len(triangles), 1)))
                materials.append(part.material)
        return np.concatenate(corners), np.concatenate(normals), np.concatenate(labels), materials


def _may_touch(first: np.ndarray, second: np.ndarray) -> bool:
    """Tell whether the circles around two boxes' footprints come near: a cheap test before the exact one."""
    reach = 0.5 * (math.hypot(first[3], first[4]) + math.hypot(second[3], second[4]))
    return math.hypot(first[0] - second[0], first[1] - second[1]) < reach + OBJECT_GAP_M


@dataclass
class Layout:
    """The room while it is being furnished."""

    rng: np.random.Generator
    size: tuple[float, float, float]
    objects: list[RoomObject] = field(default_factory=list)
    reserved: list[np.ndarray] = field(default_factory=list)

    def find(self, category: str) -> RoomObject | None:
        """Return the first piece of a category, if there is one."""
        return next((item for item in self.objects if item.category == category), None)

    def draw(self, category: str) -> PartList:
        """Draw a piece."""
        return CATEGORIES[category](self.rng).centred()

    def fits(self, box: np.ndarray, *, ignore: RoomObject | None = None) -> bool:
        """Tell whether a box is within the walls and apart from all that is there, but for one piece."""
        half = 0.5 * np.asarray(self.size[:2]) - 0.01
        half_x, half_y = 0.5 * box[3], 0.5 * box[4]
        cosine, sine = abs(math.cos(box[6])), abs(math.sin(box[6]))
        if abs(box[0]) + cosine * half_x + sine * half_y > half[0]:
            return False
        if abs(box[1]) + sine * half_x + cosine * half_y > half[1]:
            return False
        others = [item.box for item in self.objects if item is not ignore]
        if any(_may_touch(box, other) and box_distance(box, other) < OBJECT_GAP_M for other in others):
            return False
        return all(not _may_touch(box, other) or box_distance(box, other) > 0.0 for other in self.reserved)

    def add(self, category: str, parts: PartList, position, yaw: float, *, ignore: RoomObject | None = None) -> bool:
        """Put a piece where it fits; tell whether it did."""
        item = RoomObject(len(self.objects) + 1, category, parts, tuple(float(v) for v in position), float(yaw))
        if not self.fits(item.box, ignore=ignore):
            return False
        self.objects.append(item)
        return True

    def against_wall(self, parts: PartList, wall: int, along: float, z: float) -> tuple[tuple[float, ...], float]:
        """Return position and yaw of a piece whose back is at a wall, `along` in [-1, 1] of the free stretch."""
        normal = np.asarray(WALL_NORMALS[wall])
        width, depth, _ = parts.size()
        across, stretch = (1, 0) if wall < 2 else (0, 1)
        gap = 0.0 if z > 0 or width == 0 else WALL_GAP_M
        position = -normal * (0.5 * self.size[across] - 0.5 * depth - gap)
        position[stretch] = along * (0.5 * self.size[stretch] - 0.5 * width - 0.05)
        return (position[0], position[1], z), math.atan2(-normal[0], normal[1])

    def place(self, category: str, where: str, anchor_wall: int) -> bool:
        """Try up to forty times to place one piece; tell whether it worked."""
        for _ in range(40):
            parts = self.draw(category)
            if self._place_once(category, parts, where, anchor_wall):
                return True
        return False

    def _place_once(self, category: str, parts: PartList, where: str, anchor_wall: int) -> bool:
        rng = self.rng
        parent = self.find(where.split(" ", 1)[1]) if " " in where and where != "off centre" else None
        if where in ("anchor", "opposite"):
            wall = anchor_wall if where == "anchor" else anchor_wall ^ 1
            return self.add(category, parts, *self.against_wall(parts, wall, rng.uniform(-0.35, 0.35), 0.0))
        if where == "wall":
            place = self.against_wall(parts, int(rng.integers(4)), rng.uniform(-1.0, 1.0), 0.0)
            return self.add(category, parts, *place)
        if where == "mounted":
            return self._mount(category, parts, int(rng.integers(4)))
        if where == "off centre":
            normal = np.asarray(WALL_NORMALS[anchor_wall])
            center = -0.5 * normal * np.asarray(self.size[:2]) * rng.uniform(0.25, 0.45)
            yaw = math.atan2(-normal[0], normal[1])
            return self.add(category, parts, (center[0], center[1], 0.0), yaw)
        if where == "free":
            half = 0.5 * np.asarray(self.size[:2]) - 0.3
            center = rng.uniform(-half, half)
            inwards = math.atan2(center[0], -center[1])  # the front looks towards the middle of the room
            return self.add(category, parts, (*center, 0.0), inwards + rng.uniform(-0.6, 0.6))
        return parent is not None and self._place_near(category, parts, where.split(" ")[0], parent)

    def _mount(self, category: str, parts: PartList, wall: int) -> bool:
        height = parts.size()[2]
        z = {"door": 0.0, "window": 0.92, "clock": 1.75}.get(category, 1.62 - 0.5 * height)
        position, yaw = self.against_wall(parts, wall, self.rng.uniform(-0.85, 0.85), z)
        normal = np.asarray(WALL_NORMALS[wall])
        across = 1 if wall < 2 else 0
        center = -normal * (0.5 * self.size[across] - 0.5 * parts.size()[1] - 0.012)
        position = np.array(position)
        position[across] = center[across]
        return self.add(category, parts, position, yaw)

    def _place_near(self, category: str, parts: PartList, relation: str, parent: RoomObject) -> bool:
        rng, size, other = self.rng, parts.size(), parent.parts.size()
        offset, turn, ignore = np.zeros(3), 0.0, None
        if relation == "on":
            offset[:] = rng.uniform(-0.12, 0.12) * other[0], -0.02, other[2]
            ignore = parent
        elif relation == "before":
            gap = 0.38 if parent.category == "sofa" else rng.uniform(0.08, 0.3)
            offset[:2] = rng.uniform(-0.12, 0.12) * other[0], 0.5 * (other[1] + size[1]) + gap
            turn = 0.0 if parent.category == "sofa" else math.pi + rng.uniform(-0.35, 0.35)
        elif relation == "beside":
            side = rng.choice((-1.0, 1.0))
            offset[:2] = side * (0.5 * (other[0] + size[0]) + rng.uniform(0.08, 0.2)), 0.5 * (size[1] - other[1])
        else:
            axis, sign = int(rng.integers(2)), rng.choice((-1.0, 1.0))
            offset[axis] = sign * (0.5 * (other[axis] + size[1]) + rng.uniform(0.07, 0.2))
            offset[1 - axis] = rng.uniform(-0.3, 0.3) * other[1 - axis]
            turn = sign * math.pi / 2 if axis == 0 else (0.0 if sign < 0 else math.pi)  # the front looks at the table
        position = np.asarray(parent.position) + rotation_about_z(parent.yaw) @ offset
        return self.add(category, parts, position, parent.yaw + turn, ignore=ignore)


def _keeps_clear(area: np.ndarray, boxes: np.ndarray) -> bool:
    """
    Tell whether an unturned box is farther than the walk's gap from each of `(num_boxes, 7)`.

    The discs in and around a box bound its distance from both sides, which decides about most of them; the others are measured.
    """
    to_center = np.linalg.norm(np.maximum(np.abs(boxes[:, :2] - area[:2]) - 0.5 * area[3:5], 0.0), axis=1)
    is_level = np.abs(boxes[:, 2] - area[2]) < 0.5 * (boxes[:, 5] + area[5])
    rounding = 1e-9
    if (is_level & (to_center - 0.5 * boxes[:, 3:5].min(axis=1) <= WALK_GAP_M - rounding)).any():
        return False
    reach = 0.5 * np.hypot(boxes[:, 3], boxes[:, 4])
    near = boxes[to_center - reach <= WALK_GAP_M + rounding]
    return all(box_distance(area, box) > WALK_GAP_M for box in near)


def free_ellipse(
    layout: Layout, *, max_reach_m: float = 1.3, margin_m: float = 0.7
) -> tuple[float, float, float, float] | None:
    """
    Find a large free rectangle of floor for the camera.

    Args:
        layout (`Layout`): The room so far.
        max_reach_m (`float`, defaults to 1.3): Largest half side.
        margin_m (`float`, defaults to 0.7): Least distance from the walls.

    Returns:
        `tuple`: `(center x, center y, half x, half y)`, or `None` where 300 draws found nothing.
    """
    best, best_score = None, 0.0
    half = 0.5 * np.asarray(layout.size[:2])
    boxes = np.array([item.box for item in layout.objects if item.position[2] < 0.9]).reshape(-1, 7)
    for _ in range(300):
        reach = layout.rng.uniform(0.35, max_reach_m, size=2)
        room = half - reach - margin_m
        if (room < 0).any():
            continue
        center = layout.rng.uniform(-room, room)
        area = np.array([*center, 1.0, *(2 * reach), 2.0, 0.0])
        score = min(reach) + 0.35 * max(reach) - 0.12 * float(np.hypot(*center))
        if score > best_score and _keeps_clear(area, boxes):
            best, best_score = (float(center[0]), float(center[1]), float(reach[0]), float(reach[1])), score
    return best


def build_structure(
    rng: np.random.Generator,
    size: tuple[float, float, float],
    rug_at: np.ndarray,
    *,
    fixtures: tuple[tuple[float, float], ...] = ((0.0, 0.0),),
) -> PartList:
    """
    Build floor, walls, ceiling, skirting boards, a rug and the ceiling lamps.

    Args:
        rng (`np.random.Generator`): Source of the colours.
        size (`tuple[float, float, float]`): Length, width and height of the room in metres.
        rug_at (`np.ndarray` of shape `(2,)`): Where the rug's centre should be.
        fixtures (`tuple`, defaults to one in the middle): Where lamps hang, in the floor plan.

    Returns:
        `PartList`: The parts in the room frame.
    """
    half_x, half_y, height = 0.5 * size[0], 0.5 * size[1], size[2]
    plain = WALL_COLORS[rng.integers(len(WALL_COLORS))]
    accent = ACCENT_COLORS[rng.integers(len(ACCENT_COLORS))]
    wall = Material(plain, tuple(0.93 * np.asarray(plain)), "noise", 0.22)
    papered = Material(accent, tuple(0.84 * np.asarray(accent)), "stripes", 0.24)
    trim = Material((0.90, 0.89, 0.86), pattern="solid")
    parts = PartList()
    parts.box(
        (-half_x - 0.1, half_x + 0.1), (-half_y - 0.1, half_y + 0.1), (-0.1, 0.0), FLOORS[rng.integers(len(FLOORS))]
    )
    ceiling = Material((0.94, 0.94, 0.92), (0.90, 0.90, 0.88), "noise", 0.5)
    parts.box((-half_x - 0.1, half_x + 0.1), (-half_y - 0.1, half_y + 0.1), (height, height + 0.1), ceiling)
    accents = rng.permutation(4) == 0
    for index, (x, y) in enumerate(WALL_NORMALS):
        slab = [(-half_x - 0.1, half_x + 0.1), (-half_y - 0.1, half_y + 0.1)]
        board = [(-half_x, half_x), (-half_y, half_y)]
        axis, sign = (0, -x) if x else (1, -y)
        inner = sign * (half_x, half_y)[axis]
        slab[axis] = tuple(sorted((inner, inner + 0.1 * sign)))
        board[axis] = tuple(sorted((inner - 0.014 * sign, inner + 0.05 * sign)))
        parts.box(slab[0], slab[1], (-0.05, height + 0.05), papered if accents[index] else wall)
        parts.box(board[0], board[1], (-0.05, 0.09), trim)
    pair = RUGS[rng.integers(len(RUGS))]
    reach = np.minimum(rng.uniform((0.8, 0.6), (1.2, 0.9)), 0.5 * np.asarray(size[:2]) - 0.5)
    center = np.clip(rug_at, reach + 0.3 - (half_x, half_y), np.array((half_x, half_y)) - reach - 0.3)
    for inset, z, colors in ((0.0, 0.010, pair[::-1]), (0.1, 0.013, pair)):
        cloth = Material(colors[0], colors[1], "checker" if inset else "noise", 0.16 if inset else 0.02)
        x = (center[0] - reach[0] + inset, center[0] + reach[0] - inset)
        parts.box(x, (center[1] - reach[1] + inset, center[1] + reach[1] - inset), (-0.05, z), cloth)
    glow = Material((1.0, 0.95, 0.85), pattern="solid", emission=1.2)
    for x, y in fixtures:
        parts.ball((x, y, height), (0.24, 0.24, 0.07), glow)
    return parts


def daylight(rng: np.random.Generator, item: RoomObject) -> Light:
    """
    Return the light that enters by a window.

    Args:
        rng (`np.random.Generator`): Source of its strength and of the order of its samples.
        item (`RoomObject`): The window.

    Returns:
        `Light`: Sixteen samples in front of the panes.
    """
    width, _, height = item.parts.size()
    grid = np.stack(np.meshgrid(np.linspace(-0.4, 0.4, 4), np.linspace(0.12, 0.88, 4)), axis=-1).reshape(-1, 2)
    local = np.stack([grid[:, 0] * width, np.full(16, 0.16), grid[:, 1] * height], axis=1)
    rotation = rotation_about_z(item.yaw)
    points = local[rng.permutation(16)] @ rotation.T + np.asarray(item.position)
    return Light(points, rotation @ [0.0, 1.0, 0.0], rng.uniform(3.2, 4.6) * np.array([0.86, 0.95, 1.0]))


def lamplight(item: RoomObject) -> Light:
    """Return the light of a lamp that stands in the room."""
    top = np.add(item.position, [0.0, 0.0, item.parts.size()[2] + 0.06])
    return Light(top[None], None, 0.45 * np.array([1.0, 0.80, 0.52]))


def _lights(rng: np.random.Generator, layout: Layout) -> list[Light]:
    angle = 2.399963 * np.arange(16)
    radius = 0.25 * np.sqrt((np.arange(16) + 0.5) / 16)
    disc = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(16, layout.size[2] - 0.12)], axis=1)
    floor_scale = layout.size[0] * layout.size[1] / 20.0
    lights = [
        Light(disc, np.array([0.0, 0.0, -1.0]), rng.uniform(3.6, 4.8) * floor_scale * np.array([1.0, 0.90, 0.76]))
    ]
    for item in layout.objects:
        if item.category == "window":
            lights.append(daylight(rng, item))
        if item.category == "lamp":
            lights.append(lamplight(item))
    return lights


def _try_room(seed: int, rng: np.random.Generator, room_type: str) -> Room | None:
    aspect, area = rng.uniform(0.75, 1.35), math.exp(rng.uniform(math.log(17.0), math.log(38.0)))
    size = (math.sqrt(area * aspect), math.sqrt(area / aspect), rng.uniform(2.45, 2.85))
    layout = Layout(rng, tuple(float(value) for value in size))
    wall = int(rng.integers(4))
    if not layout.place("door", "mounted", wall):
        return None
    entrance = layout.objects[0]
    front = np.asarray(entrance.position) + rotation_about_z(entrance.yaw) @ [0.0, 0.45, 1.0]
    layout.reserved.append(np.array([*front, 0.9, 0.8, 2.0, entrance.yaw]))
    plan = ROOM_TYPES[room_type]
    wishes = [
        (category, where, index < low)
        for category, low, high, where in plan
        for index in range(int(rng.integers(low, high + 1)))
    ]
    fixed = [wish for wish in wishes if wish[1] not in ("wall", "free", "mounted")]
    openings = [("window", "mounted", index == 0) for index in range(int(rng.integers(1, 3)))]
    loose = [wish for wish in wishes if wish not in fixed]
    pictures = [("picture", "mounted", index < 2) for index in range(int(rng.integers(2, 4)))]
    walk_area = None
    for step in ([*fixed, *openings], [*loose, *pictures]):
        for category, where, is_required in step:
            if not layout.place(category, where, wall) and is_required:
                return None
        if walk_area is None:
            walk_area = free_ellipse(layout)
            if walk_area is None:
                return None
            x, y, half_x, half_y = walk_area
            layout.reserved.append(
                np.array([x, y, 1.1, 2 * (half_x + WALK_GAP_M), 2 * (half_y + WALK_GAP_M), 2.2, 0.0])
            )
    structure = build_structure(rng, layout.size, np.asarray(walk_area[:2]) * 0.5)
    return Room(seed, room_type, layout.size, layout.objects, structure, _lights(rng, layout), walk_area)


def make_room(seed: int, *, room_type: str | None = None) -> Room:
    """
    Furnish a room. The same arguments give the same room.

    Args:
        seed (`int`): Any non-negative number.
        room_type (`str`, *optional*): A key of `ROOM_TYPES`; `None` draws one.

    Returns:
        `Room`: Furniture that does not overlap, a door that opens, and free floor for the camera.

    Raises:
        ValueError: If the type is unknown.
        RuntimeError: If no attempt placed all of the required furniture.
    """
    if room_type is not None and room_type not in ROOM_TYPES:
        raise ValueError(f"`room_type` must be one of {sorted(ROOM_TYPES)}, got {room_type!r}.")
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng([seed, attempt])
        kind = room_type or sorted(ROOM_TYPES)[np.random.default_rng([seed]).integers(len(ROOM_TYPES))]
        room = _try_room(seed, rng, kind)
        if room is not None:
            return room
    raise RuntimeError(
        f"`make_room` must place all required furniture, but {MAX_ATTEMPTS} attempts with `seed` {seed} failed. Try another seed."
    )
