# SPDX-License-Identifier: Apache-2.0
"""The files of a run: `run.json`, which says what decides the answers, and a line for each answer, with a checksum."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from geode.data.whole_files import write_whole
from geode.modeling_geode.scene_files_geode import sealed, unsealed


PREDICTIONS, RUN = "predictions.jsonl", "run.json"
_LINE_FACTS = ("question_type", "prediction", "ground_truth")
_RUN_FACTS = frozenset(("model", "model_revision", "benchmark", "control", "is_on_hub", "questions", "scenes"))


def text_of(lines: Sequence[dict]) -> str:
    """
    Write lines as they stand in a file of predictions.

    Args:
        lines (`Sequence[dict]`): Answers, see `prediction_line`.

    Returns:
        `str`: A line of JSON for each; its `crc32` is that of the rest.
    """
    return "".join(json.dumps(sealed(line)) + "\n" for line in lines)


def read_lines(path: Path) -> list[dict]:
    """
    Read the whole lines of a file that may end in the middle of one.

    Args:
        path (`Path`): A file of predictions; none is one without lines.

    Returns:
        `list[dict]`: The lines, without their checksums.

    Raises:
        ValueError: If a line but the last is broken or no answer, or one has another checksum than its content.
    """
    text = path.read_bytes() if path.is_file() else b""
    lines = []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        remedy = "Remove it, and the same `geode eval` answers it again."
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Line {number} of {path} is no JSON: {error}. {remedy}") from error
        if not isinstance(found, dict) or "id" not in found:
            raise ValueError(f"Line {number} of {path} must be an answer of `geode eval`, got {line[:80]!r}. {remedy}")
        lines.append(unsealed(found, f"Line {number} of {path} is damaged. {remedy}"))
    return lines


def read_run(folder: Path) -> dict:
    """
    Read what decides the answers of a run.

    Args:
        folder (`Path`): Folder of the results.

    Returns:
        `dict`: See `run_facts`.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / RUN
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged, so that nobody can say what the files beside it are of: {error}. Remove the folder, and run "
            "the same again."
        ) from error


def read_finished(folder: Path) -> tuple[dict, list[dict]]:
    """
    Read a finished run.

    Args:
        folder (`Path`): Folder of the results.

    Returns:
        `tuple[dict, list[dict]]`: See [`read_run`] and [`read_lines`].

    Raises:
        FileNotFoundError: If the folder holds no finished run.
        ValueError: If a file is damaged or of something else, or lines are missing or there twice.
    """
    for name in (PREDICTIONS, RUN):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must hold {name} of a finished run. Run `geode eval --out {folder}` first."
            )
    run, lines = read_run(folder), read_lines(folder / PREDICTIONS)
    if not isinstance(run, dict) or not _RUN_FACTS <= run.keys():
        raise ValueError(
            f"{folder / RUN} must be that of a run of `geode eval`, got {run!r:.80}. Run it again, into another folder."
        )
    lacking = next((line for line in lines if not line.keys() >= set(_LINE_FACTS)), None)
    if lacking is not None:
        raise ValueError(
            f"Every line of {folder / PREDICTIONS} must have {sorted(_LINE_FACTS)}, and that of {lacking['id']!r} has not. Remove "
            "it, and run again."
        )
    repeated = [uid for uid, count in Counter(line["id"] for line in lines).items() if count > 1]
    if repeated or len(lines) != run["questions"]:
        what = f"has {repeated[0]!r} more than once" if repeated else "ends too early, or lines of it were removed"
        raise ValueError(
            f"{folder / PREDICTIONS} must have one line for each of {run['questions']} questions, got {len(lines)}: it {what}. "
            "The same `geode eval` puts it right, without asking again what is there."
        )
    return run, lines


def write_run(folder: Path, run: dict) -> None:
    """
    Keep what decides the answers of a run.

    Args:
        folder (`Path`): Folder of the results.
        run (`dict`): Plain types.
    """
    write_whole(folder / RUN, json.dumps(run, indent=1) + "\n")


__all__ = ["PREDICTIONS", "RUN", "read_finished", "read_lines", "read_run", "text_of", "write_run"]
