# SPDX-License-Identifier: Apache-2.0
"""
Peak memory of inputs that claim to be large, each beyond what the process held before it. A script: tests run it.

```bash
python tests/reliability/measure_bounds.py FOLDER
```
"""

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

import geode
from geode.data.readers import read_records
from geode.data.yaml_files import read_yaml
from geode.modeling_geode.scene_files_geode import read_ply
from geode.modeling_geode.scene_geode import SceneEncoding, SceneGeometry
from geode.modeling_geode.video_processing_geode import load_image, load_video_frames


MIB = 1024**2
COUNTS = (b"stts", b"stsc", b"stsz")
PLY = b"ply\nformat %s 1.0\nelement vertex 1000000000\nproperty float x\nproperty float y\nproperty float z\nend_header\n"


def memory(name: str) -> int:
    """`VmRSS` or `VmHWM`, its peak, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024


def peak(call) -> dict:
    """Growth of the peak in MiB, and how the call ended."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = memory("VmRSS")
    try:
        call()
        end = "works"
    except ValueError as error:
        end = f"ValueError: {error}"
    return {"mib": round((memory("VmHWM") - before) / MIB, 1), "end": end}


def many_frames(name: bytes) -> bytes:
    """The embedded video with one of its tables promising 10^9 frames."""
    content = bytearray((geode.embedded_scene() / "room.mp4").read_bytes())
    at = content.index(name) + 8  # behind the name, version and flags
    place = {b"stts": at + 4, b"stsc": at + 8, b"stsz": at + 4}[name]
    content[place : place + 4] = struct.pack(">I", 10**9)
    return bytes(content)


def picture(height: int, width: int) -> bytes:
    """A PNG of rows of zeros, which deflate shrinks a thousandfold."""
    packer, rows = zlib.compressobj(), bytes(1 + 3 * width)
    data = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def wide_cloud():
    """Points in a cube of a million kilometres, in a grid of over 10^18 cells of which 2,000 are occupied."""
    points = np.random.default_rng(0).uniform(high=1e9, size=(2000, 3))
    scene = SceneGeometry.from_point_cloud(points, is_metric=False, voxel_size_m=2.5e-6)
    assert scene.num_points == len(points)
    scene.to_model_inputs(0.02)


def main(folder: Path) -> dict:
    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def rows(name: str, content: bytes):
        path = file(name, content)
        return lambda: list(read_records("jsonl", folder, data_files=[path.name]))

    claim = json.dumps({"points": {"dtype": "F32", "shape": [10**12, 3], "data_offsets": [0, 12]}}).encode()
    bomb = file("a.png", picture(8000, 9000))
    long_row = b'{"a": "' + b"x" * 100_000_000 + b'"}'
    calls = {
        "a cloud 10^9 m wide": wide_cloud,
        "a .ply file of 10^9 vertices, binary": lambda: read_ply(file("a.ply", PLY % b"binary_little_endian")),
        "a .ply file of 10^9 vertices, text": lambda: read_ply(file("a.ply", PLY % b"ascii" + b"1 2 3\n")),
        "a safetensors file of 12 TB": lambda: SceneEncoding.load(
            file("a.safetensors", struct.pack("<Q", len(claim)) + claim + bytes(12))
        ),
        "YAML of aliases": lambda: read_yaml(file("a.yaml", b"a: &a [x, x]\nb: [*a, *a]\n"), "The file"),
        "a picture of 72 million pixels": lambda: load_image(bomb),
        "a line of 100 MB": rows("a.jsonl", long_row),
        "an object of 100 MB": rows("a.json", long_row),
        "a row of 100 MB in a list": rows("b.json", b"[" + long_row + b"]"),
    }
    for name in COUNTS:
        path = file(f"{name.decode()}.mp4", many_frames(name))
        calls[f"a video whose `{name.decode()}` has 10^9 frames"] = lambda path=path: load_video_frames(
            path, num_frames=2
        )
    load_video_frames(geode.embedded_scene() / "room.mp4", num_frames=2)  # FFmpeg's own buffers are no part of a claim
    del long_row
    return {name: peak(call) for name, call in calls.items()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1])), indent=1))
