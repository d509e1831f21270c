# SPDX-License-Identifier: Apache-2.0
"""What `geode eval` and `geode calibrate` do: ask a model a benchmark's questions, score the answers, set its intervals."""

import json
import os
from pathlib import Path

from geode.commands import load_checkpoint
from geode.data.processes import process_state
from geode.data.whole_files import write_whole, writing
from geode.evaluation.benchmark import load_benchmark
from geode.evaluation.calibration import interval_table, measure_scales
from geode.evaluation.prediction_files import PREDICTIONS, read_finished, read_run
from geode.evaluation.results import score_table, write_results
from geode.evaluation.runner import EvalOptions, Evaluator, predict, run_facts
from geode.modeling_geode.scene_encoding_geode import digest_of


def evaluate_model(
    benchmark: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    revision: str | None = None,
    split: str = "test",
    subset: str = "full",
    benchmark_revision: str | None = None,
    media_root: str | os.PathLike | None = None,
    max_scenes: int | None = None,
    scorer: str = "official",
    **options,
) -> dict | None:
    """
    Ask a model a benchmark's questions, write predictions, scores and a card, and print the table.

    Args:
        benchmark (`str` or `os.PathLike`): See `load_benchmark`.
        out (`str` or `os.PathLike`): Folder of the results. One with the same run goes on where it stopped.
        model (`str` or `os.PathLike`, *optional*): A checkpoint's folder or its name on the Hub; the default is the tiny one.
        revision (`str`, *optional*): Branch, tag or commit of a checkpoint on the Hub.
        split (`str`, defaults to `"test"`): See `load_benchmark`.
        subset (`str`, defaults to `"full"`): See `load_benchmark`.
        benchmark_revision (`str`, *optional*): Its `revision`.
        media_root (`str` or `os.PathLike`, *optional*): See `load_benchmark`.
        max_scenes (`int`, *optional*): See `load_benchmark`.
        scorer (`str`, defaults to `"official"`): See `score_lines`.
        **options: Fields of [`EvalOptions`].

    Returns:
        `dict`: The scores; None but in the main process of a launch.

    Raises:
        FileNotFoundError: If checkpoint, benchmark, a video or a geometry is missing.
        ValueError: If `out` holds another run, or an option is unknown.
    """
    settings = EvalOptions(**options)
    found = load_benchmark(
        benchmark,
        split=split,
        subset=subset,
        revision=benchmark_revision,
        media_root=media_root,
        max_scenes=max_scenes,
    )
    checkpoint = load_checkpoint(model, revision)
    network = checkpoint.model.to(process_state().device).eval()
    names = {"model_name": str(model or "geode/tiny"), "digest": model_revision(network)}
    facts = run_facts(network, checkpoint.processor, found, settings, **names)
    evaluator = Evaluator(network, checkpoint.processor, found, settings)
    if predict(evaluator, out, run=facts) is None:
        return None
    return report(out, scorer=scorer)


def model_revision(model) -> str:
    """Return the commit of a model of the Hub, or a digest of its weights and its configuration."""
    # Two models may have the same weights and, say, regress another state.
    settings = {"config": json.loads(model.config.to_json_string())}
    return getattr(model.config, "_commit_hash", None) or digest_of(model.state_dict(), settings)


def report(out: str | os.PathLike, *, scorer: str = "official") -> dict:
    """
    Score the predictions in a folder, write its card, and print the table. Needs no model.

    Args:
        out (`str` or `os.PathLike`): Folder of a finished run.
        scorer (`str`, defaults to `"official"`): See `score_lines`.

    Returns:
        `dict`: The scores.
    """
    scores = write_results(out, scorer=scorer)
    print(score_table(scores))
    if scores["value_intervals"] is not None:
        run = read_run(Path(out))
        print(f"\n{interval_table(scores['value_intervals'], run['interval_coverage'])}\n")
    print(f"card: {Path(out) / 'README.md'}")
    return scores


def calibrate_model(
    predictions: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike,
    revision: str | None = None,
    coverage: float | None = None,
) -> dict:
    """
    Measure how wide the intervals of a model must be, and save the model with that.

    Args:
        predictions (`str` or `os.PathLike`): What `geode eval` left of scenes that the model was not trained on.
        out (`str` or `os.PathLike`): Folder of the calibrated model; `calibration.json` in it says what it was measured on.
        model (`str` or `os.PathLike`): The model that gave the predictions.
        revision (`str`, *optional*): Branch, tag or commit of a checkpoint on the Hub.
        coverage (`float`, *optional*): How often an interval shall hold the truth; the default is what the model promises.

    Returns:
        `dict`: What is in `calibration.json`.

    Raises:
        FileNotFoundError: If there are no predictions.
        ValueError: If they are of another model or a control, too few have intervals, or `coverage` is no share.
    """
    if coverage is not None and not 0.0 < coverage < 1.0:
        raise ValueError(f"`coverage` must lie between 0 and 1, got {coverage}.")
    folder = Path(predictions)
    if not (folder / PREDICTIONS).is_file():
        raise FileNotFoundError(
            f"{folder} must hold {PREDICTIONS} of a finished run. Run `geode eval --split validation --out {folder}` first."
        )
    run, lines = read_finished(folder)
    checkpoint = load_checkpoint(model, revision)
    network, found = checkpoint.model, model_revision(checkpoint.model)
    if run["model_revision"] != found or run["control"] != "none":
        raise ValueError(
            f"The predictions in {folder} must be of {model} ({found}) and no control, got {run['model']} "
            f"({run['model_revision']}) and {run['control']!r}. Ask this model with `geode eval`."
        )
    scales = measure_scales(lines, network.config, coverage=coverage)
    drh = network.config.drh_config
    drh.interval_coverage = drh.interval_coverage if coverage is None else coverage
    drh.interval_scales = {**drh.interval_scales, **{token: entry["scale"] for token, entry in scales.items()}}
    names = ("model", "model_revision", "benchmark", "benchmark_revision", "split", "subset")
    facts = {"coverage": drh.interval_coverage, "tokens": scales, **{name: run[name] for name in names}}
    with writing(out):
        network.save_pretrained(out)
        checkpoint.processor.save_pretrained(out)
        write_whole(Path(out) / "calibration.json", json.dumps(facts, indent=1) + "\n")
    for token, entry in scales.items():
        print(
            f"{token}: {entry['scale']:.3f} times a Gaussian's {drh.interval_coverage:.0%} interval "
            f"({entry['num_values']} values in {entry['num_scenes']} scenes)"
        )
    return facts
