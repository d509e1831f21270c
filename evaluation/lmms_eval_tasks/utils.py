# SPDX-License-Identifier: Apache-2.0
"""Functions of the tasks beside this file: where the videos are; the scores are lmms-eval's own."""

from pathlib import Path

from lmms_eval.tasks.vsibench.utils import (  # noqa: F401  (the task names them)
    vsibench_aggregate_obj_appearance_order_accuracy,
    vsibench_aggregate_object_abs_distance_mra,
    vsibench_aggregate_object_counting_mra,
    vsibench_aggregate_object_rel_direction_accuracy,
    vsibench_aggregate_object_rel_distance_accuracy,
    vsibench_aggregate_object_size_estimation_mra,
    vsibench_aggregate_overall,
    vsibench_aggregate_room_size_estimation_mra,
    vsibench_aggregate_route_planning_accuracy,
    vsibench_doc_to_text,
    vsibench_process_results,
)

from geode.data.schemas import media_path


def doc_to_visual(doc: dict) -> list[str]:
    """Return the path of a question's video, below the folder in which lmms-eval runs."""
    path = Path(media_path(f"{doc['dataset']}/{doc['scene_name']}.mp4"))
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.absolute()}. Run lmms-eval in the folder of the dataset.")
    return [str(path.absolute())]
