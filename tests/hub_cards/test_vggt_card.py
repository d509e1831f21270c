# SPDX-License-Identifier: Apache-2.0
"""Tests of the card of a VGGT folder: its facts are those of the model, and what it tells to run runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from geode.hub_cards import vggt_card
from geode.hub_cards.vggt_card import build_vggt_card
from geode.modeling_geode.vggt_geode import VggtModel, convert_vggt_checkpoint
from geode.modeling_geode.vggt_processing_geode import VggtImageProcessor
from tests.modeling_geode.common_hub import run_stranger


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "vggt"
SIZES = json.loads((FIXTURES / "config.json").read_text())["model"]
PLACEHOLDER = '"path/to/this/folder"'


@pytest.fixture(scope="module")
def model() -> VggtModel:
    return convert_vggt_checkpoint(FIXTURES / "model.safetensors", SIZES)


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


def facts(card: ModelCard) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, flags=re.MULTILINE))


def test_card_states_the_facts_of_the_model(model):
    card = build_vggt_card(model, source="org/vggt", revision="abc123")
    stated = facts(card)
    assert stated["Parameters"] == f"{sum(tensor.numel() for tensor in model.parameters()):,}"
    assert stated["Data type"] == "float32"
    assert stated["Frames"] == "sides are multiples of 14 pixels; the position table is for 56 x 56"
    assert stated["Blocks of the trunk"] == "{vit_depth} of width {embed_dim} with {vit_num_heads} heads".format(
        **SIZES
    )
    alternations = "{depth} of width {embed_dim} with {num_heads} heads".format(**SIZES)
    assert stated["Alternations of frame and global block"] == alternations
    assert stated["Blocks of the camera head"] == "{camera_trunk_depth}, run 4 times".format(**SIZES)
    assert stated["Layers that the depth and point heads read"] == "0, 2, 3, 4"
    assert "[org/vggt](https://huggingface.co/org/vggt) at commit `abc123`" in card.text
    assert "{{" not in card.text
    assert "None" not in " ".join(stated.values())


def test_card_names_every_data_type(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = VggtModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert facts(build_vggt_card(half, source="model.pt"))["Data type"] == "bfloat16 and float32"


def test_card_has_the_header_that_the_hub_reads(model, tmp_path):
    build_vggt_card(model, source="facebook/VGGT-1B", revision="abc123").save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "base_model": "facebook/VGGT-1B",
        "library_name": "transformers",
        "license": "cc-by-nc-4.0",
        "pipeline_tag": "image-to-3d",
        "tags": list(vggt_card.TAGS),
    }


def test_card_has_every_section_and_claims_no_score(model):
    card = build_vggt_card(model, source="model.pt")
    titles = re.findall(r"^## (.+)$", card.text, flags=re.MULTILINE)
    assert titles == ["Use", "Intended use", "Frames and units", "Limitations", "Evaluation", "Licence", "Citation"]
    assert section(card, "Evaluation") == "Not evaluated."
    for claim in ("no point tracker", "not in metres", "**unverified**"):
        assert claim in section(card, "Limitations")
    for claim in ("OpenCV", "`cam_from_world`", "**not metric**", "approximately the first camera"):
        assert claim in section(card, "Frames and units")
    assert "independent\nimplementation" in card.text
    assert vggt_card.TEMPLATE.read_text().isascii()


@pytest.mark.parametrize(
    ("source", "revision", "license_id", "want", "text"),
    [
        (
            "facebook/VGGT-1B",
            "abc",
            None,
            "cc-by-nc-4.0",
            "stated by their [source](https://huggingface.co/facebook/VGGT",
        ),
        ("facebook/vggt-1b", "abc", "cc-by-nc-4.0", "cc-by-nc-4.0", "They are not for commercial use."),
        ("facebook/VGGT-1B-Commercial", "abc", None, "other", "The weights have terms of their own"),
        ("org/vggt", "abc", None, None, "Licence of the weights: not stated; that of their source applies."),
        ("org/vggt", "abc", "mit", "mit", "The weights are under `mit`, as stated by whoever wrote this folder."),
        # A folder of this name on this machine says nothing of where its weights are from.
        ("VGGT-1B", None, None, None, "not stated; that of their source applies."),
        ("facebook/VGGT-1B", None, None, None, "not stated; that of their source applies."),
    ],
)
def test_card_is_honest_about_the_licence(model, source, revision, license_id, want, text):
    card = build_vggt_card(model, source=source, revision=revision, license_id=license_id)
    assert card.data.license == want
    assert text in section(card, "Licence")
    assert "commercial use" in section(card, "Licence") or want != "cc-by-nc-4.0"
    assert "code in this folder is under Apache-2.0" in section(card, "Licence")
    assert facts(card)["Licence of the weights"] == (want or "not stated")
    assert card.data.to_dict().get("license_link") == (f"https://huggingface.co/{source}" if want == "other" else None)
    assert card.data.base_model == (source if revision else None)


@pytest.mark.parametrize("license_id", ["", "MIT", "mit\ntags: x", "my licence"])
def test_a_licence_that_is_no_name_is_refused(model, license_id):
    with pytest.raises(ValueError, match=re.escape(f"such as 'cc-by-nc-4.0', got {license_id!r}")):
        build_vggt_card(model, source="org/vggt", license_id=license_id)


def test_a_licence_against_the_publisher_is_refused(model):
    with pytest.raises(ValueError, match=r"got 'mit', and facebook/VGGT-1B states 'cc-by-nc-4\.0'\. Leave it out"):
        build_vggt_card(model, source="facebook/VGGT-1B", revision="abc", license_id="mit")


def test_the_snippet_runs_where_geode_is_absent(model, tmp_path):
    folder = tmp_path / "vggt"
    model.save_pretrained(folder)
    VggtImageProcessor(image_size=56).save_pretrained(folder)
    build_vggt_card(model, source="model.pt").save(folder / "README.md")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"frame_{number}.png")
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 1
    assert snippets[0].count(PLACEHOLDER) == 1
    printed = run_stranger(snippets[0].replace(PLACEHOLDER, json.dumps(str(folder))), cwd=tmp_path)
    # 40 columns become 56, 30 rows become 42.
    assert printed.splitlines() == [
        "torch.Size([1, 2, 42, 56, 1])",
        "torch.Size([1, 2, 3, 4])",
        "torch.Size([2, 3, 3])",
    ]
