# SPDX-License-Identifier: Apache-2.0
"""
What decoding with the regression head costs over transformers' own `generate` on the same language model without it.

    python -m benchmarks.generate --json

Both programs continue the same text by the same number of tokens, greedily, from the same weights: `GeodeForConditionalGeneration`
with `return_dict_in_generate=True`, which regresses the values, and the library's causal language model, which has no head. That
they generate the same tokens is checked. Every eighth is made a control token, more than answers have, and not the last, as answers
end with another; the value of a last token would take one more forward. The two are run in pairs,
the first of a pair in turn, and each pair gives one ratio. The median counts; the upper end of its 95 % interval comes from
resampling the pairs. Ratios are of CPU time, which other programs disturb less; those of wall-clock time stand beside them.

The cost is Python's, that of one more wrapper around each step: `tiny` has a language model so small that this shows, `middle` and `real` (the
widths of geode-1.5b, two layers) show what it is beside real work. Last, how many steps a number takes: one for `<REG>`, one for each token of its digits
otherwise.
"""

import argparse
import cProfile
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, LogitsProcessor, PreTrainedModel, set_seed

from benchmarks.common import add_json_option, write_json
from geode import embedded_scene, tiny_checkpoint
from geode.configuration.configuration_geode import GeodeConfig
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration


SIZES = {
    "tiny": {},
    "middle": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "layer_types": ["full_attention"] * 8,
    },
    "real": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "layer_types": ["full_attention"] * 2,
    },
}
NUM_RESAMPLES = 2000
CONTROL_EVERY = 8  # tokens


class EveryEighth(LogitsProcessor):
    """Makes every eighth new token the same control token, and no other."""

    def __init__(self, control_tokens: list[int], prompt_tokens: int):
        self.control_tokens, self.prompt_tokens = control_tokens, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """See [`LogitsProcessor`]."""
        is_control = (input_ids.shape[1] - self.prompt_tokens) % CONTROL_EVERY == CONTROL_EVERY // 2
        changed = scores.index_fill(1, scores.new_tensor(self.control_tokens, dtype=torch.long), -1e9)
        if is_control:
            changed[:, self.control_tokens[0]] = 1e9
        return changed


def make_models(size: str) -> tuple[GeodeForConditionalGeneration, PreTrainedModel]:
    """A random model, and the library's causal language model with the same weights."""
    set_seed(0)
    config = GeodeConfig.from_pretrained(tiny_checkpoint())
    for name, value in SIZES[size].items():
        setattr(config.text_config, name, value)
    model = GeodeForConditionalGeneration(config).eval()
    plain = AutoModelForCausalLM.from_config(config.text_config).eval()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.weight = model.lm_head.weight
    for part in (model, plain):
        part.generation_config.eos_token_id = part.generation_config.pad_token_id = None
    return model, plain


def make_programs(
    model: GeodeForConditionalGeneration, plain: PreTrainedModel, *, prompt_tokens: int, new_tokens: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """
    Make the two programs, each of which returns the sequence that it generated.

    Args:
        model ([`GeodeForConditionalGeneration`]): Ours.
        plain (`PreTrainedModel`): The library's.
        prompt_tokens (`int`): Length of the prompt.
        new_tokens (`int`): Tokens to generate.

    Returns:
        `dict[str, Callable]`: `"ours"` and `"plain"`.
    """
    control = [entry["token_id"] for entry in model.config.control_tokens.values()]
    generator = torch.Generator().manual_seed(1)
    # Ours never generates placeholders, and reads none without media.
    placeholders = [model.config.image_token_id, model.config.rationale_token_id]
    prompt = torch.randint(300, min(control + placeholders), (1, prompt_tokens), generator=generator)
    options = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
        "logits_processor": [EveryEighth(control, prompt_tokens)],
    }
    return {
        "ours": lambda: model.generate(**options).sequences,
        "plain": lambda: plain.generate(**options, suppress_tokens=placeholders).sequences,
    }


def measure(programs: dict[str, Callable[[], torch.Tensor]], num_pairs: int) -> dict[str, Any]:
    """
    Run both programs in pairs.

    Args:
        programs (`dict[str, Callable]`): Of [`make_programs`].
        num_pairs (`int`): Pairs that are counted; one more comes before them.

    Returns:
        `dict`: `cpu` and `wall`, each with the median `seconds` of both, the median `ratio`, the `upper` end of its 95 % interval
        and all `ratios`.

    Raises:
        RuntimeError: If the programs generate different tokens.
    """
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in programs} for clock in ("cpu", "wall")}
    for pair in tqdm(range(num_pairs + 1), desc="pairs", file=sys.stderr):
        sequences = {}
        for name in sorted(programs, reverse=bool(pair % 2)):
            cpu, wall = time.process_time(), time.perf_counter()
            sequences[name] = programs[name]()
            if pair:
                seconds["cpu"][name].append(time.process_time() - cpu)
                seconds["wall"][name].append(time.perf_counter() - wall)
        if not torch.equal(sequences["ours"], sequences["plain"]):
            raise RuntimeError(
                f"Both programs must generate the same tokens, got {sequences['ours'].tolist()} and "
                f"{sequences['plain'].tolist()}."
            )
    found = {}
    for clock, both in seconds.items():
        ratios = [ours / plain for ours, plain in zip(both["ours"], both["plain"], strict=True)]
        found[clock] = {
            "seconds": {name: statistics.median(values) for name, values in both.items()},
            "ratio": statistics.median(ratios),
            "upper": upper_bound(ratios),
            "ratios": ratios,
        }
    return found


def calls_per_step(model, plain, *, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Calls that Python makes for a step of decoding, by program: those of twice as many tokens less those of so many."""
    counted: dict[str, list[int]] = {"ours": [], "plain": []}
    for tokens in (new_tokens, 2 * new_tokens):
        programs = make_programs(model, plain, prompt_tokens=prompt_tokens, new_tokens=tokens)
        for name, program in programs.items():
            program()  # what only the first call does is not counted
            with cProfile.Profile() as profile:
                program()
            counted[name].append(sum(entry.callcount for entry in profile.getstats()))
    return {name: (long - short) / new_tokens for name, (short, long) in counted.items()}


def upper_bound(ratios: list[float]) -> float:
    """The upper end of the 95 % interval of a median, from resampling."""
    drawn = np.random.default_rng(0).choice(ratios, size=(NUM_RESAMPLES, len(ratios)))
    return float(np.quantile(np.median(drawn, axis=1), 0.975))


def steps_of_numbers() -> dict[str, float]:
    """Mean steps of decoding for a number of the embedded scene's answers, as digits and as a regressed value."""
    tokenizer = AutoProcessor.from_pretrained(tiny_checkpoint()).tokenizer
    lines = (embedded_scene() / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [row["ground_truth"] for row in map(json.loads, lines) if row["value"] is not None]
    digits = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    regressed = [len(tokenizer("<REG>", add_special_tokens=False)["input_ids"]) for _ in answers]
    return {"digits": statistics.mean(digits), "regressed": statistics.mean(regressed), "n": len(answers)}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Decoding with the regression head over transformers' own generate.")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["tiny", "middle", "real"], help="models")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="length of the prompt (default: 256)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (default: 32)")
    parser.add_argument("--pairs", type=int, default=31, help="pairs that are counted (default: 31)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = {**vars(options), "torch": torch.__version__, "results": {}, "steps": steps_of_numbers()}
    for size in options.sizes:
        models, lengths = make_models(size), {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
        found = report["results"][size] = measure(make_programs(*models, **lengths), options.pairs)
        calls = found["calls_per_step"] = calls_per_step(*models, **lengths)
        cpu, wall = found["cpu"], found["wall"]
        sys.stdout.write(
            f"{size}: {cpu['seconds']['ours']:.3f} s of CPU beside {cpu['seconds']['plain']:.3f} s, ratio {cpu['ratio']:.3f}, at "
            f"most {cpu['upper']:.3f}; by the clock {wall['ratio']:.3f}, at most {wall['upper']:.3f}; a step makes "
            f"{calls['ours']:.0f} calls in Python beside {calls['plain']:.0f}\n"
        )
    steps = report["steps"]
    sys.stdout.write(
        f"a number takes {steps['regressed']:.2f} steps as a value, {steps['digits']:.2f} as digits ({steps['n']} answers)\n"
    )
    write_json(report, options.json)


if __name__ == "__main__":
    main()
