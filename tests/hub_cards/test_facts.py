# SPDX-License-Identifier: Apache-2.0
"""Tests of the facts that a card must state, and of the terms that follow from its parts."""

import json
import re
from pathlib import Path

import pytest
import yaml

import geode
from geode.hub_cards.facts import FACTS as FOLDER
from geode.hub_cards.facts import read_facts
from geode.hub_cards.terms import Part, Terms, apache_text, combined_terms, license_file, read_part
from tests.hub_cards.common_cards import FACTS, write_facts


ROOT = Path(__file__).resolve().parents[2]
BY_NC = Part("point_encoder", "facebook/sonata", "cc-by-nc-4.0")
OTHER_NC = Part("reconstructor", "org/vggt", "other", is_commercial=False)
MIT = Part("vision_tower", "org/vit", "mit")


def test_facts_are_completed_by_those_that_all_cards_state(tmp_path):
    facts = read_facts(write_facts(tmp_path), "model")
    common = yaml.safe_load((FOLDER / "common.yaml").read_text())
    assert facts.limitations == (*common["model"]["limitations"], *FACTS["limitations"])
    assert facts.conventions == tuple(common["all"]["conventions"])
    assert "arXiv:2511.11239" in facts.citation
    assert facts.parts[0] == Part(
        "vision_tower", "OpenGVLab/InternViT-300M-448px-V2_5", "mit", "abc", stated_by="facts"
    )
    assert facts.data == (Part("rooms", "org/rooms", "cc-by-4.0", "def", stated_by="facts"),)
    own = read_facts(write_facts(tmp_path, citation="@misc{a}", conventions=["Lengths are metres."]), "model")
    assert (own.citation, own.conventions) == ("@misc{a}", ("Lengths are metres.",))


@pytest.mark.parametrize("name", ["name", "summary", "license", "intended_use", "parts", "data"])
def test_a_fact_that_is_missing_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=rf"facts\.yaml lacks `{name}`, which the card of a model must state"):
        read_facts(write_facts(tmp_path, name), "model")


def test_all_facts_that_are_missing_are_named_at_once(tmp_path):
    with pytest.raises(
        ValueError, match="lacks `summary`, `intended_use`, `base_model`, which the card of an adapter must"
    ):
        read_facts(write_facts(tmp_path, "summary", "intended_use"), "adapter")


def test_a_metric_and_a_dataset_need_their_own_limitations(tmp_path):
    for kind in ("metric", "dataset"):
        with pytest.raises(ValueError, match="lacks `limitations`"):
            read_facts(write_facts(tmp_path, "limitations"), kind)
        with pytest.raises(ValueError, match="lacks `limitations`"):
            read_facts(write_facts(tmp_path, limitations=[]), kind)


def test_that_there_were_no_data_is_said_with_an_empty_list(tmp_path):
    assert read_facts(write_facts(tmp_path, data=[]), "model").data == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limitation": ["x"]}, r"unknown fact `limitation`\. Did you mean `limitations`\?"),
        ({"xyz": 1}, r"unknown fact `xyz`\. The facts are \['base_model'"),
        ({"limitations": "few"}, r"`limitations` must be a list of texts, got 'few'"),
        ({"limitations": [3]}, r"`limitations` must be a text, got 3"),
        ({"summary": ["x"]}, r"`summary` must be a text, got \['x'\]"),
        ({"license": "My Own"}, r"`license` must be a licence as the Hub names it.*got 'My Own'"),
        ({"data": ["rooms"]}, r"`data` must map names to their `source` and `license`, got \['rooms'\]"),
        ({"data": {"rooms": {"source": "x"}}}, r"`rooms` must have `source` and `license`.*got \['source'\]"),
        ({"data": {"rooms": "org/rooms"}}, r"`rooms` must have `source` and `license`.*got org/rooms"),
        ({"data": {"rooms": {"source": "x", "license": "MIT"}}}, r"`license` of `rooms` must be .* got 'MIT'"),
        ({"data": {"rooms": {"source": "x", "license": "mit", "sauce": 1}}}, r"got \['license', 'sauce', 'source'\]"),
        (
            {"data": {"a": {"source": "facebook/VGGT-1B", "license": "mit"}}},
            r"`license` of `a` is 'mit', and facebook/VGGT-1B states 'cc-by-nc-4\.0'",
        ),
        (
            {"data": {"a": {"source": "my disk", "license": "cc-by-nc-4.0", "is_commercial": True}}},
            r"`a` has the licence 'cc-by-nc-4\.0', which excludes commercial use, and `is_commercial` says otherwise",
        ),
        (
            {"data": {"a": {"source": "my disk", "license": "mit", "revision": 7}}},
            r"`revision` of `a` must be a str, got 7",
        ),
        ({"data": {"a": {"source": "my disk", "license": "other"}}}, r"`a` has the licence 'other', and no `link`"),
    ],
)
def test_what_is_wrong_with_a_fact_is_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_facts(write_facts(tmp_path, **changes), "model")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is none at .*none\.yaml"):
        read_facts(tmp_path / "none.yaml", "model")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"list\.yaml must hold a mapping of facts, got a list"):
        read_facts(tmp_path / "list.yaml", "model")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=r"broken\.yaml is not a YAML file"):
        read_facts(tmp_path / "broken.yaml", "model")
    with pytest.raises(ValueError, match=r"`kind` must be one of .* got 'poem'"):
        read_facts(tmp_path / "list.yaml", "poem")


def test_shipped_facts_are_complete_and_those_of_the_tiny_checkpoint_are_its_own():
    read_facts(FOLDER / "vsi_bench.yaml", "metric")
    facts = read_facts(FOLDER / "geode_tiny.yaml", "model")
    made = json.loads((geode.tiny_checkpoint() / "facts.json").read_text())
    assert facts.recipe == "make tiny"
    assert f"{made['train_scenes']:,} rendered rooms" in facts.summary
    rows = (geode.embedded_scene() / "train_questions.jsonl").read_text()
    assert facts.question in rows


def test_facts_in_the_documentation_are_complete(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(), flags=re.DOTALL)
    (tmp_path / "facts.yaml").write_text(text)
    facts = read_facts(tmp_path / "facts.yaml", "model")
    assert [part.name for part in facts.parts] == ["vision_tower", "language_model", "point_encoder"]
    assert combined_terms(facts.license, facts.parts).license == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("own", "parts", "want"),
    [
        ("apache-2.0", [], Terms("apache-2.0", True)),
        ("mit", [MIT], Terms("mit", True)),
        ("apache-2.0", [MIT, BY_NC], Terms("cc-by-nc-4.0", False)),
        ("cc-by-nc-sa-4.0", [BY_NC], Terms("cc-by-nc-sa-4.0", False)),
        ("cc-by-nc-sa-4.0", [BY_NC, OTHER_NC], Terms("other", False)),
        ("gpl-3.0", [MIT, BY_NC], Terms("other", False)),
        ("gpl-3.0", [MIT], Terms("gpl-3.0", None)),
        ("apache-2.0", [OTHER_NC], Terms("other", False)),
        ("apache-2.0", [BY_NC, OTHER_NC], Terms("other", False)),
        (
            "apache-2.0",
            [BY_NC, BY_NC._replace(license="cc-by-nc-sa-4.0")],
            Terms("other", False),
        ),
        ("apache-2.0", [MIT, OTHER_NC._replace(is_commercial=True)], Terms("other", True)),
        ("other", [MIT], Terms("other", None)),
    ],
)
def test_a_part_that_is_not_for_commerce_binds_the_whole(own, parts, want):
    assert combined_terms(own, parts) == want


def test_header_names_terms_that_the_hub_has_no_name_for():
    assert Terms("mit", True).header() == {"license": "mit"}
    want = {"license": "other", "license_name": "non-commercial", "license_link": "LICENSE"}
    assert Terms("other", False).header() == want
    assert Terms("other", None).header() == {**want, "license_name": "terms-of-its-parts"}


def test_licence_file_lists_every_part_and_ends_with_that_of_the_code():
    assert license_file("apache-2.0", [Part("a", "b/c", "apache-2.0")]) == (ROOT / "LICENSE").read_text()
    text = license_file(
        "apache-2.0", [MIT, BY_NC._replace(revision="abc"), Part("x", "a disk", "other", link="https://a.b")]
    )
    assert "- vision_tower (org/vit): mit, see https://huggingface.co/org/vit\n" in text
    assert (
        "- point_encoder (facebook/sonata at abc): cc-by-nc-4.0, see https://huggingface.co/facebook/sonata\n" in text
    )
    assert "- x (a disk): other, see https://a.b\n" in text
    assert "- what was added to these: apache-2.0\n" in text
    assert "As a whole it is not for commercial use.\n" in text
    assert text.endswith(apache_text())
    assert "what was added" not in license_file(None, [MIT])
    assert "commercial use." not in license_file("mit", [MIT]).removesuffix(apache_text())


def test_published_licences_are_known_in_any_case():
    assert read_part("a", {"source": "Facebook/Sonata", "license": "cc-by-nc-4.0"}).permits_commerce is False
    with pytest.raises(ValueError, match=r"Facebook/Sonata states 'cc-by-nc-4\.0'"):
        read_part("a", {"source": "Facebook/Sonata", "license": "apache-2.0"})
