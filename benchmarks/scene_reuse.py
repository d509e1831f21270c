# SPDX-License-Identifier: Apache-2.0
"""
What many questions about one scene cost beside one: from the video file to a number of new tokens for each question.

    python -m benchmarks.scene_reuse --json
    python -m benchmarks.scene_reuse --real-widths --json

The first compares `model.ask` with all questions to the same with one, for the tiny checkpoint at 32 frames, and to asking one by
one from the file. The second has the widths of geode-1.5b at two layers of each part, 4 frames and 4 questions, random weights,
and adds transformers' InternVL of the same sizes asked as often. There it also states what full depth would take, as far as that
can be said: the seconds within vision tower, point encoder and language model are scaled by their layers, the rest is left.

Programs are run in turn, so that a change of the machine's load meets them alike; each round gives one ratio, and the median
counts. Ratios are of wall-clock times; those of CPU times, which other programs disturb less, stand beside them. That both ways give the same answers is checked with the tiny checkpoint, whose weights are trained; random ones of full
width have ties. With `--json` the last line is a JSON object whose `ratio_16_to_1` (for 16 questions) is the first comparison.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    set_seed,
)

from benchmarks.common import add_json_option, run_in_turn, spread_of_ratios, write_json
from geode import embedded_scene, tiny_checkpoint
from geode.configuration.configuration_geode import GeodeConfig
from geode.data.synthetic_rooms.questions import prompt_of
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.video_processing_geode import GeodeImageProcessor


NUM_LAYERS = 2  # of each part at real widths
SCALED_PARTS = ("vision_tower", "point_encoder", "language_model")


def questions_of_scene(count: int) -> list[str]:
    """Questions about the embedded scene, of all its types in turn."""
    lines = (embedded_scene() / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [prompt_of(rows[number * len(rows) // count % len(rows)]) for number in range(count)]


def ask_together(model, processor, questions: Sequence[str], *, num_frames: int, new_tokens: int) -> list[str]:
    """The texts of answers, from the video file, with the scene encoded once."""
    room = embedded_scene()
    scene = model.encode_scene(
        **processor.prepare_scene(video=room / "room.mp4", geometry=room / "geometry", num_frames=num_frames)
    )
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return [answer.text for answer in model.ask(processor, scene, questions, **options)]


def ask_alone(model, processor, questions: Sequence[str], *, num_frames: int, new_tokens: int) -> list[str]:
    """The same, each question from the video file on."""
    texts = []
    for inputs in prompts(processor, questions, num_frames=num_frames):
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        texts += [answer.text for answer in processor.post_process_answers(output, input_ids=inputs["input_ids"])]
    return texts


def ask_internvl(model, processor, questions: Sequence[str], *, num_frames: int, new_tokens: int) -> list[str]:
    """What transformers' InternVL generates, each question from the video file on; it has no geometry."""
    texts = []
    for inputs in prompts(processor, questions, num_frames=num_frames, use_geometry=False):
        sequences = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values_videos"].flatten(0, 2),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        texts.append(processor.tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :]))
    return texts


def prompts(processor, questions: Sequence[str], **options: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs of each question about the embedded video."""
    room = embedded_scene()
    part = {"type": "video", "path": str(room / "room.mp4"), "geometry": str(room / "geometry")}
    for question in questions:
        chat = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
        yield processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )


def compare_tiny(options: argparse.Namespace) -> dict[str, Any]:
    """
    Compare all questions with one, and with one by one, for the tiny checkpoint.

    Raises:
        RuntimeError: If a question has another answer among others than alone.
    """
    model = AutoModel.from_pretrained(tiny_checkpoint()).eval()
    processor = AutoProcessor.from_pretrained(tiny_checkpoint())
    questions = questions_of_scene(options.questions)
    sizes = {"num_frames": options.num_frames, "new_tokens": options.new_tokens}
    together, alone = (ask(model, processor, questions, **sizes) for ask in (ask_together, ask_alone))
    if together != alone:
        raise RuntimeError(f"The answers must be those of each question alone, {alone}; got {together}.")
    seconds, cpu = run_in_turn(
        {
            "one": lambda: ask_together(model, processor, questions[:1], **sizes),
            "together": lambda: ask_together(model, processor, questions, **sizes),
            "one by one": lambda: ask_alone(model, processor, questions, **sizes),
        },
        options.rounds,
    )
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "together_to_one": spread_of_ratios(seconds["together"], seconds["one"]),
        "together_to_one_cpu": spread_of_ratios(cpu["together"], cpu["one"]),
        "one_by_one_to_together": spread_of_ratios(seconds["one by one"], seconds["together"]),
    }


def real_width_processor() -> GeodeProcessor:
    """A processor with the real sizes and the tiny checkpoint's tokenizer."""
    tokenizer = AutoProcessor.from_pretrained(tiny_checkpoint()).tokenizer
    return GeodeProcessor(GeodeImageProcessor(size={"height": 448, "width": 448}), tokenizer)


def real_width_models(processor: GeodeProcessor) -> tuple[GeodeForConditionalGeneration, PreTrainedModel]:
    """GEODE at the widths of geode-1.5b, and InternVL with the same vision tower and language model; few layers."""
    set_seed(0)
    config = GeodeConfig(
        reconstructor_config=None,
        image_token_id=processor.image_token_id,
        rationale_token_id=processor.rationale_token_id,
        control_tokens=processor.control_tokens,
    )
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = NUM_LAYERS
    config.text_config.layer_types = ["full_attention"] * NUM_LAYERS
    config.point_config.enc_depths = [NUM_LAYERS] * len(config.point_config.enc_depths)
    other = InternVLConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=config.image_seq_length,
    )
    return GeodeForConditionalGeneration(config).eval(), InternVLForConditionalGeneration(other).eval()


def depth_factors() -> dict[str, float]:
    """Layers of each part at full depth over those that are here."""
    full = GeodeConfig()
    return {
        "vision_tower": full.vision_config.num_hidden_layers / NUM_LAYERS,
        "language_model": full.text_config.num_hidden_layers / NUM_LAYERS,
        "point_encoder": sum(full.point_config.enc_depths) / (NUM_LAYERS * len(full.point_config.enc_depths)),
    }


@contextmanager
def timed_parts(model: PreTrainedModel) -> Iterator[dict[str, float]]:
    """Sum the seconds within the parts of a model that have layers."""
    seconds, started, handles = dict.fromkeys(SCALED_PARTS, 0.0), {}, []
    for name in SCALED_PARTS:
        part = getattr(model.model, name, None)
        if part is None:
            continue

        def begin(module, arguments, name=name):
            started[name] = time.perf_counter()

        def end(module, arguments, output, name=name):
            seconds[name] += time.perf_counter() - started[name]

        handles += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def compare_real_widths(options: argparse.Namespace) -> dict[str, Any]:
    """Compare our two ways and InternVL at real widths, and state what full depth would take."""
    processor = real_width_processor()
    ours, other = real_width_models(processor)
    questions = questions_of_scene(options.real_questions)
    sizes = {"num_frames": options.real_num_frames, "new_tokens": options.new_tokens}
    programs = {
        "together": (ours, lambda: ask_together(ours, processor, questions, **sizes)),
        "one by one": (ours, lambda: ask_alone(ours, processor, questions, **sizes)),
        "InternVL one by one": (other, lambda: ask_internvl(other, processor, questions, **sizes)),
    }
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in programs}

    def recorded(name: str) -> None:
        model, program = programs[name]
        with timed_parts(model) as seconds:
            program()
        parts[name].append(seconds)

    seconds, _ = run_in_turn({name: lambda name=name: recorded(name) for name in programs}, options.real_rounds)
    factors = depth_factors()
    deep = {
        name: [
            total + sum((factors[part] - 1) * within[part] for part in SCALED_PARTS)
            for total, within in zip(seconds[name], parts[name][1:], strict=True)
        ]
        for name in programs
    }
    return {
        "num_layers": NUM_LAYERS,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "extrapolated_seconds_at_full_depth": {name: statistics.median(values) for name, values in deep.items()},
        "depth_factors": factors,
        "ratios_to_together": {name: spread_of_ratios(seconds[name], seconds["together"]) for name in programs},
        "extrapolated_ratios": {name: spread_of_ratios(deep[name], deep["together"]) for name in programs},
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Many questions about a scene, beside one and beside one by one.")
    parser.add_argument("--questions", type=int, default=16, help="of the tiny checkpoint (default: 16)")
    parser.add_argument("--num-frames", type=int, default=32, help="that the tiny checkpoint sees (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=8, help="for each question (default: 8)")
    parser.add_argument("--rounds", type=int, default=9, help="that are counted (default: 9)")
    parser.add_argument("--real-widths", action="store_true", help="also at the widths of geode-1.5b; needs 6 GB")
    parser.add_argument("--real-questions", type=int, default=4, help="at real widths (default: 4)")
    parser.add_argument("--real-num-frames", type=int, default=4, help="at real widths (default: 4)")
    parser.add_argument("--real-rounds", type=int, default=1, help="at real widths (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add_json_option(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    found = compare_tiny(options)
    ratio, slower, seconds = found["together_to_one"], found["one_by_one_to_together"], found["seconds"]
    sys.stdout.write(
        f"tiny, {options.num_frames} frames: one question {seconds['one']:.3f} s, {options.questions} together "
        f"{seconds['together']:.3f} s, ratio {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f}; of CPU "
        f"time {found['together_to_one_cpu']['median']:.2f}); one by one {seconds['one by one']:.3f} s, {slower['median']:.1f} times as long\n"
    )
    report = {**vars(options), "torch": torch.__version__, "tiny": found}
    report[f"ratio_{options.questions}_to_1"] = ratio["median"]
    if options.real_widths:
        real = report["real_widths"] = compare_real_widths(options)
        for name, value in real["seconds"].items():
            sys.stdout.write(
                f"real widths, {NUM_LAYERS} layers, {options.real_questions} questions {name}: {value:.1f} s, "
                f"{real['ratios_to_together'][name]['median']:.2f} times ours together; extrapolated to full depth "
                f"{real['extrapolated_seconds_at_full_depth'][name]:.0f} s, "
                f"{real['extrapolated_ratios'][name]['median']:.2f} times\n"
            )
    write_json(report, options.json)


if __name__ == "__main__":
    main()
