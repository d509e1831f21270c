# SPDX-License-Identifier: Apache-2.0
"""What the cases of bad input need: a row of the table, and a world of real files and a real model to try them in."""

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import geode
from geode.cli import main
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.scene_geode import SceneEncoding


class ExitCode2(Exception):
    """How the command line reports a mistake of its user; the message is what it wrote to standard error."""


class Case(NamedTuple):
    """
    One row of the table.

    Args:
        entry (`str`): The public entry point.
        given (`str`): The bad input, in words.
        call (`Callable`): Gives it, in a [`World`].
        error (`type`): What is raised.
        received (`str`): What the message says of what came.
        remedy (`str`): What it says of what is wanted, or of what helps.
    """

    entry: str
    given: str
    call: Callable[["World"], object]
    error: type[Exception]
    received: str
    remedy: str


class World:
    """Real files and the shipped checkpoint. Everything is made when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.room = geode.embedded_scene()
        self.video, self.geometry = str(self.room / "room.mp4"), str(self.room / "geometry")
        self.checkpoint = str(geode.tiny_checkpoint())

    @cached_property
    def processor(self) -> GeodeProcessor:
        return GeodeProcessor.from_pretrained(self.checkpoint)

    @cached_property
    def model(self) -> GeodeForConditionalGeneration:
        return GeodeForConditionalGeneration.from_pretrained(self.checkpoint).eval()

    @cached_property
    def scene_inputs(self) -> dict[str, torch.Tensor]:
        return dict(self.processor.prepare_scene(self.video, geometry=self.geometry, num_frames=1))

    @cached_property
    def batch(self) -> dict[str, torch.Tensor]:
        """Two chats, each with an image, a scene of one frame and a question, as the processor makes a batch of them."""
        media = [
            {"type": "image", "image": PICTURE},
            {"type": "video", "path": self.video, "geometry": self.geometry},
        ]
        chats = [
            [{"role": "user", "content": [*media, {"type": "text", "text": text}]}] for text in ("How far?", "Where?")
        ]
        return dict(
            self.processor.apply_chat_template(
                chats, tokenize=True, return_dict=True, add_generation_prompt=True, padding=True, num_frames=1
            )
        )

    @cached_property
    def scene(self) -> SceneEncoding:
        return self.model.encode_scene(**self.scene_inputs)

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def command(self, *arguments: str) -> None:
        """Run `geode` and raise what it says, if it ends with code 2."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                code = main(list(arguments))
            except SystemExit as exit_:
                code = exit_.code
        if code == 2:
            raise ExitCode2(said.getvalue())


GARBAGE = bytes(range(256)) * 4
DEEP = b"[" * 100_000
POINTS = np.random.default_rng(0).normal(size=(50, 3))
ONE_CAMERA = {
    "world_from_cam": np.eye(4)[None],
    "intrinsics": np.array([[[8.0, 0.0, 3.0], [0.0, 7.0, 2.0], [0.0, 0.0, 1.0]]]),
    "image_size": (5, 7),
}
PICTURE = np.zeros((20, 30, 3), np.uint8)
PLY_HEADER = (
    "ply\nformat {} 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
)


def safetensors_bytes(header: object, content: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def png_that_claims(height: int, width: int) -> bytes:
    """A PNG of some hundred bytes whose header promises a picture of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


__all__ = [
    "DEEP",
    "GARBAGE",
    "ONE_CAMERA",
    "PICTURE",
    "PLY_HEADER",
    "POINTS",
    "Case",
    "ExitCode2",
    "World",
    "png_that_claims",
    "safetensors_bytes",
]
