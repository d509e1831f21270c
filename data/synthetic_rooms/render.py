# SPDX-License-Identifier: Apache-2.0
"""Ray casting of a room: exact z-depth, instance ids and shaded frames along a walk. Needs `embreex`."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from geode.data.synthetic_rooms.boxes import rotation_about_z
from geode.data.synthetic_rooms.rooms import Room
from geode.data.synthetic_rooms.shading import surface_colors, tone_map
from geode.data.synthetic_rooms.walks import pinhole_intrinsics, plan_walk, scene_from_room


OFFSET_M = 1e-3  # keeps a shadow ray off the surface that it starts on
AMBIENT_REACH_M = 1.0
NUM_AMBIENT_RAYS = 32
SUBSETS = 4  # neighbouring samples share the light samples: each casts a quarter of them
NUM_WALK_TRIALS = 8


@dataclass(frozen=True)
class Walk:
    """
    What a camera sees on its way through a room.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): Pictures, uint8 sRGB.
        depth (`np.ndarray` of shape `(num_frames, height, width)`): Z-depth in metres at pixel centres, float64.
        instance_ids (`np.ndarray` of shape `(num_frames, height, width)`): uint8, 0 is the structure.
        world_from_cam (`np.ndarray` of shape `(num_frames, 4, 4)`): Cameras in the scene frame.
        intrinsics (`np.ndarray` of shape `(3, 3)`): Pinhole matrix in pixels.
        scene_from_room (`np.ndarray` of shape `(4, 4)`): From the room frame to the scene frame.
    """

    frames: np.ndarray
    depth: np.ndarray
    instance_ids: np.ndarray
    world_from_cam: np.ndarray
    intrinsics: np.ndarray
    scene_from_room: np.ndarray

    def visible_shares(self, num_instances: int) -> np.ndarray:
        """Return the share of each frame's pixels that shows each instance, shape `(num_frames, num_instances + 1)`."""
        flat = self.instance_ids.reshape(len(self.instance_ids), -1)
        counts = [np.bincount(row, minlength=num_instances + 1) for row in flat]
        return np.stack(counts) / flat.shape[1]


class Raycaster:
    """
    A room, ready for rays.

    Args:
        room (`Room`): The room.

    Raises:
        ImportError: If `embreex` is missing.
    """

    def __init__(self, room: Room):
        try:
            from embreex.mesh_construction import TriangleMesh
            from embreex.rtcore_scene import EmbreeScene
        except ImportError as error:
            raise ImportError(
                "Rendering a room requires `embreex`, which is not installed. Run `pip install geode-vlm[world]`."
            ) from error
        self.room = room
        self.corners, self.normals, self.labels, self.materials = room.triangles
        edges = self.corners[:, 1:] - self.corners[:, :1]
        plane = np.cross(edges[:, 0], edges[:, 1])
        self.plane_normals = plane / np.linalg.norm(plane, axis=1, keepdims=True)
        self._scene = EmbreeScene()
        self._mesh = TriangleMesh(self._scene, self.corners.astype(np.float32))

    def cast(self, origins: np.ndarray, directions: np.ndarray) -> dict[str, np.ndarray]:
        """
        Find what each ray meets first.

        Embree works in float32; the distance is computed again in float64 from the plane of the triangle that it
        names, so it is exact to rounding.

        Args:
            origins (`np.ndarray` of shape `(num_rays, 3)`): Starts in the room frame.
            directions (`np.ndarray` of shape `(num_rays, 3)`): Directions, any length.

        Returns:
            `dict[str, np.ndarray]`: `distance` in units of the direction's length, `triangle` (its index, -1 where
            nothing was met), and the barycentric `u` and `v`.
        """
        hits = self._scene.run(origins.astype(np.float32), directions.astype(np.float32), output=1)
        triangle = hits["primID"].astype(np.int64)
        normals, anchors = self.plane_normals[triangle], self.corners[triangle, 0]
        distance = dot(anchors - origins, normals) / dot(directions, normals)
        distance = np.where(triangle >= 0, distance, 0.0)
        return {"distance": distance, "triangle": triangle, "u": hits["u"], "v": hits["v"]}

    def blocked(self, origins: np.ndarray, directions: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """Tell which unit rays meet something nearer than `reach` metres, shape `(num_rays,)`."""
        hits = self._scene.run(
            origins.astype(np.float32), directions.astype(np.float32), reach.astype(np.float32), query="OCCLUDED"
        )
        return hits >= 0

    def depth_and_ids(
        self, room_from_cam: np.ndarray, intrinsics: np.ndarray, *, image_size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Cast one ray through the centre of every pixel.

        Args:
            room_from_cam (`np.ndarray` of shape `(4, 4)`): The camera in the room frame.
            intrinsics (`np.ndarray` of shape `(3, 3)`): Pinhole matrix in pixels at `image_size`.
            image_size (`tuple[int, int]`): `(height, width)`.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Z-depth in metres (float64) and instance ids (uint8), both of shape
            `(height, width)`.
        """
        directions = pixel_rays(intrinsics, image_size) @ room_from_cam[:3, :3].T
        origins = np.broadcast_to(room_from_cam[:3, 3], directions.shape)
        hits = self.cast(origins, directions)
        ids = np.where(hits["triangle"] >= 0, self.labels[hits["triangle"], 0], 0).astype(np.uint8)
        return hits["distance"].reshape(image_size), ids.reshape(image_size)

    def picture(
        self, room_from_cam: np.ndarray, intrinsics: np.ndarray, *, image_size: tuple[int, int], supersampling: int = 2
    ) -> np.ndarray:
        """
        Shade one frame.

        Args:
            room_from_cam (`np.ndarray` of shape `(4, 4)`): The camera in the room frame.
            intrinsics (`np.ndarray` of shape `(3, 3)`): Pinhole matrix in pixels at `image_size`.
            image_size (`tuple[int, int]`): `(height, width)`.
            supersampling (`int`, defaults to 2): Samples per pixel along each axis.

        Returns:
            `np.ndarray` of shape `(height, width, 3)`: uint8 sRGB.
        """
        height, width = image_size
        rays = pixel_rays(intrinsics, image_size, supersampling=supersampling)
        directions = rays @ room_from_cam[:3, :3].T
        origins = np.broadcast_to(room_from_cam[:3, 3], directions.shape)
        hits = self.cast(origins, directions)
        points = origins + hits["distance"][:, None] * directions
        columns = width * supersampling
        row, column = np.divmod(np.arange(len(points)), columns)
        albedo, light, glow, faces = self._shade(points, directions, hits, 2 * (row % 2) + column % 2)
        if supersampling == 1:
            # One sample a pixel casts a quarter of the light's rays: without its neighbours' the picture is a lattice.
            surface = np.concatenate([self.labels[hits["triangle"]], faces.round(3)], axis=1)
            light = smooth_light(light.reshape(height, width, 3), surface.reshape(height, width, -1)).reshape(-1, 3)
        color = tone_map(albedo * light + glow)
        color = color.reshape(height, supersampling, width, supersampling, 3).astype(np.float64)
        return (color.mean(axis=(1, 3)) + 0.5).astype(np.uint8)

    def _shade(self, points, directions, hits, subset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return albedo, arriving light, emitted light and the normal of the facet for each point."""
        triangle = hits["triangle"]
        weights = np.stack([1.0 - hits["u"] - hits["v"], hits["u"], hits["v"]], axis=1)
        normals = unit((self.normals[triangle] * weights[:, :, None]).sum(axis=1))
        faces = self.plane_normals[triangle]
        faces = np.where((dot(faces, directions) > 0)[:, None], -faces, faces)
        normals = np.where((dot(normals, faces) < 0)[:, None], -normals, normals)
        local_points, local_normals = self._local(points, normals, self.labels[triangle, 0])
        albedo, glow = surface_colors(self.materials, self.labels[triangle, 1], local_points, local_normals)
        starts = points + OFFSET_M * faces
        upward = 0.5 + 0.5 * normals[:, 2:]
        sky = upward * np.array([0.34, 0.35, 0.38]) + (1.0 - upward) * np.array([0.30, 0.26, 0.22])
        light = sky * self._openness(starts, normals, subset)[:, None]
        for source in self.room.lights:
            light += self._direct(source, starts, normals, subset)
        return albedo, light, glow, faces

    def _local(self, points, normals, instance) -> tuple[np.ndarray, np.ndarray]:
        """Move points and normals into the frame of the object that they lie on."""
        rotations = np.stack([np.eye(3), *(rotation_about_z(item.yaw) for item in self.room.objects)])
        positions = np.stack([np.zeros(3), *(np.asarray(item.position) for item in self.room.objects)])
        offset = points - positions[instance]
        turn = rotations[instance]
        return np.einsum("nij,ni->nj", turn, offset), np.einsum("nij,ni->nj", turn, normals)

    def _openness(self, starts, normals, subset) -> np.ndarray:
        """Return the share of a cosine-weighted hemisphere that is free within `AMBIENT_REACH_M` (ambient occlusion)."""
        number = np.arange(NUM_AMBIENT_RAYS)
        angle, radius = 2.399963 * number, np.sqrt((number + 0.5) / NUM_AMBIENT_RAYS)
        hemisphere = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1.0 - radius**2)], axis=1)
        helper = np.where(np.abs(normals[:, :1]) > 0.7, [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]])
        tangent = unit(np.cross(helper, normals))
        bitangent = np.cross(normals, tangent)
        reach, free = np.full(len(starts), AMBIENT_REACH_M), np.zeros(len(starts))
        for turn in range(NUM_AMBIENT_RAYS // SUBSETS):
            local = hemisphere[SUBSETS * turn + subset]
            rays = local[:, :1] * tangent + local[:, 1:2] * bitangent + local[:, 2:] * normals
            free += ~self.blocked(starts, rays, reach)
        return free / (NUM_AMBIENT_RAYS // SUBSETS)

    def _direct(self, source, starts, normals, subset) -> np.ndarray:
        """Return the light (num_points, 3) that arrives from one source, averaged over its samples."""
        count = max(1, len(source.points) // SUBSETS)
        total = np.zeros(len(starts))
        for turn in range(count):
            target = source.points[(SUBSETS * turn + subset) % len(source.points)]
            rays = target - starts
            distance = np.sqrt(dot(rays, rays))
            rays /= distance[:, None]
            gain = np.maximum(0.0, dot(rays, normals)) / (distance**2 + 0.4)
            if source.direction is not None:
                gain *= np.maximum(0.0, -(rays @ source.direction))
            lit = np.flatnonzero(gain > 0)
            gain[lit] *= ~self.blocked(starts[lit], rays[lit], distance[lit] - 2 * OFFSET_M)
            total += gain
        return (total / count)[:, None] * source.color


def dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the products of vectors `(num_vectors, 3)`: by columns, which is four times as fast as a sum along rows of three."""
    return first[:, 0] * second[:, 0] + first[:, 1] * second[:, 1] + first[:, 2] * second[:, 2]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors `(num_vectors, 3)` at length 1."""
    return vectors / np.sqrt(dot(vectors, vectors))[:, None]


def smooth_light(light: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """
    Average the light of neighbouring pixels that show the same plane.

    The weights (1, 2, 1) along each axis take away whatever alternates from pixel to pixel, and nothing else of an even
    slope.

    Args:
        light (`np.ndarray` of shape `(height, width, 3)`): Arriving light.
        surface (`np.ndarray` of shape `(height, width, num_marks)`): What tells one plane from another.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`: The smoothed light.
    """
    height, width = light.shape[:2]
    padded = np.pad(light, ((1, 1), (1, 1), (0, 0)))
    marks = np.pad(surface, ((1, 1), (1, 1), (0, 0)), constant_values=np.inf)
    total, weights = np.zeros_like(light), np.zeros((height, width, 1))
    for dy in range(3):
        for dx in range(3):
            window = (slice(dy, dy + height), slice(dx, dx + width))
            is_same = (marks[window] == surface).all(axis=-1, keepdims=True)
            weight = is_same * float((2 - abs(dy - 1)) * (2 - abs(dx - 1)))
            total += weight * padded[window]
            weights += weight
    return total / weights


def pixel_rays(intrinsics: np.ndarray, image_size: tuple[int, int], *, supersampling: int = 1) -> np.ndarray:
    """
    Return camera-frame rays with z = 1, so that the distance along a ray is its z-depth.

    Args:
        intrinsics (`np.ndarray` of shape `(3, 3)`): Pinhole matrix in pixels at `image_size`.
        image_size (`tuple[int, int]`): `(height, width)`.
        supersampling (`int`, defaults to 1): Rays per pixel along each axis, spread evenly over the pixel.

    Returns:
        `np.ndarray` of shape `(height * width * supersampling ** 2, 3)`: Directions, row by row.
    """
    height, width = image_size
    u = (np.arange(width * supersampling) + 0.5) / supersampling - 0.5
    v = (np.arange(height * supersampling) + 0.5) / supersampling - 0.5
    x = (u - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
    grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
    return np.stack([grid_x, grid_y, np.ones_like(grid_x)], axis=-1).reshape(-1, 3)


def _best_walk(caster: Raycaster, rng: np.random.Generator, num_frames: int, fov_deg: float) -> np.ndarray:
    """Return the path, among some, that shows most objects well; seen at a low resolution."""
    size = (36, 48)
    intrinsics, best, best_score = pinhole_intrinsics(size, fov_deg), None, -1.0
    for _ in range(NUM_WALK_TRIALS):
        cameras = plan_walk(caster.room, rng, num_frames=num_frames)
        ids = np.stack([caster.depth_and_ids(camera, intrinsics, image_size=size)[1] for camera in cameras])
        counts = [np.bincount(row.ravel(), minlength=len(caster.room.objects) + 1) for row in ids]
        shares = np.stack(counts)[:, 1:] / (size[0] * size[1])
        score = float((np.minimum(shares.max(axis=0), 0.03)).sum())
        if score > best_score:
            best, best_score = cameras, score
    return best


def render_walk(
    room: Room,
    *,
    image_size: tuple[int, int] = (240, 320),
    num_frames: int = 32,
    fov_deg: float = 85.0,
    supersampling: int = 2,
    show_progress: bool = False,
) -> Walk:
    """
    Film a room. The same arguments give the same bytes.

    Args:
        room (`Room`): The room.
        image_size (`tuple[int, int]`, defaults to `(240, 320)`): `(height, width)` in pixels.
        num_frames (`int`, defaults to 32): Number of frames.
        fov_deg (`float`, defaults to 85): Horizontal field of view in degrees.
        supersampling (`int`, defaults to 2): Samples per pixel along each axis, for the pictures only.
        show_progress (`bool`, defaults to `False`): Show a progress bar.

    Returns:
        `Walk`: Frames, exact depth, instance ids and cameras.

    Raises:
        ImportError: If `embreex` is missing.
    """
    caster = Raycaster(room)
    cameras = _best_walk(caster, np.random.default_rng([room.seed, 1_000_003]), num_frames, fov_deg)
    intrinsics = pinhole_intrinsics(image_size, fov_deg)
    frames, depth, ids = [], [], []
    for camera in tqdm(cameras, desc="Rendering", unit="frame", disable=not show_progress):
        frames.append(caster.picture(camera, intrinsics, image_size=image_size, supersampling=supersampling))
        frame_depth, frame_ids = caster.depth_and_ids(camera, intrinsics, image_size=image_size)
        depth.append(frame_depth)
        ids.append(frame_ids)
    to_scene = scene_from_room(cameras[0])
    return Walk(np.stack(frames), np.stack(depth), np.stack(ids), to_scene @ cameras, intrinsics, to_scene)
