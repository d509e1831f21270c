# SPDX-License-Identifier: Apache-2.0
"""From predictions to scores, with what guessing scores beside them, and a card that says how they were made."""

import importlib.metadata
import json
import math
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from geode import __version__
from geode.data.schemas import CHOICE_POST_PROMPT, NUMBER_POST_PROMPT, PRE_PROMPT
from geode.data.whole_files import write_whole
from geode.evaluation.calibration import interval_report, interval_table
from geode.evaluation.prediction_files import read_finished
from geode.evaluation.vsi_bench.vsi_bench import SCORERS, TASKS, aggregate, guarded_score, summarise


MIN_SCENES = 10
SCORES, CARD_FILE = "scores.json", "README.md"
CONTROL_NAMES = {
    "none": "frames and geometry",
    "blind": "nothing (blind)",
    "no_geometry": "frames alone",
    "shuffled_geometry": "frames, with the geometry of the next scene",
}
INCOMPLETE = """
Not all three types of direction are there, so they stand apart: the official scorer gives no score for such a set of questions.
"""
VALUES = """
{table}

Intervals of values are the model's own, calibrated or not; those of scores, in the first table, are another thing.
"""
CARD = """# {model} on {benchmark}

Shown: {shown}. {questions} questions about {scenes} scenes.

{table}
{notice}{values}
Percent: accuracy of choices, mean relative accuracy of numbers; overall is the mean over the tasks that are there. Intervals: 95 %, by
a bootstrap over scenes. "Most frequent" gives the most frequent answer of this benchmark to every question of a type, "at random" picks
one of the options. Mean over questions: {micro:.1f}. {seconds:.2f} s a question, encoding included.

| | |
| --- | --- |
{facts}

Prompts: `{pre}`, the question, `{number}` or the options and `{choice}`.

Scorer: `{scorer}`. The scored answer is the first regressed value in the unit that the question asks for, or else the text. Figures of
other scorers must not be mixed with these. Scored again from the predictions by `geode eval --rescore DIR`.
"""


def chance_scores(lines: Sequence[dict], scorer: str = "official") -> dict[str, dict[str, float]]:
    """
    Score two ways of guessing on the questions of a run.

    Args:
        lines (`Sequence[dict]`): Predictions.
        scorer (`str`, defaults to `"official"`): See `score`.

    Returns:
        `dict[str, dict[str, float]]`: `frequency`, the most frequent answer to each type of question, by task and overall, and
        `random`, one of the options, for tasks with options. In percent.
    """
    truths = defaultdict(Counter)
    for line in lines:
        truths[line["question_type"]][line["ground_truth"]] += 1
    # The smallest of equally frequent answers, so that the order of questions does not matter.
    common = {name: min(found, key=lambda answer: (-found[answer], answer)) for name, found in truths.items()}
    types = [line["question_type"] for line in lines]
    frequency = [
        guarded_score(line["question_type"], common[line["question_type"]], line["ground_truth"], scorer)
        for line in lines
    ]
    choices = [line for line in lines if line.get("num_options")]
    found = {"frequency": aggregate(types, frequency, is_strict=False)}
    if choices:
        types, shares = zip(*((line["question_type"], 1.0 / line["num_options"]) for line in choices), strict=True)
        random = aggregate(types, shares, is_strict=False)
        found["random"] = {name: value for name, value in random.items() if name != "overall"}
    return found


def score_lines(lines: Sequence[dict], scorer: str = "official") -> dict:
    """
    Score the predictions of a run.

    Args:
        lines (`Sequence[dict]`): Predictions, of any order.
        scorer (`str`, defaults to `"official"`): `"official"` or `"lmms_eval"`.

    Returns:
        `dict`: What `summarise` gives, `num_scenes`, `chance` (see [`chance_scores`]), `seconds` a question, `num_without_value` (numbers whose
        answer held no regressed value), `value_intervals` (see [`interval_report`]) and the `scorer`.
    """
    types = [line["question_type"] for line in lines]
    scores = [guarded_score(line["question_type"], line["prediction"], line["ground_truth"], scorer) for line in lines]
    numbers = [line for line in lines if not line.get("num_options")]
    return {
        "scorer": scorer,
        **summarise(types, scores, [line["scene"] for line in lines]),
        "num_scenes": len({line["scene"] for line in lines}),
        "chance": chance_scores(lines, scorer),
        "seconds": math.fsum(line["seconds"] for line in lines) / len(lines),
        "value_intervals": interval_report(lines, scorer),
        "num_without_value": sum(not line["values"] for line in numbers),
    }


def score_table(scores: dict) -> str:
    """
    Write scores as a Markdown table, with intervals and what guessing scores.

    Args:
        scores (`dict`): See [`score_lines`].

    Returns:
        `str`: The table; a task is above guessing where its interval is above both. Of fewer than ten scenes nothing is said, since
        a bootstrap over them is too narrow.
    """
    lines = [
        "| Task | Questions | Score | 95 % interval | Most frequent | At random | Above guessing |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    tasks, intervals, chance = scores["tasks"], scores["intervals"], scores["chance"]
    for task in [*(name for name in TASKS if name in tasks), *(name for name in tasks if name not in TASKS)]:
        count = sum(number for name, number in scores["n"].items() if task == "overall" or name.startswith(task))
        low, high = intervals[task]
        guesses = [chance[kind].get(task) for kind in ("frequency", "random") if kind in chance]
        cells = ["" if value is None else f"{value:.1f}" for value in [*guesses, None][:2]]
        is_above = low > max(value for value in guesses if value is not None)
        name = f"**{task}**" if task == "overall" else task
        lines.append(
            f"| {name} | {count} | {tasks[task]:.1f} | {low:.1f} to {high:.1f} | {' | '.join(cells)} | "
            f"{'too few scenes' if scores['num_scenes'] < MIN_SCENES else 'yes' if is_above else 'no'} |"
        )
    return "\n".join(lines)


def commit_of_code() -> str | None:
    """Return the commit that the package runs from, with a plus if files have changed; None outside of a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, perhaps inside of another project's checkout
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, str | None]:
    """Return versions that a reader needs to repeat a run."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    return {"geode": __version__, "commit": commit_of_code(), **versions}


def write_results(folder: str | Path, *, scorer: str = "official") -> dict:
    """
    Score the predictions in a folder, and write `scores.json`, `README.md` and, for a benchmark on the Hub, `.eval_results/`.

    Args:
        folder (`str` or `Path`): What a run left: `predictions.jsonl` and `run.json`.
        scorer (`str`, defaults to `"official"`): See [`score_lines`].

    Returns:
        `dict`: The scores.

    Raises:
        FileNotFoundError: If the folder holds no finished run.
        ValueError: If a file is damaged or incomplete, or the scorer is unknown.
    """
    folder = Path(folder)
    run, lines = read_finished(folder)
    if scorer not in SCORERS:
        raise ValueError(f"`scorer` must be one of {SCORERS}, got {scorer!r}.")
    scores = score_lines(lines, scorer)
    made = {"scored": datetime.now(UTC).isoformat(timespec="seconds"), **environment()}
    write_whole(folder / SCORES, json.dumps({"run": run, **scores, "made": made}, indent=1) + "\n")
    write_whole(folder / CARD_FILE, write_card(run, scores, made))
    if run["is_on_hub"] and run["control"] == "none":
        write_hub_entry(folder, run, scores, date=made["scored"])
    return scores


def write_card(run: dict, scores: dict, made: dict) -> str:
    """Return the text of the card; see [`write_results`]."""
    facts = {name.replace("_", " "): value for name, value in {**run, **made}.items() if value is not None}
    facts["numbers without a regressed value"] = scores["num_without_value"]
    values = ""
    if scores["value_intervals"] is not None:
        values = VALUES.format(table=interval_table(scores["value_intervals"], run["interval_coverage"]))
    return CARD.format(
        model=run["model"],
        benchmark=run["benchmark"],
        shown=CONTROL_NAMES[run["control"]],
        questions=run["questions"],
        scenes=run["scenes"],
        table=score_table(scores),
        values=values,
        notice="" if scores["is_official"] else INCOMPLETE,
        micro=scores["micro"],
        seconds=scores["seconds"],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        pre=PRE_PROMPT,
        number=NUMBER_POST_PROMPT,
        choice=CHOICE_POST_PROMPT,
        scorer=scores["scorer"],
    )


def write_hub_entry(folder: Path, run: dict, scores: dict, *, date: str) -> Path:
    """Write the overall score in the form in which the Hub reads it from a model's repository."""
    low, high = scores["intervals"]["overall"]
    entry = EvalResultEntry(
        dataset_id=run["benchmark"],
        task_id=run["subset"],
        value=round(scores["tasks"]["overall"], 2),
        dataset_revision=run["benchmark_revision"],
        date=date,
        notes=f"{scores['scorer']} scorer, {run['frames']} frames, 95 % interval {low:.1f} to {high:.1f}, {run['questions']} questions",
    )
    path = folder / ".eval_results" / f"{run['benchmark'].rpartition('/')[2]}.yaml"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return path


__all__ = ["chance_scores", "score_lines", "score_table", "write_card", "write_hub_entry", "write_results"]
