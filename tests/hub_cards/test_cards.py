# SPDX-License-Identifier: Apache-2.0
"""Tests of the cards: their facts are those of the folder, the client's validators take them, and what they tell to run runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, SpaceCard, parse_eval_result_entries
from safetensors.torch import load_file

import geode
from geode.cli import main
from geode.hub_cards.cards import build_model_card, evaluation_text
from geode.hub_cards.check import SECTIONS, check_files
from geode.hub_cards.facts import read_facts
from geode.hub_cards.manifest import MANIFEST
from geode.hub_cards.terms import apache_text
from geode.publishing import copy_results
from tests.hub_cards.common_cards import SONATA, write_facts, write_run


PLACEHOLDER = '"path/to/this/folder"'


@pytest.fixture(scope="module")
def checkpoint():
    from geode.commands import load_checkpoint

    return load_checkpoint()


@pytest.fixture
def copy(tmp_path) -> Path:
    """The tiny checkpoint where nobody knows it: its card needs facts."""
    return Path(shutil.copytree(geode.tiny_checkpoint(), tmp_path / "mine"))


def section(card, title: str) -> str:
    return card.text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


def table(card) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, flags=re.MULTILINE))


def snippet(folder: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert found.count(PLACEHOLDER) == 1
    return found.replace(PLACEHOLDER, json.dumps(str(folder)))


def test_model_card_states_the_facts_of_the_model(checkpoint, tmp_path):
    facts = read_facts(write_facts(tmp_path), "model")
    card = build_model_card(checkpoint.model, checkpoint.processor, facts, commit="abc123")
    stated = table(card)
    counts = {name: part.numel() for name, part in checkpoint.model.named_parameters()}
    assert stated["Parameters"] == f"{sum(counts.values()):,}"
    for title, prefix, source in (
        ("Vision tower", "model.vision_tower.", ", OpenGVLab/InternViT-300M-448px-V2_5"),
        ("Language model", "model.language_model.", ", Qwen/Qwen2.5-1.5B-Instruct"),
        ("Rationale module", "model.drm.", ""),
        ("Regression head", "drh.", ""),
    ):
        number = sum(count for name, count in counts.items() if name.startswith(prefix))
        assert stated[title] == f"{number:,} parameters{source}"
    processor = checkpoint.processor
    size = processor.image_processor.size
    assert stated["Frames"] == f"{processor.num_frames} of {size.height} x {size.width} pixels for the language model"
    assert stated["Data type"] == "float32"
    assert stated["Rationale tokens"] == str(processor.num_rationale_tokens)
    assert "`<REG>` (scalar, 1)" in stated["Regressed tokens"]
    assert "`<3DBBOX>` (box3d, 7)" in stated["Regressed tokens"]
    assert "at commit `abc123`" in card.text
    assert "{{" not in card.text
    assert "None" not in card.text


def test_model_card_has_the_header_that_the_hub_reads_and_every_section(checkpoint, tmp_path):
    facts = read_facts(write_facts(tmp_path), "model")
    build_model_card(checkpoint.model, checkpoint.processor, facts).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "base_model": ["OpenGVLab/InternViT-300M-448px-V2_5", "Qwen/Qwen2.5-1.5B-Instruct"],
        "datasets": ["org/rooms"],
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "video-text-to-text",
        "tags": ["geode", "3d", "spatial-reasoning", "custom_code"],
    }
    assert [title for title in SECTIONS if not section(card, title)] == []
    assert section(card, "Evaluation") == "Not evaluated."
    assert section(card, "Intended use") == "Questions about rooms."
    assert "It has seen few rooms." in section(card, "Limitations")
    for claim in ("metres", "+z up", "OpenCV", "`world_from_cam`", "turned by 180 degrees"):
        assert claim in section(card, "Frames and units")
    assert "arXiv:2511.11239" in section(card, "Citation")
    assert "| rooms | [org/rooms](https://huggingface.co/org/rooms) at `def` | cc-by-4.0 |" in section(
        card, "Training"
    )


def test_a_part_that_is_not_for_commerce_makes_card_and_licence_so(copy, tmp_path, capsys):
    facts = yaml.safe_load(write_facts(tmp_path).read_text())
    path = write_facts(tmp_path, parts={**facts["parts"], "point_encoder": SONATA})
    assert main(["export", str(tmp_path / "hub"), "--model", str(copy), "--facts", str(path)]) == 0
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "**It is not for commercial use**, since that is excluded by: point encoder." in section(card, "Licence")
    licence = (tmp_path / "hub" / "LICENSE").read_text()
    assert "As a whole it is not for commercial use." in licence
    assert licence.endswith(apache_text())
    recorded = json.loads((tmp_path / "hub" / MANIFEST).read_text())["parts"]["point_encoder"]
    assert recorded["source"] == "facebook/sonata"
    assert recorded["license"] == "cc-by-nc-4.0"
    assert check_files(tmp_path / "hub") == []


@pytest.mark.parametrize(
    "change", [lambda parts: parts.pop("vision_tower"), lambda parts: parts.update(reconstructor=SONATA)]
)
def test_facts_that_do_not_fit_the_model_write_nothing(copy, tmp_path, capsys, change):
    parts = yaml.safe_load(write_facts(tmp_path).read_text())["parts"]
    change(parts)
    path = write_facts(tmp_path, parts=parts)
    assert main(["export", str(tmp_path / "hub"), "--model", str(copy), "--facts", str(path)]) == 2
    error = capsys.readouterr().err
    assert "`parts` must give source and licence of ['language_model', 'point_encoder', 'vision_tower']" in error
    assert not (tmp_path / "hub").exists()


def test_results_of_the_model_reach_card_header_and_eval_results(checkpoint, copy, tmp_path, capsys):
    from geode.evaluating import model_revision

    revision = model_revision(checkpoint.model)
    own = write_run(tmp_path / "own", revision)
    blind = write_run(tmp_path / "blind", revision, control="blind")
    part = write_run(tmp_path / "part", revision, subset="debiased")
    path = write_facts(tmp_path)
    options = ["--facts", str(path), "--results", str(own), "--results", str(blind), "--results", str(part)]
    assert main(["export", str(tmp_path / "hub"), "--model", str(copy), *options]) == 0
    card = ModelCard.load(tmp_path / "hub" / "README.md", ignore_metadata_errors=False)
    # Counting is right, one of two routes is: the mean over the tasks is 75.
    result, _ = card.data.eval_results
    assert (result.dataset_type, result.dataset_revision, result.metric_value) == (
        "nyu-visionx/VSI-Bench",
        "0123abc",
        75.0,
    )
    (written,) = (tmp_path / "hub" / ".eval_results").iterdir()
    entry, other = parse_eval_result_entries(yaml.safe_load(written.read_text()))
    assert (other.dataset_id, other.task_id, other.value) == ("nyu-visionx/VSI-Bench", "debiased", 75.0)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-visionx/VSI-Bench", "full", 75.0)
    text = section(card, "Evaluation")
    assert "Not evaluated" not in text
    assert "| **overall** | 3 | 75.0 |" in text
    assert "Shown: frames and geometry. 3 questions about 2 scenes at `0123abc`, 4 frames; scorer `official`" in text
    assert "Shown: nothing (blind)." in text
    assert check_files(tmp_path / "hub") == []

    other = write_run(tmp_path / "other", "of another model")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "x"), "--model", str(copy), *options[:2], "--results", str(other)]) == 2
    error = capsys.readouterr().err
    assert f"must be of this model ({revision}), got those of path/of/it (of another model)" in error
    assert main(["export", str(tmp_path / "x"), "--model", str(copy), *options[:2], "--results", str(copy)]) == 2
    assert "holds no scores.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"Two of the results are of .*'task_id': 'full'"):
        copy_results(tmp_path, [own, own])
    assert not (tmp_path / "x").exists()


def test_no_results_are_said_to_be_none():
    assert evaluation_text([]) == "Not evaluated."


# ---- datasets ----


@pytest.fixture
def dataset(tmp_path) -> Path:
    folder = tmp_path / "questions"
    folder.mkdir()
    rows = [{"question": f"How many chairs are in room {number}?", "value_si": number} for number in range(5)]
    for split, part in (("train", rows[:3]), ("test", rows[3:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def test_dataset_card_lists_its_files_and_its_snippet_runs(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert main(["card", "dataset", str(dataset), "--facts", str(write_facts(tmp_path, "parts"))]) == 0
    card = DatasetCard.load(dataset / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "apache-2.0"
    assert card.data.source_datasets == ["org/rooms"]
    assert "| `train.jsonl` | train | 3 |" in card.text
    assert "| `test.jsonl` | test | 2 |" in card.text
    assert "Columns: `question`, `value_si`." in card.text
    for title in ("Use", "Intended use", "Frames and units", "Limitations", "Licence", "Citation"):
        assert section(card, title)
    capsys.readouterr()
    exec(compile(snippet(dataset), "README.md", "exec"), {})  # noqa: S102 - our own card
    assert capsys.readouterr().out.splitlines()[-1] == "2 ['question', 'value_si']"


def test_dataset_card_takes_on_the_terms_of_what_it_was_made_from(dataset, tmp_path):
    path = write_facts(tmp_path, data={"scans": {"source": "org/scans", "license": "cc-by-nc-sa-4.0"}})
    assert main(["card", "dataset", str(dataset), "--facts", str(path)]) == 0
    card = DatasetCard.load(dataset / "README.md")
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert "**It is not for commercial use**, since that is excluded by: scans." in section(card, "Licence")


def test_dataset_that_is_none_is_refused(dataset, tmp_path, capsys):
    facts = ["--facts", str(write_facts(tmp_path))]
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "empty"), *facts], "must hold a file for each split"),
        ([str(tmp_path / "none"), *facts], "`directory` must be a folder"),
        ([str(dataset)], "`facts` must name a YAML file, got none"),
        ([str(dataset), *facts, "--results", "x"], "`results` are for models and adapters, got ['x'] for a dataset"),
    ):
        assert main(["card", "dataset", *arguments]) == 2
        assert message in capsys.readouterr().err
    (dataset / "test.jsonl").write_text('{"question": "a"}\n')
    assert main(["card", "dataset", str(dataset), *facts]) == 2
    assert "same columns: test.jsonl has ['question'], train.jsonl ['question', 'value_si']" in capsys.readouterr().err
    (dataset / "test.jsonl").write_text("[1]\n")
    assert main(["card", "dataset", str(dataset), *facts]) == 2
    assert "test.jsonl:1 must hold an object in JSON, got a list" in capsys.readouterr().err
    (dataset / "more.parquet").touch()
    assert main(["card", "dataset", str(dataset), *facts]) == 2
    assert "holds both JSON Lines and parquet" in capsys.readouterr().err


# ---- metrics ----


def test_metric_folder_is_a_space_and_its_snippet_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "vsi_bench"
    assert main(["card", "metric", str(folder)]) == 0
    card = SpaceCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert (card.data.title, card.data.sdk, card.data.license) == ("VSI-Bench score", "static", "apache-2.0")
    assert {"evaluate", "metric"} <= set(card.data.tags)
    for title in ("Use", "Inputs and outputs", "Intended use", "Limitations", "Licence", "Citation"):
        assert section(card, title)
    assert "{{" not in card.text
    capsys.readouterr()
    exec(compile(snippet(folder), "README.md", "exec"), {})  # noqa: S102 - our own card
    # |2.31 - 2.5| / 2.5 = 0.076 is under 9 of the 10 tolerances 0.5, 0.45, ... 0.05.
    printed = capsys.readouterr().out
    assert "'object_abs_distance': 90.0" in printed
    assert "'route_planning': 100.0" in printed


# ---- adapters ----


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter of the tiny checkpoint as stage 2 makes it, not trained."""
    from peft import LoraConfig, get_peft_model

    from geode.trainers.stage2_trainer import complete_peft_config

    model = geode.GeodeForConditionalGeneration.from_pretrained(geode.tiny_checkpoint())
    config = complete_peft_config(LoraConfig(r=2, lora_alpha=4), model)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.slow
def test_adapter_card_states_its_facts_and_its_snippet_runs(adapter, tmp_path, capsys):
    base = {"source": str(geode.tiny_checkpoint()), "license": "apache-2.0"}
    path = write_facts(tmp_path, "parts", base_model={**SONATA, "source": "org/base", "revision": "abc"})
    (adapter / "README.md").unlink()  # peft's own
    assert main(["card", "adapter", str(adapter), "--facts", str(path)]) == 0
    card = ModelCard.load(adapter / "README.md", ignore_metadata_errors=False)
    header = card.data.to_dict()
    assert (header["base_model"], header["base_model_relation"]) == ("org/base", "adapter")
    assert (header["library_name"], header["license"]) == ("peft", "cc-by-nc-4.0")
    assert "excluded by: base model" in section(card, "Licence")
    assert section(card, "Evaluation") == "Not evaluated."
    weights = load_file(adapter / "adapter_model.safetensors")
    assert table(card)["Parameters"] == f"{sum(tensor.numel() for tensor in weights.values()):,}"
    assert table(card)["Kind"] == "LORA, rank 2, alpha 4"
    assert "drh" in table(card)["Saved as a whole"]
    assert check_files(adapter) == []

    path = write_facts(tmp_path, "parts", base_model=base)
    assert main(["card", "adapter", str(adapter), "--facts", str(path)]) == 0
    code = snippet(adapter).replace('"path/to/the/base/model"', json.dumps(str(geode.tiny_checkpoint())))
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own card
    assert capsys.readouterr().out == "GeodeForConditionalGeneration\n"


def test_adapter_that_is_none_is_refused(tmp_path, capsys):
    path = write_facts(tmp_path, "parts", base_model=SONATA)
    assert main(["card", "adapter", str(tmp_path), "--facts", str(path)]) == 2
    assert "must hold an adapter, and it has no adapter_config.json" in capsys.readouterr().err
