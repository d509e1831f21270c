# SPDX-License-Identifier: Apache-2.0
import json

import pytest

import geode
from geode.cli import main
from geode.hub_cards.licences import terms_of_part, terms_of_whole, verdict


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_card(folder, text):
    (folder / "README.md").write_text(f"---\n{text}\n---\n\n# A model\n")
    return folder


# What publishers state is in the specification of the parts: Qwen2.5-1.5B Apache-2.0, InternViT MIT, VGGT-1B non-commercial and
# VGGT-1B-Commercial with terms of its own, Sonata's weights CC-BY-NC-4.0.
@pytest.mark.parametrize(
    ("name", "want", "forbids"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "apache-2.0", False),
        ("OpenGVLab/InternViT-300M-448px-V2_5", "mit", False),
        ("facebook/VGGT-1B", "cc-by-nc-4.0", True),
        ("facebook/VGGT-1B-Commercial", "other", False),
        ("facebook/sonata", "cc-by-nc-4.0", True),
        ("OpenGVLab/InternVL3-2B-hf", None, None),
    ],
)
def test_terms_of_published_parts(tmp_path, name, want, forbids):
    terms = terms_of_part(name, COMMIT, tmp_path)
    assert (terms["license"], terms["is_non_commercial"]) == (want, forbids)
    assert terms["stated_by"] == (None if want is None else "publisher")
    # A copy may be of anything: its name tells nothing.
    assert terms_of_part(name, None, tmp_path)["license"] is None
    assert terms_of_part(name, None, tmp_path)["is_non_commercial"] is None


def test_terms_of_ones_own_are_linked(tmp_path):
    link = "https://huggingface.co/facebook/VGGT-1B-Commercial"
    assert terms_of_part("facebook/VGGT-1B-Commercial", COMMIT, tmp_path)["license_link"] == link
    write_card(tmp_path, "license: other\nlicense_name: vggt\nlicense_link: LICENSE.txt")
    terms = terms_of_part("facebook/VGGT-1B-Commercial", COMMIT, tmp_path)
    assert (terms["license"], terms["license_name"], terms["license_link"]) == ("other", "vggt", "LICENSE.txt")
    assert terms["is_non_commercial"] is False


@pytest.mark.parametrize(
    ("card", "want", "forbids"),
    [
        ("license: mit", "mit", False),
        ("license: cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", True),
        ("license: cc-by-sa-4.0", "cc-by-sa-4.0", None),
        ("license: other\nlicense_name: qwen-research", "other", True),
        ("license: other\nlicense_name: fair-noncommercial", "other", True),
        ("license: other\nlicense_name: own-terms", "other", None),
        ("license: [mit, cc-by-nc-4.0]", "other", True),
        ("tags: [vision]", None, None),
    ],
)
@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_card_speaks_for_a_part_that_is_not_known(tmp_path, card, want, forbids, revision):
    terms = terms_of_part("org/part", revision, write_card(tmp_path, card))
    assert (terms["license"], terms["is_non_commercial"]) == (want, forbids)
    assert terms["stated_by"] == (None if want is None else "card")


def test_a_card_about_code_does_not_free_weights_and_a_strict_one_binds(tmp_path):
    terms = terms_of_part("facebook/sonata", COMMIT, write_card(tmp_path, "license: apache-2.0"))
    assert (terms["license"], terms["is_non_commercial"]) == ("cc-by-nc-4.0", True)
    terms = terms_of_part("Qwen/Qwen2.5-1.5B-Instruct", COMMIT, write_card(tmp_path, "license: cc-by-nc-4.0"))
    assert terms["is_non_commercial"] is True


def parts_of(*terms):
    return [
        {"part": f"part{index}", "license": licence, "is_non_commercial": forbids}
        for index, (licence, forbids) in enumerate(terms)
    ]


@pytest.mark.parametrize(
    ("terms", "want"),
    [
        ([("mit", False), ("apache-2.0", False)], ("apache-2.0", False)),
        ([("mit", False), ("cc-by-nc-4.0", True), ("cc-by-nc-4.0", True)], ("cc-by-nc-4.0", True)),
        ([("cc-by-nc-4.0", True), ("cc-by-nc-sa-4.0", True)], ("other", True)),
        ([("cc-by-nc-4.0", True), ("other", False)], ("other", True)),
        ([("cc-by-nc-4.0", True), (None, None)], ("other", True)),
        ([("apache-2.0", True)], ("other", True)),
        ([("mit", False), ("other", False)], ("other", False)),
        ([("mit", False), ("gpl-3.0", None)], ("other", None)),
        ([("mit", False), (None, None)], (None, None)),
    ],
)
def test_the_whole_is_as_strict_as_its_strictest_part(terms, want):
    assert terms_of_whole(parts_of(*terms)) == want


def test_the_verdict_names_causes_and_what_is_not_known():
    text = verdict(parts_of(("cc-by-nc-4.0", True), ("mit", False), (None, None)))
    assert text == (
        "the whole: other, not for commercial use, because of part0; the licence of part2 is to be found out before anything is published"
    )
    assert verdict(parts_of(("mit", False))) == "the whole: apache-2.0"
    assert verdict(parts_of(("other", False))) == "the whole: other: the terms of each part hold, read them before use"


def test_report_lists_every_part(capsys, tmp_path):
    vggt = terms_of_part("facebook/VGGT-1B-Commercial", COMMIT, tmp_path)
    local = terms_of_part("qwen", None, tmp_path)
    parts = [
        {"part": "reconstructor", "name": "facebook/VGGT-1B-Commercial", "revision": COMMIT, **vggt},
        {"part": "language_model", "name": "qwen", "revision": None, **local},
    ]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "geode", "parts": parts}))
    assert main(["licences", str(tmp_path)]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["part", "from", "licence", "stated by", "commercial use"],
        ["reconstructor", f"facebook/VGGT-1B-Commercial@{COMMIT[:12]}", "other", "publisher", "yes"],
        ["language_model", "qwen (a local copy)", "not known", "nobody", "not known"],
        ["terms of reconstructor: https://huggingface.co/facebook/VGGT-1B-Commercial"],
        [],
        ["the whole: not known; the licence of language_model is to be found out before anything is published"],
    ]


def test_report_of_a_checkpoint_without_parts_is_what_its_card_states(capsys, tmp_path):
    assert main(["licences", str(geode.tiny_checkpoint())]) == 0
    assert capsys.readouterr().out == (
        "parts: none recorded\nthe whole: apache-2.0, as its card states (commercial use: yes)\n"
    )
    (tmp_path / "config.json").write_text('{"model_type": "geode"}')
    assert main(["licences", str(tmp_path)]) == 2
    assert "does not say what it was made from" in capsys.readouterr().err
    assert main(["licences", str(tmp_path / "none")]) == 2
    assert "there is nothing at" in capsys.readouterr().err


def test_report_needs_a_configuration(capsys, tmp_path):
    assert main(["licences", str(tmp_path)]) == 2
    assert f"`checkpoint` must hold a config.json, and '{tmp_path}' holds none" in capsys.readouterr().err
