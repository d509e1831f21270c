# SPDX-License-Identifier: Apache-2.0
"""The task for VSTI-Bench: its prompts, its scores and the two ways in which types are put together."""

import pytest

from geode.evaluation.lmms_eval_tasks import vsti_bench_utils as task


def row(question_type: str, **changes) -> dict:
    is_number = question_type in task.NUMBER_TYPES
    return {
        "video_path": "scannet/scene_0.mp4",
        "question": "In frame 3 of 32, relative to the bed, is the lamp to the [Left/Right]?",
        "options": None if is_number else ["A. Left", "B. Right"],
        "question_type": question_type,
        "ground_truth": "2.0" if is_number else "Right",
        "mc_answer": None if is_number else "B",
        **changes,
    }


def score(doc: dict, answer: str) -> float:
    (entry,) = {id(found): found for found in task.process_results(doc, [answer]).values()}.values()
    return entry["score"]


@pytest.mark.parametrize(
    ("question_type", "answer", "expected"),
    [
        ("camera_displacement", "2.0", 1.0),
        ("camera_displacement", "2.6 m", 0.5),  # the first word is read
        ("camera_obj_abs_dist", "about 2.0", 0.0),
        ("camera_obj_abs_dist", "nan", 0.0),
        ("camera_obj_rel_dist_v2", "b", 1.0),
        ("camera_movement_direction", "B. Right", 1.0),
        ("obj_obj_relative_pos_lr", "Right", 0.0),  # the letter is asked for
        ("obj_obj_relative_pos_ud", "", 0.0),
    ],
)
def test_answers_are_scored_by_their_first_word(question_type, answer, expected):
    assert score(row(question_type), answer) == expected


@pytest.mark.parametrize("truth", ["0", "-1.0", "none", None])
def test_a_truth_that_is_no_distance_scores_nothing(truth):
    assert score(row("camera_displacement", ground_truth=truth), "2.0") == 0.0


def test_a_question_counts_for_its_task_and_both_means():
    found = task.process_results(row("obj_obj_relative_pos_nf"), ["B"])
    assert set(found) == {"vsti_bench_overall", "vsti_bench_mean_of_types", "obj_obj_relative_pos_accuracy"}


def test_means_over_tasks_and_over_types_differ_as_they_must():
    scores = {"camera_displacement": [0.2, 0.4], "camera_obj_rel_dist_v1": [1.0], "camera_obj_rel_dist_v3": [0.0, 1.0]}
    entries = [{"question_type": kind, "score": value} for kind, values in scores.items() for value in values]
    assert task.mean_of_types(entries) == pytest.approx((0.3 + 1.0 + 0.5) / 3)
    assert task.mean_of_tasks(entries) == pytest.approx((0.3 + 0.75) / 2)


def test_prompts_are_those_of_vsi_bench():
    number, choice = row("camera_displacement"), row("camera_obj_rel_dist_v1")
    assert task.doc_to_text(number) == (
        f"These are frames of a video.\n{number['question']}\nPlease answer the question using a single word or phrase."
    )
    assert task.doc_to_text(choice) == (
        f"These are frames of a video.\n{choice['question']}\nOptions:\nA. Left\nB. Right\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (task.doc_to_target(number), task.doc_to_target(choice)) == ("2.0", "B")


def test_unknown_types_and_missing_videos_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"camera_obj_abs_dist.*got 'object_counting'"):
        task.doc_to_text({**row("camera_displacement"), "question_type": "object_counting"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"scene_0\.mp4\. Run lmms-eval in the folder of the videos"):
        task.doc_to_visual(row("camera_displacement"))
    with pytest.raises(ValueError, match=r"\.\./secret\.mp4"):
        task.doc_to_visual({**row("camera_displacement"), "video_path": "../secret.mp4"})
