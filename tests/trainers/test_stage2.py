# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.drm_files import drm_origin, save_drm
from geode.trainers.licence_texts import read_texts
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer, load_adapter
from tests.modeling_geode.common_hub import COMMIT, put_in_hub_cache
from tests.trainers.common_collator import make_media, make_model, make_processor, make_records
from tests.trainers.common_training import changed, settings, snapshot, steps


# peft still reads the old name of the library's `is_activation_checkpointing`.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def make_trainer(processor, root):
    def make_trainer(folder, *, model=None, peft_config=None, **changes):
        return GeodeStage2Trainer(
            make_model(processor) if model is None else model,
            GeodeStage2Config(**settings(folder, root, **changes)),
            train_dataset=make_records(count=6),
            processing_class=processor,
            peft_config=peft_config,
        )

    return make_trainer


@pytest.fixture
def trainer_of(make_trainer, tmp_path):
    def trainer_of(*, folder="out", **options):
        return make_trainer(tmp_path / folder, **options)

    return trainer_of


TRAINED = ("model.language_model.", "model.multi_modal_projector.", "model.feature_injection.", "drh.")


def test_language_model_projector_head_and_injection_change_and_nothing_else(trainer_of):
    trainer = trainer_of(max_steps=3, per_device_train_batch_size=3, learning_rate=1.0e-3)
    before = snapshot(trainer.model)
    modes = []
    trainer.model.model.drm.register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.train()
    expected = {name for name in before if name.startswith(TRAINED)}
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == expected
    # A value is the last token that these answers learn, so that nothing is learned from feeding it back.
    assert changed(before, trainer.model) == {name for name in expected if not name.startswith("drh.feedback.")}
    assert modes == [False] * 3
    assert trainer.model.model.language_model.layers[0].self_attn.training


def test_every_trained_parameter_has_a_gradient_and_no_other(trainer_of):
    trainer = trainer_of()
    batch = trainer.data_collator([make_records(count=6)])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    found = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert found == {name for name, _ in trainer.model.named_parameters() if name.startswith(TRAINED)}


def test_model_without_injection_trains_without_it(processor, trainer_of):
    config = make_model(processor).config
    config.drm_config.inject_features = False
    trainer = trainer_of(model=GeodeForConditionalGeneration(config))
    assert not any("feature_injection" in name for name, _ in trainer.model.named_parameters())
    trainer.train()


def test_both_losses_fall(trainer_of):
    trainer = trainer_of(max_steps=16, learning_rate=2.0e-3, drh_learning_rate=3.0e-3, activation_checkpointing=True)
    trainer.train()
    for name in ("loss/ce", "loss/drh"):
        values = [entry[name] for entry in steps(trainer) if name in entry]
        assert sum(values[-4:]) < 0.7 * sum(values[:4]), name


def test_regression_head_has_its_own_learning_rate(trainer_of):
    trainer = trainer_of(learning_rate=1.0e-3, drh_learning_rate=5.0e-3, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    rates = {}
    for group in optimizer.param_groups:
        rates |= dict.fromkeys(group["params"], (group["lr"], group["weight_decay"]))
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert rates.keys() == set(trained.values())
    for name, parameter in trained.items():
        rate, decay = rates[parameter]
        assert rate == (5.0e-3 if name.startswith("drh.") else 1.0e-3), name
        assert decay == (0.0 if "bias" in name or "norm" in name else 0.1), name
    assert trainer.create_optimizer() is optimizer


def test_resumed_run_keeps_both_learning_rates(trainer_of, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole = trainer_of(folder="whole", **options)
    whole.train()
    resumed = trainer_of(folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert steps(resumed)[1:] == steps(whole)[1:]


def test_rationale_module_is_taken_from_stage_1(processor, trainer_of, tmp_path):
    other = make_model(processor)
    torch.nn.init.normal_(other.model.drm.queries)
    save_drm(other, tmp_path / "drm", origin=drm_origin(other))
    trainer = trainer_of(drm_path=str(tmp_path / "drm"))
    trainer.train()
    assert torch.equal(trainer.model.model.drm.queries, other.model.drm.queries)


def test_saved_model_loads_with_its_values(trainer_of, processor, tmp_path):
    trainer = trainer_of(max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = GeodeForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    batch = trainer.data_collator([make_records(count=6)])
    with torch.no_grad():
        expected, found = trainer.model.eval()(**batch), loaded(**batch)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.regression_values, expected.regression_values, equal_nan=True, rtol=0, atol=0)


def test_model_given_as_a_folder_is_loaded_with_its_overrides(processor, root, tmp_path):
    make_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    overrides = {"drh_config": {"loss_weight": 0.25}}
    args = GeodeStage2Config(**settings(tmp_path / "out", root, model_overrides=overrides, num_frames=2))
    trainer = GeodeStage2Trainer(str(tmp_path / "model"), args, train_dataset=make_records(count=6))
    assert trainer.processing_class.num_frames == 2
    trainer.train()
    (step,) = steps(trainer)
    assert step["loss"] == pytest.approx(step["loss/ce"] + 0.25 * step["loss/drh"], rel=1e-5)


# ---- licence texts of the parts that a model was assembled from ----


@pytest.fixture
def assembled(processor, tmp_path):
    """A model that says what it was assembled from, with the text that came with one of two parts."""
    model = make_model(processor)
    part = {"source": "elsewhere", "revision": None, "license": "other"}
    names = {"point_encoder": ["licenses/point_encoder-LICENSE"], "language_model": ["licenses/language_model-NOTICE"]}
    model.config.parts = [{"name": name, **part, "texts": texts} for name, texts in names.items()]
    model.save_pretrained(tmp_path / "assembled")
    (tmp_path / "assembled" / "licenses").mkdir()
    (tmp_path / "assembled" / "licenses" / "point_encoder-LICENSE").write_text("Not for commercial use.\n")
    return GeodeForConditionalGeneration.from_pretrained(tmp_path / "assembled")


def test_licence_texts_of_parts_go_with_what_is_trained(trainer_of, assembled, tmp_path, caplog):
    trainer = trainer_of(model=assembled, save_strategy="steps", save_steps=1)
    assert "lacks ['licenses/language_model-NOTICE'], and so will what is saved" in caplog.text
    shutil.rmtree(tmp_path / "assembled")  # a run may take days
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        found = {path.name: path.read_text() for path in (folder / "licenses").iterdir()}
        assert found == {"point_encoder-LICENSE": "Not for commercial use.\n"}
    again = trainer_of(folder="again", model=GeodeForConditionalGeneration.from_pretrained(tmp_path / "out"))
    again.save_model()
    assert [path.name for path in (tmp_path / "again" / "licenses").iterdir()] == ["point_encoder-LICENSE"]


def test_licence_texts_are_those_of_the_commit_that_was_loaded(assembled, tmp_path, monkeypatch):
    put_in_hub_cache(tmp_path / "assembled", "org/assembled", tmp_path / "hf")
    (tmp_path / "hf" / "hub" / "models--org--assembled" / "refs" / "main").write_text(
        "0" * 40
    )  # it has moved on since
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assembled.config._name_or_path, assembled.config._commit_hash = "org/assembled", COMMIT
    assert read_texts(assembled) == {"licenses/point_encoder-LICENSE": b"Not for commercial use.\n"}


def test_adapter_has_no_licence_texts_for_it_has_no_parts(trainer_of, assembled, tmp_path):
    trainer_of(model=assembled, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM")).save_model()
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "licenses").exists()


def test_model_whose_folder_is_gone_trains_without_licence_texts(trainer_of, assembled, tmp_path, caplog):
    shutil.rmtree(tmp_path / "assembled")
    trainer_of(model=assembled).save_model()
    assert "licence texts of the model's parts will be missing" in caplog.text
    assert (tmp_path / "out" / "config.json").is_file()


# ---- adapters ----


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def adapted(make_trainer, processor, adapter_folder):
    """An adapter that has trained on another rationale module than the base model's, and was saved."""
    other = make_model(processor)
    torch.nn.init.normal_(other.model.drm.queries)
    save_drm(other, adapter_folder / "drm", origin=drm_origin(other))
    trainer = make_trainer(
        adapter_folder / "out",
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"),
        drm_path=str(adapter_folder / "drm"),
        max_steps=3,
        per_device_train_batch_size=3,
        learning_rate=1.0e-2,
        activation_checkpointing=True,
    )
    before = snapshot(trainer.model)
    trainer.train()
    trainer.save_model()
    return trainer, before


def test_adapter_trains_beside_projector_head_and_new_rows(adapted, processor):
    trainer, before = adapted
    names = changed(before, trainer.model)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".feedback." not in name} == names
    kinds = ("lora_A", "lora_B", "token_adapter", "modules_to_save")
    assert [name for name in names if not any(kind in name for kind in kinds)] == []
    assert all("language_model" in name for name in names if "lora_" in name or "token_adapter" in name)
    saved = {name.split(".modules_to_save")[0].split(".")[-1] for name in names if "modules_to_save" in name}
    assert saved == {"drh", "multi_modal_projector", "feature_injection"}


def test_adapter_rows_of_control_tokens_learn_as_the_head_does(adapted):
    trainer, _ = adapted
    rates = {}
    for group in trainer.optimizer.param_groups:
        rates |= dict.fromkeys(group["params"], group["lr"])
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            is_fast = "token_adapter" in name or ".drh." in name
            assert rates[parameter] == (1.0e-4 if is_fast else 1.0e-2), name


def test_adapter_saves_loads_and_merges_with_its_values(adapted, processor, adapter_folder, tmp_path):
    trainer, _ = adapted
    batch = trainer.data_collator([make_records(count=6)])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch)
        loaded = load_adapter(make_model(processor), adapter_folder / "out")
        found = loaded(**batch)
        merged_model = loaded.merge_and_unload()
        merged = merged_model(**batch)
        merged_model.save_pretrained(tmp_path / "merged")
        again = GeodeForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()(**batch)
    assert not isinstance(merged_model, PeftModel)
    assert merged_model.lm_head.weight is merged_model.model.language_model.embed_tokens.weight
    for outputs in (found, merged, again):
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            outputs.regression_values, expected.regression_values, equal_nan=True, rtol=1e-4, atol=1e-4
        )


def test_adapter_folder_is_small_and_holds_what_trained(adapted, adapter_folder):
    names = load_file(adapter_folder / "out" / "adapter_model.safetensors").keys()
    for part in (".drh.", ".multi_modal_projector.", "lora_A", "token_adapter"):
        assert any(part in name for name in names), part
    assert not (adapter_folder / "out" / "model.safetensors").exists()
    assert (adapter_folder / "out" / "drm.safetensors").is_file()


def test_adapter_generates(adapted, processor):
    trainer, _ = adapted
    inputs = trainer.data_collator.prompt(make_records(count=2)[1])
    output = trainer.model.eval().generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert len(processor.post_process_answers(output, input_ids=inputs["input_ids"])) == 1


def test_second_adapter_is_refused(adapted, trainer_of):
    with pytest.raises(ValueError, match="has an adapter already"):
        trainer_of(model=adapted[0].model, peft_config=LoraConfig(r=2))
