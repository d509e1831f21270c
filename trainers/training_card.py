# SPDX-License-Identifier: Apache-2.0
"""The card of a trained model, from the facts of its run."""

from huggingface_hub import ModelCard, ModelCardData

from geode import __version__


TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

{{ description }}

- Base model: {{ base_model }}
- Data: {{ dataset_name }}
- Trained parameters: {{ trained }} of {{ total }}
- {{ steps }} steps, learning rate {{ learning_rate }}, seed {{ seed }}, {{ batch }} rows a step
- GEODE {{ version }}

Values are SI units in the scene frame: +z up, origin on the floor below the first camera, metres and radians.

## Evaluation

{{ evaluation }}

## Limitations

Numbers are regressed even where a question cannot be answered. Without metric geometry, lengths have no known scale. Only the data
above were trained on.

## Licence

Each part has the terms of its checkpoint: language model, vision tower, point encoder (facebook/sonata is CC-BY-NC-4.0) and
reconstructor (facebook/VGGT-1B is for non-commercial use). A model with such a part is not for commercial use. The code is Apache-2.0.

## Source

{{ paper_title }}, arXiv {{ paper_id }}.
"""


def build_training_card(trainer, *, model_name: str, dataset_name: str | None, tags: list[str]) -> ModelCard:
    """
    Fill in the card of a model that has been trained.

    Args:
        trainer ([`GeodeTrainer`]): Its trainer.
        model_name (`str`): Title.
        dataset_name (`str`, *optional*): What was trained on.
        tags (`list[str]`): Tags of the card.

    Returns:
        `ModelCard`: Ready to be saved as `README.md`.
    """
    parameters = list(trainer.model.parameters())
    args, base = trainer.args, trainer.geode_model.config._name_or_path
    evaluated = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="video-text-to-text", tags=sorted(set(tags))),
        template_str=TEMPLATE,
        model_name=model_name,
        description=f"{trainer._name} of GEODE, a vision-language model that regresses the numbers it answers with.",
        base_model=f"`{base}`" if base else "not named",
        dataset_name=f"`{dataset_name}`" if dataset_name else "not named",
        trained=f"{sum(parameter.numel() for parameter in parameters if parameter.requires_grad):,}",
        total=f"{sum(parameter.numel() for parameter in parameters):,}",
        steps=trainer.state.global_step,
        learning_rate=args.learning_rate,
        seed=args.seed,
        batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        version=__version__,
        evaluation=_evaluation(evaluated),
        paper_title=trainer._paper["title"],
        paper_id=trainer._paper["id"],
    )


def _evaluation(entry: dict | None) -> str:
    if entry is None:
        return "Not evaluated."
    shown = {
        name: value
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_model_preparation_time"))
    }
    lines = [f"| `{name}` | {value:.4g} |" for name, value in sorted(shown.items())]
    return "\n".join([f"During training, at step {entry['step']}:", "", "| | |", "| --- | --- |", *lines])


__all__ = ["build_training_card"]
