# SPDX-License-Identifier: Apache-2.0
"""Every public entry point with bad input: which error it raises, and that the message says what came and what helps."""

import re
from itertools import groupby

import pytest

import geode
from tests.reliability.common_reliability import Case, World
from tests.reliability.page import CASES, PAGE, page_text


# Names that take no input of a caller, or only what another name of the table has checked.
NOT_CALLED = {
    "Answer": "made by `post_process_answers`",
    "Box3D": "made by `post_process_answers`",
    "Measurement": "made by `post_process_answers`",
    "KnownLength": "a named tuple, checked by `SceneGeometry.from_vggt`",
    "GeodeModel": "the inner part of `GeodeForConditionalGeneration`",
    "SonataModel": "takes what `SceneGeometry.to_model_inputs` made",
    "VggtModel": "takes what `VggtImageProcessor` made",
    "convert_vggt_checkpoint": "tests/modeling_geode/test_vggt_geode.py",
    "reconstruct_with_vggt": "tests/modeling_geode/test_reconstruction_geode.py",
    "__version__": "text",
    "embedded_scene": "takes nothing",
    "register_auto_classes": "takes nothing",
    "tiny_checkpoint": "takes nothing",
}
IN_THE_TABLE = {
    "GeodeConfig": "Configurations",
    "GeodeDrhConfig": "Configurations",
    "GeodeDrmConfig": "Configurations",
    "SonataConfig": "Configurations",
    "VggtConfig": "Configurations",
    "GeodeForConditionalGeneration": "`model.forward`",
    "GeodeProcessor": "`GeodeProcessor`",
    "SceneEncoding": "`SceneEncoding`",
    "SceneGeometry": "`SceneGeometry`",
    "VggtImageProcessor": "`VggtImageProcessor`",
}

pytestmark = [
    # peft still reads the old name of the library's `is_activation_checkpointing`.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Pillow warns of a picture before it is refused here.
    pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def label(case: Case) -> str:
    return re.sub(r"[^\w.]+", "-", f"{case.entry}-{case.given}").strip("-")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_bad_input_raises_an_error_that_says_what_came_and_what_helps(case, world, monkeypatch):
    monkeypatch.chdir(world.folder)
    with pytest.raises(case.error) as caught:
        case.call(world)
    message = " ".join(str(caught.value).split())
    assert case.received in message
    assert case.remedy in message


def test_errors_are_of_a_few_kinds():
    """Nothing of what a caller did wrong comes out as a fault of ours."""
    kinds = {case.error.__name__ for case in CASES}
    assert kinds == {
        "ExitCode2",
        "FileNotFoundError",
        "NotADirectoryError",
        "StrictDataclassError",
        "TypeError",
        "ValueError",
    }


def test_cases_of_an_entry_stand_together_and_are_named_once():
    entries = [entry for entry, _ in groupby(CASES, key=lambda case: case.entry)]
    assert len(entries) == len(set(entries))
    assert len({(case.entry, case.given) for case in CASES}) == len(CASES)


def test_table_has_every_public_name():
    assert sorted([*NOT_CALLED, *IN_THE_TABLE]) == sorted(geode.__all__)
    assert set(IN_THE_TABLE.values()) <= {case.entry for case in CASES}


def test_page_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == page_text(), "Write it again: python -m tests.reliability.page"
