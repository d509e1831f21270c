# SPDX-License-Identifier: Apache-2.0
"""A folder with small datasets of the public schemas, made up."""

import json


QUESTION = "<image>\nThese are frames of a video.\nWhat is the distance in feet between the lamp and the sink?"
CHOICE = "<image>\nWhich is bigger?\nOptions:\nA. lamp\nB. sofa"


def conversation(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_list(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def vsi_row(index, answer=None):
    question, default = (QUESTION, f"{1 + index % 50 / 10}") if index % 2 else (CHOICE, "AB"[index // 2 % 2])
    kind = "absolute_distance_object" if index % 2 else "relative_size_object"
    return {
        "conversations": conversation(question, answer or default),
        "question_type": kind,
        "video": f"scannet/scene{index % 7:04d}_00.mp4",
    }


def make_data(root, *, num_vsi=300, num_vlm=120):
    """VSI-590K, VLM-3R-DATA (with a suspect family) and ViCA-322K below `root`, with empty videos."""
    rows = [vsi_row(index) for index in range(num_vsi)]
    write_lines(root / "VSI-590K" / "vsi_590k.jsonl", rows)
    for row in rows:
        touch(root / "VSI-590K" / row["video"])
    for name, kind in (
        ("vsibench_train/merged_qa_scannet_train.json", "object_abs_distance"),
        ("vstibench_train/qa_camera_displacement.json", "camera_displacement"),
    ):
        rows = [
            {
                "id": f"{kind}-{index}",
                "data_source": "scannet",
                "scene_name": f"scene{100 + index % 5:04d}_00",
                "question_type": kind,
                "video": f"scannet/videos/scene{100 + index % 5:04d}_00.mp4",
                "conversations": conversation("<image>\nHow far (in meters)?", f"{0.5 + index / 100:.2f}"),
            }
            for index in range(num_vlm // 2)
        ]
        write_list(root / "VLM-3R-DATA" / name, rows)
        for row in rows:
            touch(root / "VLM-3R-DATA" / row["video"])
    for number, name in enumerate(
        ("scannet/base/object_count", "scannet/complex/usage", "arkitscenes/base/room_size")
    ):
        answer = ("4", "One sits on it.", "35.18")[number]
        rows = [
            {
                "video": f"scannet/scene{200 + index:04d}_00.mp4",
                "conversations": conversation("<image>\nWhat?", answer),
            }
            for index in range(10)
        ]
        write_list(root / "ViCA-322K" / f"{name}.json", rows)
    return root
