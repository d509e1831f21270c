# SPDX-License-Identifier: Apache-2.0
"""
Ask a model every question of a benchmark: each scene is encoded once, its questions are answered in batches.

Predictions are written as they come, one line a question, so that an interrupted run goes on; several processes (`accelerate
launch`) share the scenes. Batches never mix scenes and do not depend on the number of processes, so neither do answers.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from geode.data.processes import process_state
from geode.data.whole_files import write_whole, writing
from geode.evaluation.asking import ask, geometry_path, show_video
from geode.evaluation.benchmark import Benchmark, Question
from geode.evaluation.prediction_files import PREDICTIONS, RUN, read_lines, read_run, text_of, write_run
from geode.modeling_geode.answers_geode import Answer, Measurement, convert_from_si, format_number, interval_in
from geode.modeling_geode.scene_geode import SceneGeometry


logger = logging.getLogger(__name__)

CONTROLS = ("none", "blind", "no_geometry", "shuffled_geometry")
MAX_NEW_TOKENS = 16  # as VSI-Bench's task file has it


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """
    How a model is asked.

    Args:
        control (`str`, defaults to `"none"`): `"blind"` shows nothing, `"no_geometry"` the frames alone, and
            `"shuffled_geometry"` the frames with the geometry of the next scene.
        geometry (`str`, defaults to `"geometry/{scene}"`): Where a saved geometry is below the media root, with `{scene}`,
            `{stem}` and `{parent}` of the video in it. Where there is none, the model's reconstructor makes it.
        num_frames (`int`, *optional*): Frames that the language model sees; the default is the processor's.
        batch_size (`int`, defaults to 16): Questions about one scene at a time.
        max_new_tokens (`int`, defaults to 16): Longest answer. Decoding is greedy.
    """

    control: str = "none"
    geometry: str = "geometry/{scene}"
    num_frames: int | None = None
    batch_size: int = 16
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self):
        if self.control not in CONTROLS:
            raise ValueError(f"`control` must be one of {CONTROLS}, got {self.control!r}.")
        for name in ("num_frames", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


def scored_prediction(answer: Answer, question: Question) -> str:
    """
    Return what is scored of an answer: the first regressed value in the unit that is asked for, or else the text.

    Args:
        answer ([`Answer`]): The model's answer.
        question ([`Question`]): The question.

    Returns:
        `str`: For a number a plain decimal without its unit; a count is whole.
    """
    record, found = question.record, _scored_value(answer, question)
    if found is None:
        return answer.text.strip()
    return format_number(convert_from_si(found.si_value, record.unit), record.unit)


def scored_interval(answer: Answer, question: Question) -> tuple[float, float] | None:
    """
    Return the interval of what is scored.

    Args:
        answer ([`Answer`]): The model's answer.
        question ([`Question`]): The question.

    Returns:
        `tuple[float, float]`, *optional*: In the unit that is asked for. None without a regressed number or an interval of it.
    """
    found, unit = _scored_value(answer, question), question.record.unit
    if found is None or found.si_interval is None:
        return None
    return interval_in(unit, convert_from_si(found.si_value, unit), *found.si_interval)


def _scored_value(answer: Answer, question: Question) -> Measurement | None:
    scalars = [value for value in answer.values if value.kind == "scalar"]
    return scalars[0] if scalars and question.record.kind == "number" else None


class Evaluator:
    """
    Answers the questions of a benchmark, scene by scene.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model, on its device, in evaluation mode.
        processor ([`GeodeProcessor`]): Its processor.
        benchmark ([`Benchmark`]): The questions.
        options ([`EvalOptions`], *optional*): How they are asked.

    Raises:
        ValueError: If geometry is to be exchanged, and there is one scene.
    """

    def __init__(self, model, processor, benchmark: Benchmark, options: EvalOptions | None = None):
        self.model, self.processor, self.benchmark = model, processor, benchmark
        self.options = options or EvalOptions()
        media = list(benchmark.scenes())
        if self.options.control == "shuffled_geometry" and len(media) < 2:
            raise ValueError(
                f"`control='shuffled_geometry'` needs two scenes or more, and {benchmark.name} has one here."
            )
        self._next = dict(zip(media, [*media[1:], *media[:1]], strict=True))

    def geometry_of(self, question: Question) -> SceneGeometry | None:
        """
        Return the geometry that is shown with a question's video.

        Raises:
            FileNotFoundError: If there is none, and the model cannot make it.
        """
        is_shuffled = self.options.control == "shuffled_geometry"
        medium = Path(self._next[question.record.media] if is_shuffled else question.record.media)
        path = geometry_path(self.benchmark.media_root, self.options.geometry, medium)
        if path.exists():
            return SceneGeometry.load(path)
        if self.model.config.reconstructor_config is None or is_shuffled:
            raise FileNotFoundError(
                f"There is no geometry {path}, and {'another scene is shown' if is_shuffled else 'the model has no reconstructor'}. "
                "Make it with `geode reconstruct`, name a pattern with `geometry`, or show the frames alone with `no_geometry`."
            )
        return None

    def answer_scene(self, questions: Sequence[Question]) -> list[dict]:
        """
        Answer questions about one video.

        Args:
            questions (`Sequence[Question]`): All questions of the video.

        Returns:
            `list[dict]`: A line of the predictions for each.
        """
        start, lines = time.perf_counter(), []
        parts, scene = self._shown(questions[0])
        encoding_s = time.perf_counter() - start
        size = self.options.batch_size
        for first in range(0, len(questions), size):
            batch, start = questions[first : first + size], time.perf_counter()
            answers = ask(
                self.model,
                self.processor,
                [question.record.prompt for question in batch],
                parts=parts,
                scene=scene,
                max_new_tokens=self.options.max_new_tokens,
                **self._view(),
            )
            seconds = encoding_s / len(questions) + (time.perf_counter() - start) / len(batch)
            lines += [prediction_line(*pair, seconds) for pair in zip(batch, answers, strict=True)]
        return lines

    def _shown(self, question: Question) -> tuple[list[dict], object]:
        """The parts of the chat that show its video, and the encoded scene that they name."""
        options = self.options
        if options.control == "blind":
            return [], None
        video = self.benchmark.media_root / question.record.media
        if not video.exists():
            raise FileNotFoundError(
                f"There is no video {video}. `media_root` must be the folder with DATASET/SCENE.mp4 in it."
            )
        geometry = self.geometry_of(question) if options.control != "no_geometry" else None
        return show_video(self.model, self.processor, video, geometry=geometry, **self._view())

    def _view(self) -> dict:
        use_geometry = self.options.control not in ("blind", "no_geometry")
        return {"use_geometry": use_geometry, "num_frames": self.options.num_frames}


def prediction_line(question: Question, answer: Answer, seconds: float) -> dict:
    """
    Return what is kept of an answer: a line of the predictions.

    Args:
        question ([`Question`]): The question.
        answer ([`Answer`]): The model's answer.
        seconds (`float`): How long it took.

    Returns:
        `dict`: Plain types. `prediction`, `interval` and `ground_truth` are in the question's `unit`.
    """
    record = question.record
    return {
        "id": record.uid,
        "scene": record.media,
        "question_type": record.question_type,
        "prediction": scored_prediction(answer, question),
        "interval": scored_interval(answer, question),
        "unit": record.unit,
        "ground_truth": question.ground_truth,
        "num_options": question.num_options,
        **answer.to_dict(),
        "seconds": round(seconds, 4),
    }


def predict(evaluator: Evaluator, out: str | Path, *, run: dict, show_progress: bool = True) -> list[dict] | None:
    """
    Answer what is not answered yet, in every process of a launch.

    Args:
        evaluator ([`Evaluator`]): The model and its questions.
        out (`str` or `Path`): Folder of the results: new, or of the same run.
        run (`dict`): What decides the answers; it is kept in `run.json`.
        show_progress (`bool`, defaults to `True`): Show a bar over the scenes of the first process.

    Returns:
        `list[dict]`: All predictions in the order of the benchmark, as in `predictions.jsonl`; None but in the main process.

    Raises:
        ValueError: If the folder holds another run.
    """
    state, folder = process_state(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        check_run(folder, run)
    state.wait_for_everyone()
    own = folder / f"predictions-{state.process_index}.jsonl"
    done = {line["id"]: line for path in sorted(folder.glob("predictions*.jsonl")) for line in read_lines(path)}
    _drop_broken_line(own)
    state.wait_for_everyone()  # nobody writes before all have read
    scenes = list(evaluator.benchmark.scenes().values())[state.process_index :: state.num_processes]
    hidden = not (show_progress and state.is_main_process)
    with writing(own), own.open("a", encoding="utf-8") as file:
        for questions in tqdm(scenes, desc="Scenes", unit="scene", disable=hidden):
            if all(question.record.uid in done for question in questions):
                continue
            lines = evaluator.answer_scene(questions)
            file.write(text_of(lines))
            file.flush()
            os.fsync(file.fileno())
    state.wait_for_everyone()
    return _merge(evaluator.benchmark, folder) if state.is_main_process else None


def check_run(folder: Path, run: dict) -> None:
    """
    Keep what decides the results in a folder, and refuse to go on with those of another run.

    Args:
        folder (`Path`): Where the results are; `run.json` in it says of what.
        run (`dict`): What decides them, in types of JSON.

    Raises:
        ValueError: If the folder holds another run; what differs is named.
    """
    if not (folder / RUN).is_file():
        predictions = sorted(path.name for path in folder.glob("predictions*.jsonl"))
        if predictions:
            raise ValueError(
                f"{folder} holds {predictions[0]} and no {RUN}, so that nobody can say what it is of. Name another folder."
            )
        write_run(folder, run)
    found = read_run(folder)
    different = sorted(name for name in found.keys() | run.keys() if found.get(name) != run.get(name))
    if different:
        pairs = "; ".join(f"{name}: {found.get(name)!r} there, {run.get(name)!r} now" for name in different)
        raise ValueError(f"{folder} holds another run ({pairs}). Ask for the same, or name another folder.")


def _drop_broken_line(path: Path) -> None:
    if path.is_file():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)


def _merge(benchmark: Benchmark, folder: Path) -> list[dict]:
    """Put the parts of all processes into one file, in the order of the benchmark."""
    parts = sorted(folder.glob("predictions-*.jsonl"))
    found = {line["id"]: line for path in [folder / PREDICTIONS, *parts] for line in read_lines(path)}
    lines = [found[question.record.uid] for question in benchmark.questions]
    write_whole(folder / PREDICTIONS, text_of(lines))
    for path in parts:
        path.unlink()
    return lines


def run_facts(model, processor, benchmark: Benchmark, options: EvalOptions, *, model_name: str, digest: str) -> dict:
    """
    Return what decides the answers of a run.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.
        benchmark ([`Benchmark`]): The questions.
        options ([`EvalOptions`]): How they are asked.
        model_name (`str`): Path or Hub id of the model.
        digest (`str`): Commit or digest of its weights.

    Returns:
        `dict`: Plain types.
    """
    drh = model.config.drh_config
    return {
        "model": model_name,
        "model_revision": digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "benchmark": benchmark.name,
        "benchmark_revision": benchmark.revision,
        "is_on_hub": benchmark.is_on_hub,
        "split": benchmark.split,
        "subset": benchmark.subset,
        "questions": len(benchmark.questions),
        "scenes": len(benchmark.scenes()),
        "control": options.control,
        "geometry": options.geometry,
        "frames": options.num_frames or processor.num_frames,
        "geometry_frames": processor.num_geometry_frames,
        "rationale_tokens": processor.num_rationale_tokens,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "interval_coverage": drh.interval_coverage if drh.uncertainty else None,
    }


__all__ = [
    "CONTROLS",
    "EvalOptions",
    "Evaluator",
    "check_run",
    "predict",
    "prediction_line",
    "run_facts",
    "scored_interval",
    "scored_prediction",
]
