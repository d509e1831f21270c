# SPDX-License-Identifier: Apache-2.0
"""What `geode ask` and `geode export` do, and the steps they share with `geode demo`."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from geode import tiny_checkpoint
from geode.data.whole_files import is_free, whole_folder
from geode.hub_cards.facts import FACTS, read_facts
from geode.modeling_geode.answers_geode import Answer, format_number
from geode.modeling_geode.checked_files_geode import check_tensors_file, read_json
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.publishing import save_model
from geode.trainers.licence_texts import copy_texts, recorded_texts
from geode.vggt_export import export_vggt, find_origin


GEOMETRY_FOLDER = "geometry"
MAX_NEW_TOKENS = 64


class Checkpoint(NamedTuple):
    """A model with the processor that belongs to it."""

    model: GeodeForConditionalGeneration
    processor: GeodeProcessor


class TimedAnswer(NamedTuple):
    """An answer, and the seconds from the video file to it."""

    answer: Answer
    seconds: float


def ask_video(
    video: str | os.PathLike,
    questions: Sequence[str],
    *,
    model: str | os.PathLike | None = None,
    revision: str | None = None,
    geometry: str | os.PathLike | None = None,
    use_geometry: bool = True,
    num_frames: int | None = None,
    as_json: bool = False,
    abstain_above: float | None = None,
) -> None:
    """
    Print the answers to questions about a video, one line each.

    Without geometry (neither given, nor in a folder `geometry` beside the video, nor from a reconstructor in the model) the
    answers come from the frames alone, and a notice on standard error says so.

    Args:
        video (`str` or `os.PathLike`):
            A video file, or whatever `load_video_frames` takes as a path.
        questions (`Sequence[str]`):
            The questions; each is answered on its own, and the video is encoded once for all.
        model (`str` or `os.PathLike`, *optional*):
            A checkpoint's folder or its name on the Hub; the default is the tiny one of this package.
        revision (`str`, *optional*):
            Branch, tag or commit of a checkpoint on the Hub.
        geometry (`str` or `os.PathLike`, *optional*):
            The folder of a saved `SceneGeometry`.
        use_geometry (`bool`, defaults to `True`):
            False answers from the frames alone.
        num_frames (`int`, *optional*):
            Frames that the language model sees; the default is the processor's.
        as_json (`bool`, defaults to `False`):
            Print a JSON object per line instead of `answer: ...`; its `seconds` are from the video file to all answers.
        abstain_above (`float`, *optional*):
            Answer "unknown" where the interval is wider than plus or minus this share of the number.

    Raises:
        FileNotFoundError: If the video, the geometry or the checkpoint is missing.
        ValueError: If one of them cannot be read, or `geometry` is given and switched off.
    """
    if not Path(video).exists():
        raise FileNotFoundError(f"`video` must be a file, and there is none at {str(video)!r}.")
    if geometry is not None and not use_geometry:
        raise ValueError("`geometry` is given and `use_geometry` is false. Choose one.")
    if geometry is not None and not Path(geometry).is_dir():
        raise FileNotFoundError(f"`geometry` must be a folder, and there is none at {str(geometry)!r}.")
    checkpoint = load_checkpoint(model, revision)
    if use_geometry and geometry is None:
        geometry = find_geometry(video)
        if geometry is None and checkpoint.model.config.reconstructor_config is None:
            print(
                f"geode: notice: no geometry: there is no folder {GEOMETRY_FOLDER!r} beside the video, and this model has "
                "no reconstructor. It answers from the frames alone; name a folder with --geometry.",
                file=sys.stderr,
            )
            use_geometry = False
    start = time.perf_counter()
    answers = answer_questions(
        checkpoint,
        video,
        questions,
        geometry=geometry,
        use_geometry=use_geometry,
        num_frames=num_frames,
        abstain_above=abstain_above,
    )
    seconds = round(time.perf_counter() - start, 3)
    for question, answer in zip(questions, answers, strict=True):
        if as_json:
            print(json.dumps({"question": question, **answer.to_dict(), "seconds": seconds}), flush=True)
        else:
            print(f"answer: {spoken(answer)}", flush=True)


def spoken(answer: Answer) -> str:
    """
    Return an answer on one line, with its unit where it is nothing but a number.

    Example:
        >>> from geode.modeling_geode.answers_geode import Answer, Measurement
        >>> spoken(Answer(text="2.31", values=[Measurement("<REG>", 2.31, "m", 2.31)], boxes=[]))
        '2.31 m'
        >>> spoken(Answer(text="2.31", values=[Measurement("<REG>", 2.31, "m", 2.31, interval=(2.0, 2.7))], boxes=[]))
        '2.31 m (2.00 to 2.70)'
    """
    text = " ".join(answer.text.split())
    if len(answer.values) != 1 or text != answer.values[0].text:
        return text
    (value,) = answer.values
    if value.is_withheld:
        return text
    text += f" {value.unit}" if value.unit not in (None, "count") else ""
    if value.kind == "scalar" and value.interval is not None:
        low, high = (format_number(end, value.unit) for end in value.interval)
        text += f" ({low} to {high})"
    return text


def export_model(
    save_directory: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    revision: str | None = None,
    license_id: str | None = None,
    facts: str | os.PathLike | None = None,
    results: Sequence[str | os.PathLike] = (),
    repo_id: str | None = None,
) -> None:
    """
    Save a model and its processor as a folder for the Hub, with their code, card, licence and hashes, and print its path.

    Public VGGT weights are converted. Nothing is under its name before all is written, whatever stops the writer, and the same
    call begins anew after a kill.

    Args:
        save_directory (`str` or `os.PathLike`):
            A folder that is new or empty, so that nothing else is published with it.
        model (`str` or `os.PathLike`, *optional*):
            A checkpoint of GEODE, see [`ask_video`], or of VGGT: in our form, as published, or a file as published.
        revision (`str`, *optional*):
            See [`ask_video`].
        license_id (`str`, *optional*):
            Licence of VGGT weights, for their card, where it is not known from `model`.
        facts (`str` or `os.PathLike`, *optional*):
            What the card of a GEODE model must state, see `docs/hub.md`. Those of the tiny checkpoint are known.
        results (`Sequence[str | os.PathLike]`):
            Folders that `geode eval` has written for this model; those of the tiny one are shipped with it.
        repo_id (`str`, *optional*):
            Its name on the Hub, for the snippet of the card.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the folder holds something, or the checkpoint is of another kind or incomplete.
        NotADirectoryError: If there is a file of this name.
    """
    folder = Path(save_directory)
    if not is_free(folder):
        raise ValueError(f"`save_directory` must be new or empty, and {str(folder)!r} is not. Choose another one.")
    origin = None if model is None else find_origin(model, revision)
    if origin is not None and origin.is_vggt:
        if facts is not None or results:
            raise ValueError(
                "`facts` and `results` are for the card of a GEODE model, and this is VGGT. Leave them out."
            )
        with whole_folder(folder) as work:
            known_license = export_vggt(work, origin, license_id=license_id)
        if known_license is None:
            print(
                "geode: notice: the licence of the weights is not known, and the card says so; state it with --license.",
                file=sys.stderr,
            )
        print(f"exported: {folder}")
        return
    if license_id is not None:
        raise ValueError(f"`license_id` is for the card of VGGT weights, got {license_id!r} with GEODE. Leave it out.")
    if facts is None and not _is_tiny(model):
        raise ValueError(
            f"`facts` must name a YAML file for the card, got none: no file of {os.fspath(model)!r} tells data and intended use. "
            "docs/hub.md shows one. For a folder with code and no card, `save_pretrained` is enough."
        )
    parts = () if origin is None else origin.parts
    if facts is None:
        facts, results = FACTS / "geode_tiny.yaml", results or [tiny_checkpoint() / "results"]
    stated = read_facts(facts, "model", parts=parts)
    checkpoint = load_checkpoint(model, revision)
    with whole_folder(folder) as work:
        if model is not None:
            for texts in recorded_texts(os.fspath(model), revision=revision).values():
                copy_texts({name: path for name, path in texts.items() if path is not None}, work)
        save_model(work, checkpoint, stated, results=results, repo_id=repo_id)
    print(f"exported: {folder}")


def _is_tiny(model: str | os.PathLike | None) -> bool:
    return model is None or Path(model).resolve() == tiny_checkpoint().resolve()


def load_checkpoint(model: str | os.PathLike | None = None, revision: str | None = None) -> Checkpoint:
    """
    Load a model and its processor.

    Args:
        model (`str` or `os.PathLike`, *optional*):
            See [`ask_video`].
        revision (`str`, *optional*):
            See [`ask_video`].

    Returns:
        [`Checkpoint`]: Both, the model in eval mode.

    Raises:
        FileNotFoundError: If `model` is a path and holds no checkpoint.
        ValueError: If one of its files is damaged.
    """
    source = str(model if model is not None else tiny_checkpoint())
    is_path = source.startswith((".", "/", "~")) or Path(source).exists()
    if is_path and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"`model` must be a checkpoint's folder, and {source!r} holds no config.json.")
    if is_path:
        check_files(Path(source))
    logging.disable_progress_bar()
    return Checkpoint(
        GeodeForConditionalGeneration.from_pretrained(source, revision=revision or "main"),
        GeodeProcessor.from_pretrained(source, revision=revision or "main"),
    )


def check_files(folder: Path) -> None:
    """
    Raise unless the files of a checkpoint are whole: the libraries that read them say less of what is wrong.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        ValueError: If one does not.
    """
    for path in sorted(folder.glob("*.json")):
        if not isinstance(read_json(path), dict):
            raise ValueError(f"{path} must hold a JSON object. Fetch the checkpoint again.")
    for path in sorted(folder.glob("*.safetensors")):
        check_tensors_file(path)


def find_geometry(video: str | os.PathLike) -> Path | None:
    """Return the folder `geometry` beside a video, or None where there is none."""
    folder = Path(video).parent / GEOMETRY_FOLDER
    return folder if folder.is_dir() else None


def answer_questions(
    checkpoint: Checkpoint,
    video: str | os.PathLike,
    questions: Sequence[str],
    *,
    geometry: str | os.PathLike | None = None,
    use_geometry: bool = True,
    num_frames: int | None = None,
    abstain_above: float | None = None,
) -> list[Answer]:
    """
    Answer questions about a video, which is encoded once, by greedy decoding; arguments are those of [`answer_question`].

    A model whose rationale module reads the question encodes the video for each.
    """
    options: dict[str, Any] = {"geometry": geometry, "use_geometry": use_geometry, "num_frames": num_frames}
    if checkpoint.model.config.drm_config.question_conditioned:
        asked = (
            answer_question(checkpoint, video, question, **options, abstain_above=abstain_above)
            for question in questions
        )
        return [timed.answer for timed in asked]
    scene = checkpoint.model.encode_scene(**checkpoint.processor.prepare_scene(video=video, **options))
    return checkpoint.model.ask(
        checkpoint.processor,
        scene,
        questions,
        use_geometry=use_geometry,
        abstain_above=abstain_above,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def answer_question(
    checkpoint: Checkpoint,
    video: str | os.PathLike,
    question: str,
    *,
    geometry: str | os.PathLike | None = None,
    use_geometry: bool = True,
    num_frames: int | None = None,
    abstain_above: float | None = None,
) -> TimedAnswer:
    """
    Answer one question about a video by greedy decoding.

    Args:
        checkpoint ([`Checkpoint`]):
            The model and its processor.
        video (`str` or `os.PathLike`):
            See [`ask_video`].
        question (`str`):
            The question.
        geometry (`str` or `os.PathLike`, *optional*):
            See [`ask_video`].
        use_geometry (`bool`, defaults to `True`):
            See [`ask_video`].
        num_frames (`int`, *optional*):
            See [`ask_video`].
        abstain_above (`float`, *optional*):
            See [`ask_video`].

    Returns:
        [`TimedAnswer`]: The answer and how long it took, decoding of the video included.
    """
    start = time.perf_counter()
    part = {"type": "video", "path": str(video)}
    if geometry is not None and use_geometry:
        part["geometry"] = str(geometry)
    messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    options: dict[str, Any] = {"use_geometry": use_geometry}
    if num_frames is not None:
        options["num_frames"] = num_frames
    inputs = checkpoint.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    output = checkpoint.model.generate(
        **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    (answer,) = checkpoint.processor.post_process_answers(
        output, input_ids=inputs["input_ids"], abstain_above=abstain_above
    )
    return TimedAnswer(answer, time.perf_counter() - start)
