# SPDX-License-Identifier: Apache-2.0
"""
Intervals that hold the truth as often as they say: split-conformal calibration, and what a run's intervals were worth.

The head's spread says which values are less certain than others. How wide an interval must be is measured on scenes that were not
trained on: the factor under which the wanted share of their truths lies inside. For values that are exchangeable with those, the
share is then met whatever the spread is worth (Vovk et al., 2005; Lei et al., 2018). Questions about one room are not
independent, so many rooms are needed, not only many questions.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

import torch

from geode.configuration.configuration_geode import GeodeConfig
from geode.evaluation.vsi_bench.vsi_bench import guarded_score, to_float
from geode.modeling_geode.answers_geode import convert_to_si
from geode.modeling_geode.regression_geode import encode_values, gaussian_quantile


MIN_WIDTH = 1e-9  # in codec space: float32 may round both ends to one number
ROUNDING = 1e-9  # 10 times 0.7 is a little more than 7
SHARES = (1.0, 0.75, 0.5, 0.25)


def conformal_quantile(errors: Sequence[float], coverage: float) -> float:
    """
    Return what a new error stays below as often as is wanted.

    Args:
        errors (`Sequence[float]`): Errors in units of their spread.
        coverage (`float`): How often, between 0 and 1.

    Returns:
        `float`: The smallest error but `ceil((n + 1) coverage) - 1`, so that the share is met for a small `n` as well.

    Raises:
        ValueError: If there are too few errors for this coverage.

    Example:
    ```python
    >>> conformal_quantile([0.1, 0.4, 0.2, 0.3], 0.75)
    0.4

    ```
    """
    rank = math.ceil((len(errors) + 1) * coverage - ROUNDING)
    if rank > len(errors):
        needed = math.ceil(coverage / (1.0 - coverage) - ROUNDING)
        raise ValueError(
            f"Intervals of coverage {coverage} need {needed} values or more, got {len(errors)}. Ask about more scenes, or ask for "
            "a smaller coverage."
        )
    return sorted(errors)[rank - 1]


def measure_scales(lines: Sequence[dict], config: GeodeConfig, *, coverage: float | None = None) -> dict[str, dict]:
    """
    Measure how wide the intervals of a model must be.

    Args:
        lines (`Sequence[dict]`): Predictions of `geode eval` on scenes that were not trained on.
        config ([`GeodeConfig`]): The model that made them, with the coverage and the scales that it had.
        coverage (`float`, *optional*): How often an interval shall hold the truth; the default is the model's `interval_coverage`.

    Returns:
        `dict[str, dict]`: For each control token of kind `"scalar"` that was answered with: `scale`, its new entry in
        `drh_config.interval_scales`, and the `num_values` and `num_scenes` that it was measured on.

    Raises:
        ValueError: If no answer has an interval, or a token has too few.
    """
    errors, scenes = defaultdict(list), defaultdict(set)
    for line in lines:
        truth, value = to_float(line["ground_truth"]), _scored_value(line)
        if value is None:
            continue
        entry = config.control_tokens[value["token"]]
        numbers = [
            [number] for number in (convert_to_si(truth, line["unit"]), value["si_value"], *value["si_interval"])
        ]
        true, found, low, high = encode_values(torch.tensor(numbers).double(), entry).flatten().tolist()
        errors[value["token"]].append(2.0 * abs(true - found) / max(high - low, MIN_WIDTH))
        scenes[value["token"]].add(line["scene"])
    if not errors:
        raise ValueError(
            "No answer has an interval. Ask a model with `drh_config.uncertainty=True` about numbers, with `geode eval`."
        )
    drh = config.drh_config
    coverage = drh.interval_coverage if coverage is None else coverage
    # Errors are in half widths of the old coverage, a scale in those of the new one.
    ratio = gaussian_quantile(drh.interval_coverage) / gaussian_quantile(coverage)
    return {
        token: {
            "scale": drh.interval_scales.get(token, 1.0) * ratio * conformal_quantile(found, coverage),
            "num_values": len(found),
            "num_scenes": len(scenes[token]),
        }
        for token, found in sorted(errors.items())
    }


def interval_report(lines: Sequence[dict], scorer: str = "official") -> dict | None:
    """
    Say what the intervals of a run were worth.

    Args:
        lines (`Sequence[dict]`): Predictions.
        scorer (`str`, defaults to `"official"`): See `score`.

    Returns:
        `dict`: By question type and `overall`: `n`, `coverage` (the share of truths within) and `half_width` (the median, as a share
        of the value). `answered`: for some shares of the answers, those with the relatively narrowest intervals, their mean
        relative accuracy in percent. None if there are no intervals.
    """
    rows = defaultdict(list)
    for line in lines:
        value = _scored_value(line)
        if value is not None:
            low, high = line["interval"]
            truth = to_float(line["ground_truth"])
            half, prediction = (high - low) / 2.0, float(line["prediction"])
            width = half / abs(prediction) if prediction else math.inf
            score = guarded_score(line["question_type"], line["prediction"], line["ground_truth"], scorer)
            rows[line["question_type"]].append((width, low <= truth <= high, score))
    if not rows:
        return None
    everything = sorted((row for found in rows.values() for row in found), key=lambda row: row[0])
    answered = {}
    for share in SHARES:
        kept = everything[: max(1, round(share * len(everything)))]
        answered[f"{share:.0%}"] = 100.0 * statistics.mean(score for _, _, score in kept)
    types = {name: _summary(found) for name, found in sorted(rows.items())}
    return {"types": {**types, "overall": _summary(everything)}, "answered": answered}


def _summary(rows: Sequence[tuple]) -> dict[str, float]:
    return {
        "n": len(rows),
        "coverage": statistics.mean(float(is_inside) for _, is_inside, _ in rows),
        "half_width": statistics.median(width for width, _, _ in rows),
    }


def _scored_value(line: dict) -> dict | None:
    """The regressed number of a line that was scored, where it has an interval and the truth is a measure."""
    truth = to_float(line["ground_truth"])
    if line.get("interval") is None or truth is None or not truth > 0:
        return None
    return next(value for value in line["values"] if value["kind"] == "scalar")


def interval_table(report: dict, coverage: float) -> str:
    """
    Write what a run's intervals were worth as Markdown.

    Args:
        report (`dict`): See [`interval_report`].
        coverage (`float`): What the model promises.

    Returns:
        `str`: Two tables.
    """
    lines = [
        f"| Values | Questions | Within the {coverage:.0%} interval | Half its width, median |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in report["types"].items():
        lines.append(f"| {name} | {found['n']} | {found['coverage']:.1%} | +-{found['half_width']:.0%} |")
    lines += ["", "| Answered, the relatively narrowest intervals first | Mean relative accuracy |", "| --- | --- |"]
    lines += [f"| {share} | {score:.1f} |" for share, score in report["answered"].items()]
    return "\n".join(lines)


__all__ = ["conformal_quantile", "interval_report", "interval_table", "measure_scales"]
