# SPDX-License-Identifier: Apache-2.0
"""
Make one furnished room and write everything about it: video, geometry, depth, record and questions.

    python -m geode.data.synthetic_rooms.build --out scene --seed 3

The same arguments write the same bytes on the same machine.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from geode.data.synthetic_rooms.questions import Question, scene_questions, select_questions
from geode.data.synthetic_rooms.render import Raycaster, Walk, render_walk
from geode.data.synthetic_rooms.rooms import ROOM_TYPES, Room, make_room
from geode.data.synthetic_rooms.scene import describe_scene
from geode.data.synthetic_rooms.walks import resize_intrinsics
from geode.modeling_geode.scene_geode import SceneGeometry


FPS = 8
# Without B frames and x264's macroblock tree, whose AVX-512 code reads memory that it never wrote: the bytes would vary.
X264_OPTIONS = {"crf": "19", "preset": "slow", "g": "8", "bf": "0", "x264-params": "mbtree=0"}
MAX_POINTS = 30_000
MAX_FLOOR_ERROR_M = 0.02
BENCHMARK_LIMITS = {
    "object_counting": 3,
    "object_abs_distance": 3,
    "object_size_estimation": 3,
    "room_size_estimation": 1,
    "object_rel_distance": 2,
    "object_rel_direction_easy": 2,
    "object_rel_direction_medium": 2,
    "object_rel_direction_hard": 2,
    "route_planning": 2,
    "obj_appearance_order": 2,
    "object_localization": 4,
}
TRAINING_LIMITS = {
    "object_counting": 10,
    "object_abs_distance": 200,
    "object_size_estimation": 30,
    "room_size_estimation": 1,
    "object_rel_distance": 40,
    "object_rel_direction_easy": 40,
    "object_rel_direction_medium": 40,
    "object_rel_direction_hard": 40,
    "route_planning": 30,
    "obj_appearance_order": 24,
    "object_localization": 30,
}


def write_video(path: Path, frames: np.ndarray, *, fps: int = FPS) -> None:
    """
    Encode frames, single threaded and without time stamps of the clock, so that the bytes repeat.

    Args:
        path (`Path`): Where to write the .mp4 file.
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): uint8 sRGB; even height and width.
        fps (`int`, defaults to 8): Frames per second.

    Raises:
        ImportError: If PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("Writing a video requires PyAV, which is not installed. Run `pip install av`.") from error
    names = [name for name in ("libx264", "mpeg4") if name in av.codecs_available]
    quality = X264_OPTIONS if names[0] == "libx264" else {"qscale": "3"}
    with av.open(str(path), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream(names[0], rate=fps, options={**quality, "threads": "1", "flags": "+bitexact"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def _question_rows(questions: list[Question], scene: dict) -> list[dict]:
    return [question.row(number, scene) for number, question in enumerate(questions)]


def write_frames(
    path: Path, room: Room, walk: Walk, *, depth_size: tuple[int, int], metadata: dict[str, str] | None = None
) -> dict[str, np.ndarray]:
    """
    Write depth, instance ids and cameras at a reduced resolution, cast anew rather than resized.

    Args:
        path (`Path`): Where to write the .safetensors file.
        room (`Room`): The room.
        walk (`Walk`): Its film.
        depth_size (`tuple[int, int]`): `(height, width)` of the depth maps.
        metadata (`dict[str, str]`, *optional*): Text for the file's header.

    Returns:
        `dict[str, np.ndarray]`: `depth` in metres (float64, unrounded), `images` (uint8) and `intrinsics`, all at
        `depth_size`.
    """
    caster, image_size = Raycaster(room), walk.frames.shape[1:3]
    intrinsics = resize_intrinsics(walk.intrinsics, image_size, new_size=depth_size)
    room_from_scene = np.linalg.inv(walk.scene_from_room)
    views = [
        caster.depth_and_ids(room_from_scene @ camera, intrinsics, image_size=depth_size)
        for camera in walk.world_from_cam
    ]
    depth, ids = (np.stack(maps) for maps in zip(*views, strict=True))
    size = (depth_size[1], depth_size[0])
    images = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in walk.frames])
    tensors = {
        "depth_mm": np.round(1000.0 * depth).astype(np.uint16),
        "instance_ids": ids,
        "world_from_cam": walk.world_from_cam.astype(np.float64),
        "depth_intrinsics": intrinsics,
        "video_intrinsics": walk.intrinsics,
    }
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata)
    return {"depth": depth, "images": images, "intrinsics": intrinsics}


def write_geometry(folder: Path, walk: Walk, views: dict[str, np.ndarray], *, max_points: int = MAX_POINTS) -> None:
    """
    Fuse the depth maps into the scene's geometry and save it.

    Args:
        folder (`Path`): Where to write.
        walk (`Walk`): The film, for its cameras.
        views (`dict[str, np.ndarray]`): What `write_frames` returned.
        max_points (`int`, defaults to 30,000): Largest number of points.

    Raises:
        ValueError: If the floor that the geometry finds is not the room's.
    """
    num_frames = len(walk.world_from_cam)
    geometry = SceneGeometry.from_rgbd(
        views["depth"],
        np.tile(views["intrinsics"], (num_frames, 1, 1)),
        walk.world_from_cam,
        images=views["images"],
        up=(0.0, 0.0, 1.0),
        timestamps_s=np.arange(num_frames) / FPS,
        max_points=max_points,
    )
    error = float(np.abs(geometry.scene_from_dataset.numpy() - np.eye(4)).max())
    if error > MAX_FLOOR_ERROR_M:
        raise ValueError(
            f"The geometry's frame must be the scene frame to within {MAX_FLOOR_ERROR_M} m, got {error:.3f} m: the film "
            "shows too little of the floor. Try another `seed`."
        )
    geometry.save(folder)


def build_scene(
    out: Path,
    *,
    seed: int,
    room_type: str | None = None,
    num_frames: int = 32,
    image_size: tuple[int, int] = (240, 320),
    depth_size: tuple[int, int] = (96, 128),
    supersampling: int = 2,
    show_progress: bool = False,
) -> dict:
    """
    Make a room and write its folder.

    Args:
        out (`Path`): Folder to write: `room.mp4`, `geometry/`, `frames.safetensors`, `scene.json`,
            `questions.jsonl` (a small benchmark) and `train_questions.jsonl` (more questions about the same room,
            the benchmark's among them: it is for fitting one scene, not for measuring).
        seed (`int`): Decides everything.
        room_type (`str`, *optional*): A key of `ROOM_TYPES`; `None` draws one.
        num_frames (`int`, defaults to 32): Number of frames.
        image_size (`tuple[int, int]`, defaults to `(240, 320)`): `(height, width)` of the video.
        depth_size (`tuple[int, int]`, defaults to `(96, 128)`): `(height, width)` of the stored depth.
        supersampling (`int`, defaults to 2): Samples per pixel along each axis.
        show_progress (`bool`, defaults to `False`): Show a progress bar.

    Returns:
        `dict`: The scene's record.
    """
    room = make_room(seed, room_type=room_type)
    walk = render_walk(
        room,
        image_size=image_size,
        num_frames=num_frames,
        supersampling=supersampling,
        show_progress=show_progress,
    )
    scene = describe_scene(room, walk, fps=FPS)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scene.json").write_text(json.dumps(scene, indent=1) + "\n", encoding="ascii")
    questions = scene_questions(scene, seed=seed)
    for name, limits in (("questions", BENCHMARK_LIMITS), ("train_questions", TRAINING_LIMITS)):
        chosen = select_questions(questions, limits, seed=seed)
        write_json_lines(out / f"{name}.jsonl", _question_rows(chosen, scene))
    write_video(out / "room.mp4", walk.frames)
    views = write_frames(out / "frames.safetensors", room, walk, depth_size=depth_size)
    write_geometry(out / "geometry", walk, views)
    return scene


def main(arguments: list[str] | None = None) -> None:
    """
    Run the command line.

    Args:
        arguments (`list[str]`, *optional*): Arguments; `None` reads the process's.
    """
    parser = argparse.ArgumentParser(description="Make one furnished room of known truth.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, required=True, help="non-negative number that decides everything")
    parser.add_argument("--room-type", choices=[*ROOM_TYPES, "any"], default="living room", help="kind of room")
    options = parser.parse_args(arguments)
    room_type = None if options.room_type == "any" else options.room_type
    build_scene(options.out, seed=options.seed, room_type=room_type, show_progress=True)


if __name__ == "__main__":
    main()
