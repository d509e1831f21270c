# SPDX-License-Identifier: Apache-2.0
"""ARKitScenes and EmbodiedScan: from scans to "Locate the X."."""

import json
import math

import pytest
from scipy.spatial.transform import Rotation

from geode.data.readers import arkitscenes, embodiedscan, read_records


def an_object(label, *, yaw_deg=30.0, centroid=(1.0, 2.0, 0.5), lengths=(0.4, 1.6, 0.9)):
    axes = Rotation.from_euler("z", yaw_deg, degrees=True).as_matrix().T.ravel().tolist()
    box = {"centroid": list(centroid), "axesLengths": list(lengths), "normalizedAxes": axes}
    return {"label": label, "segments": {"obbAligned": box, "obb": {}}, "uid": "u", "attributes": {}}


@pytest.fixture
def arkit(tmp_path):
    for split, video_id, labels in (
        ("Training", "40753679", ["tv_monitor", "chair", "chair", "bed"]),
        ("Training", "40753686", ["sofa"]),
        ("Validation", "41069021", ["sink"]),
    ):
        folder = tmp_path / "3dod" / split / video_id
        folder.mkdir(parents=True)
        content = {"data": [an_object(label) for label in labels], "skipped": False}
        (folder / f"{video_id}_3dod_annotation.json").write_text(json.dumps(content))
    return tmp_path


def test_arkitscenes_asks_for_every_category_that_a_scan_has_once(arkit):
    records = list(read_records("arkitscenes", arkit))
    assert [(record["scene"], record["prompt"]) for record in records] == [
        ("40753679", "Locate the tv monitor."), ("40753679", "Locate the bed."), ("40753686", "Locate the sofa."),
    ]  # fmt: skip
    first = records[0]
    # The longer side, 1.6, lies along the second axis, which is at 30 + 90 degrees: -60 after half a turn.
    assert first["box"] == pytest.approx([1.0, 2.0, 0.5, 1.6, 0.4, 0.9, -math.pi / 3], abs=1e-6)
    assert json.loads(first["answer_text"]) == [1.0, 2.0, 0.5, 1.6, 0.4, 0.9, -1.047]
    assert (first["kind"], first["media"]) == ("box", "3dod/Training/40753679/40753679.mp4")
    assert len({record["uid"] for record in records}) == 3


def test_arkitscenes_paths_follow_patterns(arkit):
    patterns = {"media_pattern": "video/{split}/{video_id}.mov", "geometry_pattern": "geometry/{video_id}"}
    record = next(iter(read_records("arkitscenes", arkit, **patterns)))
    assert (record["media"], record["geometry"]) == ("video/Training/40753679.mov", "geometry/40753679")
    with pytest.raises(ValueError, match=r"\['folder', 'split', 'video_id'\] in braces, got 'scan'"):
        next(iter(read_records("arkitscenes", arkit, media_pattern="{scan}.mp4")))


def test_scan_that_cannot_be_read_is_named_or_counted(arkit, caplog):
    bad = arkit / "3dod" / "Training" / "40753679" / "40753679_3dod_annotation.json"
    bad.write_text(json.dumps({"data": [{"segments": {}}]}))
    with pytest.raises(ValueError, match=r"A scan of 3dod/Training/40753679/.* `label` must be text"):
        list(read_records("arkitscenes", arkit))
    assert [record["prompt"] for record in read_records("arkitscenes", arkit, on_error="skip")] == ["Locate the sofa."]
    assert "Skipped 1 of the 1 rows" in caplog.text


def a_scan(**changes):
    instances = [
        {"bbox_3d": [1.0, 2.0, 0.5, 1.6, 0.4, 0.9, 0.25, 0.0, 0.0], "bbox_label_3d": 1},
        {"bbox_3d": [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "bbox_label_3d": 0},
        {"bbox_3d": [3.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "bbox_label_3d": 0},
    ]
    return {
        "sample_idx": "scannet/scene0191_00",
        "instances": instances,
        "categories": {"chair": 0, "desk": 1},
        **changes,
    }


def embodied(tmp_path, content, name="infos_train.json"):
    text = "\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)
    (tmp_path / name).write_text(text)
    return list(read_records("embodiedscan", tmp_path))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (a_scan(), "infos_train.json"),
        ([a_scan()], "infos_train.json"),
        ([a_scan()], "infos_train.jsonl"),
        (
            {
                "metainfo": {"categories": {"chair": 0, "desk": 1}},
                "data_list": [{**a_scan(), "categories": ["chair", "desk"]}],
            },
            "a_train.json",
        ),
        (
            {"categories": ["chair", "desk"], "data_list": [{k: v for k, v in a_scan().items() if k != "categories"}]},
            "a_train.json",
        ),
        (a_scan(sample_idx=None, scan_id="scannet/scene0191_00"), "infos_train.json"),
    ],
)
def test_embodiedscan_forms_give_the_same_record(tmp_path, content, name):
    (record,) = embodied(tmp_path, content, name)
    assert (record["prompt"], record["media"], record["scene"]) == (
        "Locate the desk.",
        "scannet/scene0191_00.mp4",
        "scene0191_00",
    )
    assert record["box"] == pytest.approx([1.0, 2.0, 0.5, 1.6, 0.4, 0.9, 0.25])
    assert json.loads(record["answer_text"]) == [1.0, 2.0, 0.5, 1.6, 0.4, 0.9, 0.25]


def test_embodiedscan_takes_category_names(tmp_path):
    scan = a_scan(categories=None, instances=[{"bbox_3d": [0, 0, 0, 1, 1, 1, 0, 0, 0], "category": "desk lamp"}])
    assert embodied(tmp_path, scan)[0]["prompt"] == "Locate the desk lamp."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (a_scan(categories={"desk": 1}), "must be a label of `categories`, which has 1, got 0"),
        (a_scan(categories="x"), "`categories` must be"),
        (a_scan(sample_idx=None), "`sample_idx` must be text"),
        (a_scan(instances=None), "list `instances`"),
        ({"data_list": [3]}, "`data_list` must be a list of scans"),
        (a_scan(instances=[{"category": "desk"}]), "6, 7 or 9 numbers|made of numbers"),
    ],
)
def test_embodiedscan_refuses_malformed_scans(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        embodied(tmp_path, content)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path / "infos_train.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"is a pickle, which runs code .* write JSON Lines"):
        list(read_records("embodiedscan", tmp_path, data_files=["*.pkl"]))


def test_rows_are_what_the_readers_features_say():
    (row,) = embodiedscan.rows_from_item(a_scan())
    assert row.keys() == embodiedscan.FEATURES.keys()
    assert arkitscenes.FEATURES.keys() == {"data"}
