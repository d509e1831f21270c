# SPDX-License-Identifier: Apache-2.0
"""Cards of models, adapters, datasets and metrics: templates filled with facts of the folder and of a file of facts."""

import importlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    ModelCard,
    ModelCardData,
    SpaceCard,
    SpaceCardData,
)

from geode import __version__
from geode.hub_cards.facts import CardFacts
from geode.hub_cards.manifest import part_of, read_header
from geode.hub_cards.terms import Part, combined_terms


TEMPLATES = Path(__file__).with_name("templates")
PLACEHOLDER = "path/to/this/folder"
TAGS = ("geode", "3d", "spatial-reasoning")
# Parts of the model that come with weights of their own, and so with terms.
ENCODERS = ("vision_tower", "language_model", "point_encoder")
# What an InternVL model, which is one part, brings.
VISION_LANGUAGE = ("vision_tower", "multi_modal_projector", "language_model")
PART_NAMES = {"drh": "regression head", "drm": "rationale module", "multi_modal_projector": "projector"}
NOT_EVALUATED = "Not evaluated."


def build_model_card(
    model,
    processor,
    facts: CardFacts,
    *,
    results: Sequence[str | Path] = (),
    repo_id: str | None = None,
    commit: str | None = None,
) -> ModelCard:
    """
    Fill in the card of a GEODE model.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.
        facts ([`CardFacts`]): What the model does not tell.
        results (`Sequence[str | Path]`): Folders that `geode eval` has written for this very model; see [`read_results`].
        repo_id (`str`, *optional*): Its name on the Hub, for the snippet.
        commit (`str`, *optional*): Commit of the code.

    Returns:
        `ModelCard`: Ready to be saved as `README.md`.

    Raises:
        ValueError: If the facts miss the terms of an encoder of the model, or name another one.
    """
    needed = {*ENCODERS, *(["reconstructor"] if model.config.reconstructor_config is not None else [])}
    sources = [(name, part.source) for part in facts.parts for name in _modules_of(part)]
    named = sorted(name for name, _ in sources if name != "multi_modal_projector")
    if named != sorted(needed):
        raise ValueError(
            f"`parts` must give source and licence of {sorted(needed)}, which the model holds, got {named}. Add what is "
            "missing; of weights that were made here the source is said in words."
        )
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    parts = [
        {"name": PART_NAMES.get(name, name), "parameters": count, "source": dict(sources).get(name)}
        for name, count in sorted(counts.items())
    ]
    found = read_results(results)
    return ModelCard.from_template(
        ModelCardData(
            language="en",
            library_name="transformers",
            pipeline_tag="video-text-to-text",
            base_model=_hub_names(facts.parts),
            datasets=_hub_names(facts.data),
            tags=[*TAGS, "custom_code", *facts.tags],
            **combined_terms(facts.license, facts.parts).header(),
            **_model_index(facts.name, found),
        ),
        template_path=str(TEMPLATES / "model.md"),
        facts=facts,
        config=model.config,
        processor=processor,
        frame_size=processor.image_processor.size,
        num_parameters=model.num_parameters(),
        dtypes=" and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters()})),
        parts=parts,
        geode_version=__version__,
        commit=commit,
        name=json.dumps(repo_id or PLACEHOLDER),
        question=json.dumps(facts.question),
        evaluation=evaluation_text(found),
        licence_text=licence_text(facts.license, facts.parts),
        link=_link,
    )


def build_adapter_card(folder: Path, facts: CardFacts, *, results: Sequence[str | Path] = ()) -> ModelCard:
    """
    Fill in the card of an adapter that stage 2 has trained.

    Args:
        folder (`Path`): The adapter: `adapter_config.json` and `adapter_model.safetensors`.
        facts ([`CardFacts`]): What these do not tell, the base model's licence among it.
        results (`Sequence[str | Path]`): Folders that `geode eval` has written for the base model with this adapter merged.

    Returns:
        `ModelCard`: Ready to be saved as `README.md`.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must hold an adapter, and it has no {name}. Train one with `use_peft: true`."
            )
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = read_header(folder / "adapter_model.safetensors").values()
    base, found = facts.base_model, read_results(results)
    return ModelCard.from_template(
        ModelCardData(
            language="en",
            library_name="peft",
            pipeline_tag="video-text-to-text",
            base_model=base.source if base.is_on_hub else None,
            base_model_relation="adapter" if base.is_on_hub else None,
            datasets=_hub_names(facts.data),
            tags=[*TAGS, "lora", *facts.tags],
            **combined_terms(facts.license, [base]).header(),
            **_model_index(facts.name, found),
        ),
        template_path=str(TEMPLATES / "adapter.md"),
        facts=facts,
        adapter=adapter,
        num_parameters=sum(tensor.size for tensor in tensors),
        has_drm=(folder / "drm.safetensors").is_file(),
        geode_version=__version__,
        base=json.dumps(base.source if base.is_on_hub else "path/to/the/base/model"),
        evaluation=evaluation_text(found),
        licence_text=licence_text(facts.license, [base]),
        link=_link,
    )


def build_dataset_card(folder: Path, facts: CardFacts) -> DatasetCard:
    """
    Fill in the card of a dataset of JSON Lines or parquet files, each of which is a split: `train.jsonl`, `test.parquet`.

    Args:
        folder (`Path`): The dataset.
        facts ([`CardFacts`]): What its files do not tell.

    Returns:
        `DatasetCard`: Ready to be saved as `README.md`, with the header by which `load_dataset` and the Hub's viewer find the files.

    Raises:
        FileNotFoundError: If there are no such files.
        ValueError: If both forms are there, or files differ in their columns.
    """
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.parquet")])
    if not files:
        raise FileNotFoundError(
            f"{folder} must hold a file for each split, such as train.jsonl or test.parquet; it has none."
        )
    if len({path.suffix for path in files}) > 1:
        raise ValueError(
            f"{folder} holds both JSON Lines and parquet: {[path.name for path in files]}. Keep one form."
        )
    tables = {path: _read_table(path) for path in files}
    columns = tables[files[0]][0]
    for path, (found, _) in tables.items():
        if found != columns:
            raise ValueError(
                f"The splits must have the same columns: {files[0].name} has {columns}, {path.name} {found}."
            )
    splits = [{"split": path.stem, "path": path.name} for path in files]
    return DatasetCard.from_template(
        DatasetCardData(
            language="en",
            pretty_name=facts.name,
            task_categories=["visual-question-answering", "video-text-to-text"],
            source_datasets=_hub_names(facts.data),
            tags=[*TAGS, *facts.tags],
            configs=[{"config_name": "default", "data_files": splits}],
            **combined_terms(facts.license, facts.data).header(),
        ),
        template_path=str(TEMPLATES / "dataset.md"),
        facts=facts,
        files=[{**entry, "rows": tables[path][1]} for entry, path in zip(splits, files, strict=True)],
        columns=[f"`{name}`" for name in columns],
        licence_text=licence_text(facts.license, facts.data),
        link=_link,
    )


def build_metric_card(facts: CardFacts, module: str = "vsi_bench") -> SpaceCard:
    """
    Fill in the card of the Space of a metric, from which `evaluate.load` reads its module.

    Args:
        facts ([`CardFacts`]): What the module does not tell.
        module (`str`, defaults to `"vsi_bench"`): A module of `geode.evaluation` with one metric of `evaluate`.

    Returns:
        `SpaceCard`: Ready to be saved as `README.md`.
    """
    code = importlib.import_module(f"geode.evaluation.{module}.{module}")
    (metric,) = (
        entry for entry in vars(code).values() if isinstance(entry, type) and entry.__module__ == code.__name__
    )
    info = metric()._info()
    return SpaceCard.from_template(
        SpaceCardData(
            title=facts.name,
            sdk="static",
            tags=["evaluate", "metric", *facts.tags],
            **combined_terms(facts.license, []).header(),
        ),
        template_path=str(TEMPLATES / "metric.md"),
        facts=facts,
        description=info.description,
        inputs=info.inputs_description.strip(),
        module=module,
        geode_version=__version__,
        licence_text=licence_text(facts.license, []),
    )


def read_results(folders: Sequence[str | Path]) -> list[dict]:
    """
    Read what `geode eval` has written.

    Args:
        folders (`Sequence[str | Path]`): Its folders.

    Returns:
        `list[dict]`: The content of each `scores.json`.

    Raises:
        FileNotFoundError: If a folder holds none.
    """
    for folder in folders:
        if not (Path(folder) / "scores.json").is_file():
            raise FileNotFoundError(
                f"`results` must be folders of `geode eval`, and {str(folder)!r} holds no scores.json."
            )
    return [json.loads((Path(folder) / "scores.json").read_text(encoding="utf-8")) for folder in folders]


def evaluation_text(results: Sequence[dict]) -> str:
    """
    Write the section on evaluation.

    Args:
        results (`Sequence[dict]`): See [`read_results`].

    Returns:
        `str`: A table for each, with how it was made; "Not evaluated." of none.
    """
    if not results:
        return NOT_EVALUATED
    from geode.evaluation.results import CONTROL_NAMES, INCOMPLETE, score_table

    texts = []
    for scores in results:
        run, made = scores["run"], scores["made"]
        revision = f" at `{run['benchmark_revision']}`" if run["benchmark_revision"] else ""
        code = f" at commit `{made['commit']}`" if made["commit"] else ""
        texts.append(
            f"### {run['benchmark']}, {run['split']} ({run['subset']})\n\n"
            f"Shown: {CONTROL_NAMES[run['control']]}. {run['questions']} questions about {run['scenes']} scenes{revision}, {run['frames']} "
            f"frames; scorer `{scores['scorer']}`, {made['scored']}, geode {made['geode']}{code}.\n\n"
            f"{score_table(scores)}\n" + ("" if scores["is_official"] else INCOMPLETE)
        )
    notes = (
        "Percent; 95 % intervals by a bootstrap over scenes. Figures of other scorers must not be mixed with these."
    )
    return "\n".join([*texts, notes])


def licence_text(own: str, parts: Sequence[Part]) -> str:
    """
    Say in words what the terms of a whole are.

    Args:
        own (`str`): Licence of what was added.
        parts (`Sequence[Part]`): What it is made of.

    Returns:
        `str`: A paragraph.
    """
    terms = combined_terms(own, parts)
    if terms.license == own != "other":
        text = f"The whole is under `{own}`; each part keeps its own terms." if parts else f"It is under `{own}`."
    elif terms.license == "other":
        text = "The whole has the terms of its parts, see `LICENSE`."
    else:
        text = (
            f"What was made here is under `{own}`, but the whole is bound by its parts and is under `{terms.license}`."
        )
    bound = [part.name.replace("_", " ") for part in parts if part.permits_commerce is False]
    if bound:
        return f"{text} **It is not for commercial use**, since that is excluded by: {', '.join(bound)}."
    return f"{text} **It is not for commercial use.**" if terms.is_commercial is False else text


def _modules_of(part: Part) -> Sequence[str]:
    return VISION_LANGUAGE if part.name == "vision_language_model" else [part.name]


def _hub_names(parts: Sequence[Part]) -> list[str] | None:
    return sorted({part.source for part in parts if part.is_on_hub}) or None


def _link(part: Part) -> str:
    where = part.source if part.page is None else f"[{part.source}]({part.page})"
    return where if part.revision is None else f"{where} at `{part.revision}`"


def _model_index(name: str, results: Sequence[dict]) -> dict:
    """Return the scores in the header's older form, which the Hub reads as well. Controls are no scores of the model."""
    entries = [
        EvalResult(
            task_type="video-text-to-text",
            dataset_type=scores["run"]["benchmark"],
            dataset_name=scores["run"]["benchmark"],
            dataset_split=scores["run"]["split"],
            dataset_revision=scores["run"]["benchmark_revision"],
            metric_type="vsi_bench",
            metric_name=f"VSI-Bench score ({scores['scorer']} scorer)",
            metric_value=round(scores["tasks"]["overall"], 2),
        )
        for scores in results
        if scores["run"]["is_on_hub"] and scores["run"]["control"] == "none"
    ]
    return {"model_name": name, "eval_results": entries} if entries else {}


def _read_table(path: Path) -> tuple[list[str], int]:
    """Return the columns and the number of rows of a file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(path)
        return metadata.schema.to_arrow_schema().names, metadata.num_rows
    columns: dict[str, None] = {}
    rows = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}:{number} must hold an object in JSON, got a {type(row).__name__}.")
            columns |= dict.fromkeys(row)
            rows += 1
    return sorted(columns), rows


__all__ = [
    "ENCODERS",
    "NOT_EVALUATED",
    "PLACEHOLDER",
    "build_adapter_card",
    "build_dataset_card",
    "build_metric_card",
    "build_model_card",
    "evaluation_text",
    "licence_text",
    "read_results",
]
