# SPDX-License-Identifier: Apache-2.0
"""Inputs out of hypothesis: JSON of any form, files that were valid before they were damaged, chats, rows and recipes."""

import io
import json

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from PIL import Image
from safetensors.torch import save

from tests.reliability.common_reliability import PLY_HEADER, safetensors_bytes


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(width=64),
    st.sampled_from([0, -1, 1, 10**9, 10**30, 10**400, 1e300, 5e-324, float("nan"), float("inf")]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "\ud800",
            "<REG>",
            "<spatio>",
            "<video>",
            "<image>",
            "<|im_end|>",
            "../a",
            "/etc/passwd",
            "a\nb",
        ]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
ANYTHING = JSON | st.binary(max_size=8) | st.tuples(SCALARS, SCALARS) | st.dictionaries(st.integers(), SCALARS)


@st.composite
def damaged(draw, files: list[bytes]) -> bytes:
    """One of some valid files with pieces replaced, cut out, doubled or put in, or its end missing."""
    content = draw(st.sampled_from(files))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(0, 16))
        piece = draw(
            st.one_of(
                st.binary(max_size=16),
                st.just(content[start : start + length] * 2),
                st.sampled_from(
                    [b"", b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"999999999", b"-1", b"NaN", b"[" * 60]
                ),
            )
        )
        content = content[:start] + piece + content[start + length :]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


# ---- point clouds and tensors ----


def ply_files() -> list[bytes]:
    rows = np.arange(12, dtype="<f4").tobytes()
    text = PLY_HEADER.format("ascii", 2) + "1 2 3\n4 5 6\n"
    colored = text.replace("end_header", "property uchar red\nproperty uchar green\nproperty uchar blue\nend_header")
    lists = (
        text.replace("end_header", "element face 1\nproperty list uchar int vertex_indices\nend_header") + "3 0 1 1\n"
    )
    return [
        text.encode(),
        colored.replace("3\n", "3 1 2 3\n").replace("6\n", "6 4 5 6\n").encode(),
        lists.encode(),
        PLY_HEADER.format("binary_little_endian", 4).encode() + rows,
        PLY_HEADER.format("binary_big_endian", 4).encode() + rows,
    ]


_PLY_WORDS = st.sampled_from(
    [
        "ply",
        "format",
        "ascii",
        "binary_little_endian",
        "1.0",
        "element",
        "vertex",
        "face",
        "property",
        "list",
        "float",
        "uchar",
        "int",
        "double",
        "x",
        "y",
        "z",
        "red",
        "green",
        "blue",
        "nx",
        "ny",
        "nz",
        "comment",
        "0",
        "1",
        "3",
        "1000000000",
        "-1",
    ]
)
PLY = st.one_of(
    damaged(ply_files()),
    st.lists(st.lists(_PLY_WORDS, max_size=4), max_size=8).map(
        lambda lines: "\n".join(["ply", *map(" ".join, lines), "end_header", "1 2 3\n"]).encode()
    ),
)

_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "I64", "BOOL", "F8_E4M3", "XX"]) | SCALARS,
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 10**12, -1]), max_size=4) | SCALARS,
        "data_offsets": st.lists(st.sampled_from([0, 4, 12, 24, 10**13, -1]), max_size=3) | SCALARS,
    },
)
_HEADERS = st.dictionaries(
    st.sampled_from(["points", "colors", "visual_tokens", "rationale_tokens", "prefix.keys", "a"]),
    _ENTRIES | SCALARS,
    max_size=3,
)


def safetensors_file(facts: object = None) -> bytes:
    """A file that holds an encoded scene."""
    header = {"format_version": 1, "encoder_digest": "a", "summary": {}} if facts is None else facts
    tensors = {"visual_tokens": torch.zeros(1, 2, 4), "rationale_tokens": torch.zeros(1, 4)}
    return save(tensors, {"format": "pt", "geode_scene_encoding": json.dumps(header)})


SAFETENSORS = st.one_of(
    damaged([safetensors_file()]),
    st.dictionaries(
        st.sampled_from(["format_version", "encoder_digest", "summary", "language_digest"]),
        JSON | st.just(1),
        max_size=4,
    ).map(safetensors_file),
    st.builds(
        lambda header, facts, content: safetensors_bytes(
            json.dumps({**header, **({} if facts is None else {"__metadata__": facts})}).encode(), content
        ),
        _HEADERS,
        st.none() | st.just({"format": "pt"}) | JSON,
        st.binary(max_size=24),
    ),
)
ARRAYS = st.one_of(
    ANYTHING,
    np_st.arrays(
        st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_, np.complex128]),
        np_st.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    np_st.arrays(np.float64, st.tuples(st.integers(0, 20), st.just(3))),
    np_st.arrays(np.float64, st.tuples(st.integers(3, 20), st.just(3)), elements=st.floats(-1e4, 1e4)),
    st.sampled_from([np.eye(4)[None], np.eye(3)[None], np.full((1, 4, 5), 2.0), np.zeros((1, 4, 5, 3), np.uint8)]),
)

# ---- pictures ----


def picture_files() -> list[bytes]:
    picture = Image.effect_noise((24, 18), 60).convert("RGB")
    files = []
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(file, form, **({"exif": exif} if form in ("PNG", "JPEG", "TIFF", "WEBP") else {}))
        files.append(file.getvalue())
    return files


PICTURES = damaged(picture_files()) | st.binary(max_size=64)

# ---- chats ----

_PART_KEYS = st.sampled_from(
    ["type", "text", "image", "video", "path", "url", "geometry", "scene", "token", "value", "unit", "x"]
)
_PARTS = st.one_of(
    ANYTHING,
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.builds(
        lambda kind, part: {"type": kind, **part},
        st.sampled_from(["text", "image", "video", "scene", "value", "audio"]) | SCALARS,
        st.dictionaries(_PART_KEYS, ANYTHING, max_size=4),
    ),
    st.builds(
        lambda token, value, unit: {"type": "value", "token": token, "value": value, "unit": unit},
        st.sampled_from(["<REG>", "<3DBBOX>", "<X>"]),
        NUMBERS | st.lists(NUMBERS, min_size=7, max_size=7) | ANYTHING,
        st.sampled_from([None, "m", "feet", "m2", "count", "parsec"]) | SCALARS,
    ),
)
_TURNS = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system"]) | SCALARS,
            "content": TEXTS | st.lists(_PARTS, max_size=4) | ANYTHING,
        },
        optional={"x": ANYTHING},
    ),
)
CHATS = st.lists(_TURNS, max_size=4) | st.lists(st.lists(_TURNS, max_size=3), max_size=3) | ANYTHING

# ---- rows and settings ----


def changed(rows: list[dict]) -> st.SearchStrategy:
    """Rows of a dataset with some fields replaced, at any depth of one level."""
    names = sorted({name for row in rows for name in row})
    return st.builds(
        lambda row, changes, dropped: {key: value for key, value in {**row, **changes}.items() if key not in dropped},
        st.sampled_from(rows),
        st.dictionaries(st.sampled_from(names), ANYTHING, max_size=3),
        st.lists(st.sampled_from(names), max_size=2),
    )


_YAML_PIECES = st.sampled_from(
    [
        "sources:",
        "- reader: jsonl",
        "  path: a",
        "  fraction: .5",
        "  options: {a: 1}",
        "name: a",
        "seed: 1",
        "num_frames: 4",
        "output_dir: x",
        "learning_rate: 1.0e-5",
        "model_overrides: {drm_config: {hidden_size: 96}}",
        "mixture: rooms",
        "&a [",
        "*a",
        "!!timestamp x",
        "!!python/name:os.system",
        "? [a]",
        "<<: {a: 1}",
        "- ",
        "'",
        '"',
        "|",
        "2020-13-01",
        "1e400",
        "0x",
        "\t",
        "---",
        "...",
        "%YAML 9.9",
        "{",
        "}",
        "[",
        "!!binary x",
        "!!bool x",
        "!!int 9" + "9" * 4400,
        "~",
        "=",
        "\x00",
    ]
)
YAML = st.one_of(
    damaged(
        [b"name: a\nsources:\n- reader: jsonl\n  path: a\n  weight: 2\n", b"output_dir: x\nnum_frames: 4\nseed: 3\n"]
    ),
    st.lists(st.tuples(_YAML_PIECES, st.sampled_from(["\n", " ", "\n  ", ""])), max_size=10).map(
        lambda pieces: "".join(map("".join, pieces)).encode()
    ),
    st.dictionaries(
        st.sampled_from(
            ["name", "sources", "seed", "suspect_labels", "output_dir", "num_frames", "model_overrides", "media_root"]
        )
        | TEXTS,
        JSON,
        max_size=4,
    ).map(lambda content: json.dumps(content).encode()),
)

__all__ = ["ANYTHING", "ARRAYS", "CHATS", "JSON", "PICTURES", "PLY", "SAFETENSORS", "YAML", "changed", "damaged"]
