# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from geode.data.readers import read_records
from geode.data.readers.vlm_3r import counted_frames, record_from_row, row_options


SUSPECT = ["camera_displacement", "camera_obj_abs_dist", *(f"camera_obj_rel_dist_v{number}" for number in (1, 2, 3))]
SOUND = [
    "camera_movement_direction_v1",
    "obj_obj_relative_pos_nf",
    "obj_obj_relative_pos_lr",
    "obj_obj_relative_pos_ud",
]
QUESTION = (
    "<image>\nThese are frames of a video.\nHow many meters does the camera move from frame 3 to frame 17 of 32?"
)


def a_row(question=QUESTION, answer="2.4", **changes):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    row = {
        "id": "u-1",
        "data_source": "scannet",
        "scene_name": "scene0191_00",
        "video": "scannet/videos/scene0191_00.mp4",
    }
    return {**row, "question_type": "camera_displacement", "conversations": turns, **changes}


def read(row, file, **options):
    return record_from_row(row, file=file, index=4, **options)


@pytest.mark.parametrize("family", SUSPECT)
def test_suspect_family_is_known_by_type_or_file(family):
    assert read(a_row(question_type=family), "vsibench_train/merged.json").label_suspect
    assert read(a_row(question_type="another"), f"vstibench_train/qa_{family}.json").label_suspect
    row = a_row(question_type=None)
    record = read(row, f"vstibench_train/qa_{family}.json")
    assert (record.question_type, record.label_suspect) == (family, True)
    del row["question_type"]
    assert read(row, f"vstibench_train/qa_{family}.json").label_suspect


@pytest.mark.parametrize("family", SOUND)
def test_other_families_are_trusted(family):
    record = read(a_row(answer="B", question_type=None), f"vstibench_train/qa_{family}.json")
    assert (record.question_type, record.label_suspect, record.letter) == (family, False, "B")


def test_row_without_type_outside_of_the_temporal_part_has_none():
    record = read(
        a_row("<image>\nHow many chairs are there?", "3", question_type=None),
        "vsibench_train/merged_qa_scannet_train.json",
    )
    assert (record.question_type, record.unit, record.num_frames) == (None, "count", None)
    assert (record.subset, record.scene) == ("vsibench_train", "scene0191_00")


@pytest.mark.parametrize(
    ("question_type", "question", "answer", "unit", "value_si"),
    [
        ("object_abs_distance", "How far apart are lamp and sink (in meters)?", "1.4", "m", 1.4),
        ("object_counting", "How many chair(s) are in this room?", "4", "count", 4.0),
        (
            "object_size_estimation",
            "What is the length of the longest dimension of the bed, in centimeters?",
            "203",
            "cm",
            2.03,
        ),
        ("room_size_estimation", "What is the size of this room (in square meters)?", "17.3", "m2", 17.3),
        ("room_size_estimation", "What is the size of this room?", "17.3", "m2", 17.3),
    ],
)
def test_number_is_regressed_in_si(question_type, question, answer, unit, value_si):
    record = read(a_row(f"<image>\n{question}", answer, question_type=question_type), "vsibench_train/merged.json")
    assert (record.kind, record.unit, record.value_si, record.label_suspect) == ("number", unit, value_si, False)


@pytest.mark.parametrize(
    ("question", "num_frames"),
    [
        ("How far is it between frame 12 and frame 30 of 32?", 32),
        ("In frame 5 of 32, is the lamp near?", 32),
        ("In frame 5 of the 32 frames, is the lamp near?", 32),
        ("At Frame 7 of 16?", 16),
        ("At frame #7 of 32?", 32),
        ("At frame number 7 (of 32)?", 32),
        ("How far does the camera move from frame 3 to 17 of 32?", 32),
        ("In frames 3 and 17 of the 32 frames?", 32),
        ("In frame 5, which one of 4 objects is nearest?", None),
        ("In frame 5 of the video, which of 40 objects is nearest?", None),
        ("In frame 5 of 0, is the lamp near?", None),
        ("In frame 5 of 4, is the lamp near?", None),
        ("In frame 17 and 3 of 4?", None),
        ("In frame 5 of 10000?", 10_000),
        ("In frame 5 of 10001?", None),
        ("In frame 3 of 99999999999999999999999?", None),
        ("In frame 3 of " + "9" * 5000 + "?", None),
        ("In frame 5 of 4 and frame 6 of 8?", 8),
        ("How many chairs?", None),
        ("Is the picture frame on the left of 2 doors?", None),
        ("These are frames of a video.\nHow many of 32 chairs?", None),
    ],
)
def test_frames_are_counted(question, num_frames):
    assert counted_frames(question) == num_frames
    assert read(a_row(question), "vsibench_train/merged.json").num_frames == num_frames


@pytest.mark.parametrize(
    "question",
    [
        "How far does the camera move from frame 3 to frame 17?",
        "In frame 5, which one of 4 objects is nearest?",
        "In frame 5 of 0, is the lamp near?",
    ],
)
def test_temporal_question_without_a_total_counts_on_32_frames(question):
    assert read(a_row(question), "vstibench_train/qa_camera_displacement.json").num_frames == 32
    assert read(a_row(question), "vsibench_train/merged.json").num_frames is None


@pytest.mark.parametrize(
    "erratum",
    [["u-1", "u-9"], [{"id": "u-1", "why": "x"}], {"camera_displacement": ["u-1"], "other": [{"id": "u-8"}]}],
    ids=["ids", "objects", "lists"],
)
def test_erratum_drops_its_rows_and_clears_the_rest(tmp_path, erratum):
    folder = tmp_path / "vstibench_train"
    folder.mkdir()
    rows = [a_row(id=name) for name in ("u-0", "u-1", "u-2")]
    (folder / "qa_camera_displacement.json").write_text(json.dumps(rows))
    before = list(read_records("vlm_3r", tmp_path))
    assert [record["label_suspect"] for record in before] == [True] * 3
    (folder / "erratum_dropped_items.json").write_text(json.dumps(erratum))
    # A pattern that takes the erratum in does not make rows of it.
    after = list(read_records("vlm_3r", tmp_path, data_files=["vstibench_train/*.json"]))
    assert [record["uid"] for record in after] == [record["uid"] for record in (before[0], before[2])]
    assert [record["label_suspect"] for record in after] == [False] * 2


def test_erratum_does_not_reach_the_other_part():
    row = a_row("How many chairs?", "3", question_type="object_counting")
    kept = read(row, "vsibench_train/merged.json", dropped_ids=frozenset({"u-1"}))
    assert kept.value_si == 3.0
    assert kept == read(row, "vsibench_train/merged.json")


@pytest.mark.parametrize("content", [{"a": 3}, 3, [[1]], [{"name": "u-1"}], [None], [True]])
def test_erratum_of_unknown_form_is_refused(tmp_path, content):
    (tmp_path / "vstibench_train").mkdir()
    (tmp_path / "vstibench_train" / "erratum_dropped_items.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"erratum_dropped_items\.json must"):
        row_options(tmp_path)
