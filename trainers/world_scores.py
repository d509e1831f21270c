# SPDX-License-Identifier: Apache-2.0
"""Ask a model every question of held-out rooms, and score its answers task by task beside the blind baselines."""

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from geode.data.schemas import Record
from geode.evaluation.vsi_bench.vsi_bench import mean_relative_accuracy
from geode.trainers.collator import GeodeDataCollator


BOX_TASK = "object_localization"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@torch.no_grad()
def answer_records(
    model, collator: GeodeDataCollator, records: Sequence[Record], *, max_new_tokens: int = 8, batch_size: int = 16
) -> list:
    """
    Generate the answers to questions.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model, in evaluation mode.
        collator ([`GeodeDataCollator`]): Finds the scenes and makes the prompts.
        records (`Sequence[Record]`): Questions.
        max_new_tokens (`int`, defaults to 8): Longest answer.
        batch_size (`int`, defaults to 16): Questions at a time.

    Returns:
        `list[Answer]`: The answers.
    """
    answers = []
    for start in range(0, len(records), batch_size):
        inputs = collator.prompt(*records[start : start + batch_size])
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True)
        answers += collator.processor.post_process_answers(output, input_ids=inputs["input_ids"])
    return answers


def score_answers(records: Sequence[Record], answers: Sequence) -> dict[str, dict[str, float]]:
    """
    Score answers by task.

    Args:
        records (`Sequence[Record]`): Questions, with boxes in the frame of their scene.
        answers (`Sequence[Answer]`): What a model answered.

    Returns:
        `dict[str, dict[str, float]]`: For each task `n`, `score` (percent of letters that are right, or mean relative accuracy
        in percent) and its standard `error` over questions. For boxes `median_center_error_m` and `share_within_1m`; without a
        box the error is infinite. Numbers and boxes may be values or digits.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for record, answer in zip(records, answers, strict=True):
        written = [float(number) for number in NUMBER.findall(answer.text)]  # by a model of digits
        if record.box is not None:
            center = answer.boxes[0].center if answer.boxes else written[:3]
            center = torch.tensor(center if len(center) == 3 else (torch.inf,) * 3)
            scores[BOX_TASK].append(torch.dist(center, torch.tensor(record.box[:3])).item())
        elif record.value_si is not None:
            value = answer.values[0].si_value if answer.values else (written or [0.0])[0]
            truth = record.value_si if answer.values else record.value
            scores[str(record.question_type)].append(mean_relative_accuracy(value, truth))
        else:
            scores[str(record.question_type)].append(float(answer.text.strip()[:1] == record.letter))
    found: dict[str, dict[str, float]] = {}
    for task, values in sorted(scores.items()):
        if task == BOX_TASK:
            near = sum(value < 1.0 for value in values) / len(values)
            found[task] = {
                "n": len(values),
                "median_center_error_m": statistics.median(values),
                "share_within_1m": near,
            }
        else:
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            error = 100.0 * spread / math.sqrt(len(values))
            found[task] = {"n": len(values), "score": 100.0 * statistics.mean(values), "error": error}
    return found


def blind_scores(data_root: str | Path) -> dict[str, float]:
    """
    Return the best blind score of each task, from the data set's `baselines.json`.

    Args:
        data_root (`str` or `Path`): The data set.

    Returns:
        `dict[str, float]`: Percent by task: the best of chance, majorities and constants.
    """
    path = Path(data_root) / "baselines.json"
    found = json.loads(path.read_text("ascii"))
    return {task: max(score for name, score in scores.items() if name != "n") for task, scores in found.items()}


def score_table(scores: dict[str, dict], shuffled: dict[str, dict], blind: dict[str, float], *, prior_m: float) -> str:
    """
    Write scores as a Markdown table, better or worse than chance alike.

    Args:
        scores (`dict[str, dict]`): See [`score_answers`].
        shuffled (`dict[str, dict]`): Likewise, with another room shown for each question.
        blind (`dict[str, float]`): See [`blind_scores`].
        prior_m (`float`): Median distance of held-out centres from the mean centre of the training split.

    Returns:
        `str`: The table. A score is above blind where it is so by more than two standard errors.
    """
    lines = [
        "| Task | n | Score | Another room shown | Best blind | Above blind |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task, values in scores.items():
        if task == BOX_TASK:
            own, other = (f"{found[task]['median_center_error_m']:.2f} m" for found in (scores, shuffled))
            name = f"{task}: median error of centres ({values['share_within_1m']:.0%} within 1 m)"
            chance, is_above = f"{prior_m:.2f} m", values["median_center_error_m"] < prior_m
        else:
            own, other = f"{values['score']:.1f} +- {values['error']:.1f}", f"{shuffled[task]['score']:.1f}"
            name, chance = task, f"{blind[task]:.1f}"
            is_above = values["score"] - 2.0 * values["error"] > blind[task]
        lines.append(f"| {name} | {values['n']} | {own} | {other} | {chance} | {'yes' if is_above else 'no'} |")
    return "\n".join(lines)


__all__ = ["BOX_TASK", "answer_records", "blind_scores", "score_answers", "score_table"]
