# SPDX-License-Identifier: Apache-2.0
"""
Whatever is given, it works or raises an error of ours: no crash, and no fault from the inside.

The default run tries a few inputs of each kind. A long one, whose number of inputs the environment sets:

```bash
GEODE_FUZZ_EXAMPLES=20000 python -m pytest -m slow tests/reliability/test_fuzz.py --hypothesis-seed=1
```
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geode.data.mixtures import Mixture
from geode.data.readers import READERS, read_records, record_from_row
from geode.data.schemas import Record
from geode.modeling_geode.scene_geode import SceneEncoding, SceneGeometry
from geode.modeling_geode.video_processing_geode import load_image, load_video_frames
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.stage2 import make_parser
from tests.reliability import strategies
from tests.reliability.common_reliability import PICTURE, World


EXAMPLES, LONG_EXAMPLES = 12, int(os.environ.get("GEODE_FUZZ_EXAMPLES", "1000"))
ROWS = Path(__file__).parents[1] / "fixtures" / "dataset_rows.jsonl"
# Exactly these: their subclasses, such as UnicodeDecodeError, come from the inside.
KINDS = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Every message of ours says what is wanted, or what is wrong with what came.
OURS = re.compile(
    r"\b(must|may|needs?|takes?|cannot|lacks?|belongs?|truncated|damaged|There is|has a line|required|Unknown|supported|not fit|unexpected)\b"
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),
    # peft still reads the old name of the library's `is_activation_checkpointing`.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def read_cloud(world: World, content: bytes) -> None:
    SceneGeometry.from_ply(world.write("cloud.ply", content), is_metric=False)


def read_encoding(world: World, content: bytes) -> None:
    SceneEncoding.load(world.write("scene.safetensors", content))


def read_scene(world: World, content: bytes) -> None:
    """Tensors that the header's digest fits, so that they are looked at."""
    folder = world.write("scene/geometry.safetensors", content).parent
    header = json.loads((Path(world.geometry) / "geometry.json").read_text("utf-8"))
    header["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "geometry.json").write_text(json.dumps(header), encoding="utf-8")
    SceneGeometry.load(folder)


def read_header(world: World, change: dict) -> None:
    folder = world.folder / "headed"
    if not folder.is_dir():
        shutil.copytree(world.geometry, folder)
    header = json.loads((Path(world.geometry) / "geometry.json").read_text("utf-8"))
    (folder / "geometry.json").write_text(json.dumps({**header, **change}), encoding="utf-8")
    SceneGeometry.load(folder)


def fuse_points(world: World, options: dict) -> None:
    SceneGeometry.from_point_cloud(**options).to_model_inputs(0.02)


def fuse_frames(world: World, options: dict) -> None:
    SceneGeometry.from_rgbd(**options).to_model_inputs(0.02)


def read_row(world: World, given_: tuple) -> None:
    name, row = given_
    record = record_from_row(name, row, file="a.json")
    if record is not None:
        Record.from_dict(record.to_dict())


def read_rows(world: World, given_: tuple) -> None:
    ending, content = given_
    path = world.write(f"rows{ending}", content)
    list(read_records("jsonl", path.parent, data_files=[path.name]))


def render_chat(world: World, conversation: object) -> None:
    world.processor.apply_chat_template(conversation, tokenize=True, use_geometry=False)


def call_processor(world: World, options: dict) -> None:
    world.processor(**{"use_geometry": False, **options})


def collate(world: World, records: object) -> None:
    GeodeDataCollator(processor=world.processor, media_root=world.folder, use_geometry=False)(records)


def read_mixture(world: World, content: bytes) -> None:
    Mixture.from_yaml(world.write("mixture.yaml", content))


def read_recipe(world: World, content: bytes) -> None:
    path = str(world.write("recipe.yaml", content))
    # argparse refuses a value by ending the program.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        make_parser().parse_args_and_config(["--config", path, "--use_cpu", "--dry_run"])


def read_picture(world: World, content: bytes) -> None:
    load_image(world.write("picture.img", content))


def read_video(world: World, edits: tuple) -> None:
    """The embedded video with bytes replaced, often in its tables, which stand at its end, or cut short."""
    pieces, length = edits
    content = bytearray((world.room / "room.mp4").read_bytes())
    for place, piece in pieces:
        content[place : place + len(piece)] = piece
    load_video_frames(world.write("video.mp4", bytes(content[:length])), num_frames=2)


def options_of(*names: str, **fixed) -> st.SearchStrategy:
    return st.fixed_dictionaries(fixed, optional=dict.fromkeys(names, strategies.ARRAYS))


HEADER_NAMES = (
    "format_version",
    "image_size",
    "is_metric",
    "scale_source",
    "gravity",
    "metres_per_unit",
    "tensors_sha256",
    "x",
)
FIXTURE_ROWS = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
RECORDS = st.lists(
    strategies.changed(
        [
            {
                **dict.fromkeys(("uid", "source", "prompt", "answer_text"), "a"),
                "media_type": "image",
                "media": "picture.png",
                "kind": "number",
                "value": 2.0,
                "unit": "m",
                "value_si": 2.0,
                "box": None,
                "conversation": None,
                "geometry": None,
                "rationale": None,
                "num_frames": None,
            }
        ]
    ),
    max_size=2,
)
POINT_OPTIONS = ("colors", "normals", "world_from_cam", "intrinsics", "image_size", "up", "is_metric", "max_points")
FRAME_OPTIONS = ("images", "up", "is_metric", "depth_confidence", "timestamps_s", "max_points", "voxel_size_m")
# What is given, and to whom. Videos, which take longest, get a tenth of the examples.
FUZZERS: dict[str, tuple[Callable, Callable]] = {
    "ply": (read_cloud, lambda world: strategies.PLY),
    "encoded-scene": (read_encoding, lambda world: strategies.SAFETENSORS),
    "scene-tensors": (read_scene, lambda world: strategies.SAFETENSORS),
    "scene-header": (
        read_header,
        lambda world: st.dictionaries(st.sampled_from(HEADER_NAMES), strategies.JSON, min_size=1, max_size=2),
    ),
    "point-cloud": (fuse_points, lambda world: options_of(*POINT_OPTIONS, points=strategies.ARRAYS)),
    "depth": (
        fuse_frames,
        lambda world: options_of(
            *FRAME_OPTIONS, depth=strategies.ARRAYS, intrinsics=strategies.ARRAYS, world_from_cam=strategies.ARRAYS
        ),
    ),
    "row": (
        read_row,
        lambda world: st.one_of(
            st.sampled_from(FIXTURE_ROWS).flatmap(
                lambda case: st.tuples(st.just(case["dataset"]), strategies.changed([case["row"]]))
            ),
            st.tuples(st.sampled_from(sorted(READERS)), strategies.ANYTHING),
        ),
    ),
    "rows": (
        read_rows,
        lambda world: st.tuples(
            st.sampled_from([".jsonl", ".json", ".parquet"]),
            strategies.damaged(
                [
                    b'[{"video": "a.mp4", "question": "How far?", "answer": "2"}]',
                    b'{"video": "a.mp4", "prompt": "a", "answer": 2}\n',
                ]
            )
            | st.binary(max_size=40),
        ),
    ),
    "chat": (render_chat, lambda world: strategies.CHATS),
    "prompt": (
        call_processor,
        lambda world: st.fixed_dictionaries(
            {
                "text": strategies.ANYTHING
                | st.lists(st.sampled_from(["<IMG_CONTEXT>", "<video>", "a", "<REG>"]), max_size=2)
            },
            optional={
                "images": st.just([PICTURE]) | strategies.ARRAYS,
                "videos": st.just([[PICTURE]]) | strategies.ARRAYS,
                "num_frames": strategies.ANYTHING,
                "padding": strategies.ANYTHING,
                "geometry": strategies.ANYTHING,
                "scene": strategies.ANYTHING,
            },
        ),
    ),
    "records": (collate, lambda world: RECORDS | strategies.ANYTHING),
    "mixture": (read_mixture, lambda world: strategies.YAML),
    "recipe": (read_recipe, lambda world: strategies.YAML),
    "picture": (read_picture, lambda world: strategies.PICTURES),
    "video": (
        read_video,
        lambda world: st.tuples(
            st.lists(st.tuples(st.integers(-2500, 2500), st.binary(min_size=1, max_size=8)), max_size=4),
            st.sampled_from([None, -1, -1000, 200_000, 100]),
        ),
    ),
}


def fuzz(name: str, world: World, examples: int) -> None:
    attempt_one, make = FUZZERS[name]
    examples = max(3, examples // 10) if name == "video" else examples

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(value=make(world))
    def attempt(value):
        raised = None
        try:
            attempt_one(world, value)
        except KINDS as error:
            raised = error
        if raised is not None:
            assert type(raised) in KINDS, f"{type(raised).__name__} from the inside: {raised}"
            assert OURS.search(str(raised)), f"says neither what came nor what helps: {raised!r}"

    attempt()


@pytest.mark.parametrize("name", FUZZERS)
def test_any_input_works_or_raises_an_error_of_ours(name, world, monkeypatch):
    monkeypatch.chdir(world.folder)
    fuzz(name, world, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_any_of_many_inputs_works_or_raises_an_error_of_ours(name, world, monkeypatch):
    monkeypatch.chdir(world.folder)
    fuzz(name, world, LONG_EXAMPLES)
