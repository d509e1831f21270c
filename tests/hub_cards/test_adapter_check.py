# SPDX-License-Identifier: Apache-2.0
"""Tests of `geode check` on adapters of the shipped checkpoint: a sound one fits and loads, and each fault is said alone with a remedy."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import geode
from geode.cli import main
from geode.hub_cards.adapter_check import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_fit, check_on_base, load_on_base
from geode.hub_cards.adapter_load import load_whole
from geode.hub_cards.check import check, check_files
from geode.hub_cards.manifest import MANIFEST, hash_file
from geode.publishing import write_card

from .common_cards import write_facts


BASE = geode.tiny_checkpoint()
CONFIG = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
REG, VOCAB_SIZE = CONFIG["control_tokens"]["<REG>"]["token_id"], CONFIG["text_config"]["vocab_size"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = "base_model.model."
LAYER = f"{PREFIX}model.language_model.layers.0.self_attn.q_proj"
ROWS = f"{PREFIX}model.language_model.embed_tokens.token_adapter.trainable_tokens_delta"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """An adapter as stage 2 makes it, with random values, and with its card: its base model is `org/base` at a commit."""
    from peft import LoraConfig, get_peft_model

    from geode.trainers.stage2_trainer import complete_peft_config

    place = tmp_path_factory.mktemp("sound")
    model = geode.GeodeForConditionalGeneration.from_pretrained(BASE)
    config = complete_peft_config(LoraConfig(r=3, lora_alpha=4), model)
    get_peft_model(model, config).save_pretrained(place / "adapter")
    model.config.save_pretrained(place / "adapter")
    weights, generator = load_file(place / "adapter" / ADAPTER_WEIGHTS), torch.Generator().manual_seed(0)
    weights = {name: torch.randn(tensor.shape, generator=generator) * 0.02 for name, tensor in weights.items()}
    save_file(weights, place / "adapter" / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    facts = write_facts(place, "parts", base_model=_base(revision=COMMIT))
    write_card("adapter", place / "adapter", facts=facts)
    return place / "adapter"


def _base(**changes) -> dict:
    return {"source": "org/base", "license": "apache-2.0", **changes}


@pytest.fixture
def adapter(sound, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


def record(folder: Path) -> None:
    """Make the recorded hashes those of the files, so that only the fault itself is found."""
    document = json.loads((folder / MANIFEST).read_text())
    document["files"] = {name: hash_file(folder / name) for name in document["files"] if (folder / name).is_file()}
    (folder / MANIFEST).write_text(json.dumps(document))


def with_settings(**changes):
    def spoil(folder):
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings | changes))

    return spoil


def with_weights(change):
    def spoil(folder):
        weights = load_file(folder / ADAPTER_WEIGHTS)
        change(weights)
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    return spoil


def without(part):
    def change(weights):
        for name in [name for name in weights if part in name]:
            del weights[name]

    return with_weights(change)


def edit_card(old, new):
    def spoil(folder):
        text = (folder / "README.md").read_text()
        assert old in text
        (folder / "README.md").write_text(text.replace(old, new))

    return spoil


FAULTS = {
    "no settings": (
        lambda f: (f / ADAPTER_CONFIG).write_text("["),
        ADAPTER_CONFIG,
        "it is no object in JSON",
    ),
    "other kind": (with_settings(peft_type="IA3"), ADAPTER_CONFIG, "its `peft_type` is 'IA3' instead of 'LORA'"),
    "code by name": (
        with_settings(megatron_config={"a": 1}, megatron_core="evil"),
        ADAPTER_CONFIG,
        "`megatron_config` lets peft run code",
    ),
    "no base model": (with_settings(base_model_name_or_path=None), ADAPTER_CONFIG, "it names no base model"),
    "no revision": (with_settings(revision=None), ADAPTER_CONFIG, "it names no revision of org/base"),
    "moving revision": (with_settings(revision="main"), ADAPTER_CONFIG, "it names no revision of org/base"),
    "a path that is elsewhere": (
        with_settings(base_model_name_or_path="/home/somebody/base"),
        ADAPTER_CONFIG,
        "its base model is the path '/home/somebody/base', which is not here. State `base_model`",
    ),
    "card of another base": (
        edit_card("base_model: org/base", "base_model: org/other"),
        "README.md",
        "its header has org/other as `base_model`, and adapter_config.json has org/base",
    ),
    "section lost": (edit_card("## Limitations", "## Others"), "README.md", 'no section "Limitations"'),
    "no weights": (lambda f: (f / ADAPTER_WEIGHTS).rename(f / "drm.safetensors"), ADAPTER_WEIGHTS, "no weights"),
    "no head": (without(".drh."), ADAPTER_WEIGHTS, r"it lacks the regression head \(`drh`\)"),
    "no rows": (without("token_adapter"), ADAPTER_WEIGHTS, "it lacks the rows of the new tokens <3DBBOX>, <REG>"),
    "rows of one token alone": (
        with_settings(trainable_token_indices={"embed_tokens": [REG]}),
        ADAPTER_WEIGHTS,
        "it lacks the rows of the new tokens <3DBBOX>",
    ),
    "too few rows": (
        with_weights(lambda w: w.update({ROWS: w[ROWS][:1].clone()})),
        ADAPTER_WEIGHTS,
        "it has 1 rows of new tokens, and adapter_config.json names 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_an_adapter_is_said_alone_with_a_remedy(adapter, fault):
    spoil, where, what = FAULTS[fault]
    spoil(adapter)
    record(adapter)
    problems = [problem for problem in check_files(adapter) if "drm.safetensors" not in problem.where]
    assert [problem.where for problem in problems] == [where], problems
    assert re.search(what, str(problems[0]))
    assert "geode export" not in problems[0].remedy
    # Nothing is loaded then.
    report = check(adapter, base=BASE)
    assert report.notes[-1] == "not compared with its base model: there is something wrong with its files"


def test_pickles_beside_an_adapter_are_found_as_training_leaves_them(adapter):
    torch.save({"learning_rate": 1.0}, adapter / "training_args.bin")
    (adapter / "notes.txt").write_bytes(pickle.dumps([1]))
    found = {problem.where: problem.what for problem in check_files(adapter)}
    assert found["notes.txt"].startswith("is a pickle")
    assert "pickle" in found["training_args.bin"]


def test_a_changed_adapter_is_written_again_by_the_command_for_adapters(adapter):
    with_settings(lora_dropout=0.5)(adapter)
    (problem,) = check_files(adapter)
    assert str(problem).endswith(
        "changed after it was written. Write card and record again with `geode card adapter`."
    )


MISFITS = {
    "a matrix in": (f"{LAYER}.lora_A.weight", lambda t: t[:, :-1], r"lora_A.weight` of shape \[3, 127\] does not fit"),
    "a matrix out": (f"{LAYER}.lora_B.weight", lambda t: t[:-1], r"lora_B.weight` of shape \[127, 3\] does not fit"),
    "rows": (ROWS, lambda t: t[:, :-1], r"trainable_tokens_delta` of shape \[2, 127\] does not fit"),
    "a head": (
        f"{PREFIX}drh.heads.REG.0.bias",
        lambda t: t[:-1],
        r"`drh.heads.REG.0.bias` has shape \[\d+\] instead of \[\d+\]",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_tensor_of_a_wrong_shape_is_found_by_the_headers(adapter, misfit):
    name, change, what = MISFITS[misfit]
    with_weights(lambda weights: weights.update({name: change(weights[name]).clone()}))(adapter)
    (problem,) = check_fit(adapter, BASE)
    assert re.search(what, problem.what)
    assert problem.where == ADAPTER_WEIGHTS


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            with_weights(lambda w: w.update({f"{PREFIX}model.other.weight": torch.zeros(2)})),
            "`model.other.weight` belongs to nothing in the base model",
        ),
        (
            with_weights(
                lambda w: w.update({LAYER.replace(".0.", ".99.") + ".lora_A.weight": w[f"{LAYER}.lora_A.weight"] + 0})
            ),
            "layers.99.self_attn.q_proj.lora_A.weight` belongs to nothing in the base model",
        ),
        (without("q_proj.lora_B"), r"it lacks `.*q_proj.lora_B.weight`, and \d+ more such"),
        (without("drh.heads.REG.2.bias"), "it lacks `drh.heads.REG.2.bias`"),
        (
            with_settings(trainable_token_indices={"embed_tokens": [REG, VOCAB_SIZE]}),
            "trainable_tokens_delta` .* does not fit",
        ),
    ],
)
def test_what_belongs_to_nothing_or_is_missing_is_found_by_the_headers(adapter, change, what):
    change(adapter)
    assert any(re.search(what, problem.what) for problem in check_fit(adapter, BASE))


def test_a_part_that_the_base_model_lacks_is_left_to_loading(adapter, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    weights = load_file(BASE / "model.safetensors")
    plain = {name: tensor for name, tensor in weights.items() if "feature_injection" not in name}
    assert len(plain) < len(weights)
    save_file(plain, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert check_fit(adapter, tmp_path / "base") == []
    load_whole(adapter, tmp_path / "base")


def test_an_adapter_without_its_base_model_is_checked_as_far_as_can_be(adapter, capsys):
    assert main(["check", str(adapter)]) == 0
    *_, note, last = capsys.readouterr().out.splitlines()
    assert note == (
        "note: not checked: whether its tensors fit the base model, and whether it loads; give a folder of org/base with `--base`"
    )
    assert last == f"checked: {adapter}, no problems"


def test_check_loads_an_adapter_on_its_base_model(adapter, capsys):
    assert main(["check", str(adapter), "--base", str(BASE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"note: it fits the base model in {BASE}, and loads on it",
        f"checked: {adapter}, no problems",
    ]


FEWER_LAYERS = with_settings(target_modules=r".*language_model.*\.q_proj")


def test_what_peft_passes_over_is_found_by_loading(adapter):
    """The headers fit, but the settings put the adapter on fewer layers than it has tensors for."""
    FEWER_LAYERS(adapter)
    assert check_fit(adapter, BASE) == []
    with pytest.raises(
        ValueError, match=r"^\d+ of its tensors do not arrive in the model, or .* such as `.*_proj.lora"
    ):
        load_whole(adapter, BASE)


@pytest.mark.slow
def test_what_fails_while_an_adapter_is_loaded_is_said_with_its_step(adapter):
    FEWER_LAYERS(adapter)
    (problem,) = load_on_base(adapter, BASE)
    assert re.match(r"PeftModel.from_pretrained failed: ValueError: \d+ of its tensors do not arrive", problem.what)
    (problem,) = load_on_base(adapter, BASE, timeout_s=0.01)
    assert problem.what == "the run failed: it took more than 0.01 s"


def test_a_repository_may_not_name_a_folder_of_the_reader(adapter):
    with_settings(base_model_name_or_path=str(BASE))(adapter)
    (problem,), notes = check_on_base(adapter, None, is_on_hub=True, is_sound=True)
    assert problem.what == f"its base model is the path {str(BASE)!r}"
    assert notes[0].startswith("not checked: whether its tensors fit")


def test_a_base_model_that_lacks_a_part_is_refused(adapter, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    weights = load_file(BASE / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors and has 0 others, such as `model.language_model.norm.weight`"
    ):
        load_whole(adapter, tmp_path / "base")


def test_a_base_model_in_a_folder_here_is_taken_and_said(adapter):
    with_settings(base_model_name_or_path=str(BASE), revision=None)(adapter)
    without("drh.heads.REG.2.bias")(adapter)
    record(adapter)
    report = check(adapter)
    assert report.notes[-2].startswith(
        f"its base model is the folder {BASE}, which others do not have. State `base_model`"
    )
    (problem,) = report.problems
    assert problem.what == "it lacks `drh.heads.REG.2.bias`"


def test_base_that_cannot_be_taken_is_an_error(adapter, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (
            [str(adapter), "--base", str(tmp_path / "none")],
            "`base` must be the folder of the base model, and there is none at",
        ),
        (
            [str(adapter), "--base", str(tmp_path / "empty")],
            "`base` must hold a model, and there is no *.safetensors in",
        ),
        (
            [str(BASE), "--base", str(BASE)],
            f"`base` is for adapters, got {str(BASE)!r} for a folder without adapter_config.json",
        ),
    ):
        assert main(["check", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_card_lets_an_adapter_name_its_base_model(adapter, tmp_path):
    """Training leaves the path or the name that the base model was loaded by, and a commit if that is known."""
    for known, revision, stated in ((str(BASE), None, COMMIT), ("org/base", COMMIT, None), ("org/base", None, COMMIT)):
        with_settings(base_model_name_or_path=known, revision=revision)(adapter)
        facts = write_facts(tmp_path, "parts", base_model=_base(**({"revision": stated} if stated else {})))
        write_card("adapter", adapter, facts=facts)
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/base", COMMIT)
        assert check_files(adapter) == []
    for changes in ({"source": "org/other"}, {"revision": "abc"}):
        before = (adapter / ADAPTER_CONFIG).read_bytes()
        with pytest.raises(ValueError, match=r"`base_model` of the facts is 'org/.*Correct the facts"):
            write_card("adapter", adapter, facts=write_facts(tmp_path, "parts", base_model=_base(**changes)))
        assert (adapter / ADAPTER_CONFIG).read_bytes() == before
