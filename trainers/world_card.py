# SPDX-License-Identifier: Apache-2.0
"""The card of the small model that was trained on the embedded world, from the facts of its run."""

from geode.evaluation.calibration import interval_table
from geode.trainers.world_scores import score_table


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: video-text-to-text
tags: [geode, 3d, spatial-reasoning]
---

# The tiny checkpoint of GEODE

GEODE at the smallest size that runs every part, trained from nothing on {train_scenes} rendered rooms by `make tiny`: in
{minutes:.0f} minutes on {cores} CPU cores, rooms not counted. {parameters:,} parameters in float32. It knows rendered rooms of the embedded
world alone; its answers about any other video mean nothing.

Values are SI units in the scene frame: +z up, origin on the floor below the first camera, metres. There is no reconstructor:
geometry comes with the video.

## Results on {test_scenes} rooms that it was not trained on

Percent of letters that are right, or mean relative accuracy of numbers, with the standard error over questions. "Another room
shown" asks the same questions of another room: what is left of a score there is not seen. "Best blind" is the best of chance,
majorities and constants of the training split; for boxes, the distance from the mean centre. "Above blind" means by more than two
standard errors.

{table}

Each number comes with an interval, whose width was measured on {calibration_values} answers about the {calibration_scenes} rooms of the
validation split (split-conformal). On the test rooms:

{intervals}

## How it was made

1. What stands for public checkpoints, none of which exists at this size, was trained on the labels of the world itself: the vision
   tower ({vision_tower} steps) says of each patch what it shows and how far away that is; the point encoder ({point_encoder} steps)
   says of each token to what it belongs and where that has its box; both are frozen afterwards. Held out, the former names
   {vision_accuracy:.0%} of the patches of furniture, the latter {point_accuracy:.0%} of the tokens. The language model
   ({language_model} steps) read questions, rationales and answers as text alone.
2. The rationale module learned to look up what is where ({lookup} steps), through a head that was thrown away: held out, a median
   error of {lookup_error:.2f} m through the rationale tokens, and {patch_error:.2f} m through the fused features. This is an addition
   to the paper, whose models have millions of rationales to learn it from.
3. The stages of the paper, by the recipes `tiny_rooms_cpu.yaml`: alignment ({alignment} steps); stage 1 ({stage1} steps), in which
   the frozen language model reconstructs rationales from the rationale tokens alone; then what stage 2 trains, as a curriculum
   ("Locate the ..." {locate} steps; boxes and measures {measure} steps); stage 2 ({stage2} steps) on all questions. In the curriculum
   the language model also learned, at every name in a question and at the tokens after it, the box of what is named, and at every
   option whether it is the right one, mostly through heads that were thrown away: without that, distances and directions stay where
   guessing is. This too is an addition to the paper.

The fused features are injected into the visual tokens (`inject_features`): the rationale tokens are not all that the language model
sees of the geometry. Each patch looks for its geometry from its camera, and from the point that its ray meets (`camera_queries`,
`point_queries`). These three are additions as well. The shuffled-scene gate, in nats per answer token, and in the regression loss:

{gate}

## Limitations

Rendered rooms only, of the sizes and categories of the embedded world. It answers whatever it is asked, also about what is not there.

## Licence

Apache-2.0. Everything in it was made by this package; no public weights or data.

Seed {seed}. Command: `make tiny`.{note} All figures are in `facts.json`.
"""


def build_world_card(facts: dict) -> str:
    """
    Write the card.

    Args:
        facts (`dict`): What each stage of `geode.trainers.world` returned, by stage, with `steps`, `seed`, `parameters`,
            `train_scenes`, `cores`, `interval_coverage`, as `blind` the best blind score of each task, and as `note`, where
            a run was not made in one piece, how it was made.

    Returns:
        `str`: The text of `README.md`.
    """
    scores = facts["scores"]
    parts, calibrated = facts["parts"], facts["calibration"]["tokens"].get("<REG>", {"num_values": 0, "num_scenes": 0})
    intervals = "No answer had one."
    if scores["value_intervals"] is not None:
        intervals = interval_table(scores["value_intervals"], facts["interval_coverage"])
    seconds = sum(value["seconds"] for value in facts.values() if isinstance(value, dict) and "seconds" in value)
    return CARD.format(
        **facts["steps"],
        table=score_table(scores["scores"], scores["shuffled"], facts["blind"], prior_m=scores["prior_m"]),
        gate=gate_table(facts),
        minutes=seconds / 60.0,
        seed=facts["seed"],
        note=f" {facts['note']}" if "note" in facts else "",
        parameters=facts["parameters"],
        cores=facts["cores"],
        train_scenes=facts["train_scenes"],
        test_scenes=scores["num_scenes"],
        vision_accuracy=parts["vision_tower"]["object_accuracy"],
        point_accuracy=parts["point_encoder"]["object_accuracy"],
        lookup_error=facts["lookup"]["median_center_error_m"],
        intervals=intervals,
        calibration_values=calibrated["num_values"],
        calibration_scenes=calibrated["num_scenes"],
        patch_error=facts["lookup"]["patch_median_center_error_m"],
    )


def gate_table(facts: dict) -> str:
    """
    Write how much losses rise when each question is shown another room.

    Args:
        facts (`dict`): By stage, the metrics of its last evaluation.

    Returns:
        `str`: A Markdown table of the stages that were evaluated both ways.
    """
    lines = [
        "| Stage | Text | Text, another room | Values | Values, another room |",
        "| --- | --- | --- | --- | --- |",
    ]
    for stage, found in facts.items():
        if not isinstance(found, dict) or "eval_shuffled_loss/ce" not in found:
            continue
        names = ("eval_loss/ce", "eval_shuffled_loss/ce", "eval_loss/drh", "eval_shuffled_loss/drh")
        cells = [f"{found[name]:.3f}" if name in found else "" for name in names]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


__all__ = ["build_world_card", "gate_table"]
