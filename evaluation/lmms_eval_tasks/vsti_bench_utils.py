# SPDX-License-Identifier: Apache-2.0
"""
Functions of the task `vsti_bench`.

Source: Fan et al., "VLM-3R" (arXiv 2505.20279), the public rows of `Journey9ni/vstibench` as they are described (`video_path`,
`question`, `options`, `question_type`, `ground_truth`, and `mc_answer`, the letter of a choice), and the public behaviour of its scorer:
that of VSI-Bench, but for how types are put together, on which public harnesses differ; so both are given. They were not seen here.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from geode.data.schemas import CHOICE_POST_PROMPT, NUMBER_POST_PROMPT, PRE_PROMPT, media_path
from geode.evaluation.vsi_bench.vsi_bench import first_word, mean_relative_accuracy, to_float


# Types of question, by the five tasks of the paper's table.
TASKS = {
    "camera_obj_abs_dist": ("camera_obj_abs_dist",),
    "camera_displacement": ("camera_displacement",),
    "camera_movement_direction": ("camera_movement_direction",),
    "camera_obj_rel_dist": ("camera_obj_rel_dist_v1", "camera_obj_rel_dist_v2", "camera_obj_rel_dist_v3"),
    "obj_obj_relative_pos": ("obj_obj_relative_pos_lr", "obj_obj_relative_pos_nf", "obj_obj_relative_pos_ud"),
}
NUMBER_TYPES = ("camera_obj_abs_dist", "camera_displacement")
TASK_OF = {kind: task for task, kinds in TASKS.items() for kind in kinds}


def doc_to_visual(doc: dict) -> list[str]:
    """Return the path of a question's video, below the folder in which lmms-eval runs."""
    path = Path(media_path(doc["video_path"]))
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.absolute()}. Run lmms-eval in the folder of the videos.")
    return [str(path.absolute())]


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Return the prompt of a question, in VSI-Bench's words."""
    if _task_of(doc) in NUMBER_TYPES:
        return "\n".join([PRE_PROMPT, doc["question"], NUMBER_POST_PROMPT])
    return "\n".join([PRE_PROMPT, doc["question"], "Options:", *doc["options"], CHOICE_POST_PROMPT])


def doc_to_target(doc: dict) -> str:
    """Return the truth: a number, or the letter of a choice."""
    return str(doc["ground_truth"] if _task_of(doc) in NUMBER_TYPES else doc["mc_answer"])


def process_results(doc: dict, results: Sequence[str]) -> dict[str, dict]:
    """
    Score an answer.

    Args:
        doc (`dict`): The row.
        results (`Sequence[str]`): The answer.

    Returns:
        `dict[str, dict]`: Type and score, from 0 to 1, for each metric that the question counts for. An answer that is no number, and
        a truth that is no distance, score 0.
    """
    task, answer, truth = _task_of(doc), first_word(results[0]), doc_to_target(doc)
    if task in NUMBER_TYPES:
        found, metres = to_float(answer), to_float(truth)
        is_measured = found is not None and metres is not None and metres > 0
        score = mean_relative_accuracy(found, metres) if is_measured else 0.0
    else:
        score = float(answer.lower() == truth.lower())
    entry = {"question_type": doc["question_type"], "score": score}
    own = f"{task}_{'mra' if task in NUMBER_TYPES else 'accuracy'}"
    return dict.fromkeys(("vsti_bench_overall", "vsti_bench_mean_of_types", own), entry)


def mean_of_types(entries: Sequence[dict]) -> float:
    """Return the mean over types of question of their mean scores, each type once."""
    return fmean(_means(entries).values())


def mean_of_tasks(entries: Sequence[dict]) -> float:
    """Return the mean over the five tasks, each of which is the mean of its types."""
    tasks: dict[str, list[float]] = {}
    for kind, mean in _means(entries).items():
        tasks.setdefault(TASK_OF[kind], []).append(mean)
    return fmean(map(fmean, tasks.values()))


def _means(entries: Sequence[dict]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for entry in entries:
        scores.setdefault(entry["question_type"], []).append(entry["score"])
    return {kind: fmean(values) for kind, values in scores.items()}


def _task_of(doc: dict) -> str:
    kind = doc["question_type"]
    if kind not in TASK_OF:
        raise ValueError(f"`question_type` must be one of VSTI-Bench's ({', '.join(TASK_OF)}), got {kind!r}.")
    return TASK_OF[kind]
