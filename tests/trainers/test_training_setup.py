# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from peft import LoraConfig
from torch import nn

import geode
from geode.data.mixtures import Mixture, MixtureSource
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.drm_files import drm_origin
from geode.trainers.packing import ScenePacks
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import complete_peft_config
from geode.trainers.training_setup import (
    as_packs,
    freeze_except,
    frozen_modules,
    keep_in_eval,
    load_model,
    media_folders,
)
from tests.modeling_geode.common_geode import tiny_config
from tests.modeling_geode.common_hub import COMMIT, put_in_hub_cache
from tests.trainers.common_collator import make_records
from tests.trainers.common_training import settings


@pytest.fixture
def model():
    return GeodeForConditionalGeneration(tiny_config())


def test_freeze_except_trains_exactly_what_is_named(model):
    freeze_except(model, ["model.drm"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("model.drm.")}
    assert len(trained) > 10


def test_freeze_except_trains_a_shared_parameter_by_either_name(model):
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    freeze_except(model, ["lm_head", "drh"])
    assert model.model.language_model.embed_tokens.weight.requires_grad
    assert not model.model.language_model.norm.weight.requires_grad


@pytest.mark.parametrize("prefix", ["model.dr", "drm", "model.feature_injection"])
def test_freeze_except_refuses_what_names_nothing(model, prefix):
    with pytest.raises(ValueError, match=rf"got \['{prefix}'\].*'model.drm'"):
        freeze_except(model, ["drh", prefix])


def test_frozen_modules_are_the_largest_ones(model):
    freeze_except(model, ["model.drm", "drh"])
    found = frozen_modules(model)
    base = model.model
    assert {base.language_model, base.vision_tower, base.point_encoder, base.multi_modal_projector} <= set(found)
    assert not {base.drm, model.drh, model, base} & set(found)


def test_frozen_language_model_has_no_dropout_and_still_checkpoints(model):
    freeze_except(model, ["model.drm"])
    language_model = model.model.language_model
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        keep_in_eval(frozen_modules(model), language_model)
        layer = language_model.layers[0]
        assert layer.training is is_checkpointing
        assert not layer.self_attn.training
        assert not layer.mlp.training
        assert not any(module.training for module in model.model.vision_tower.modules())
        assert model.model.drm.training


def mixture(*sources) -> Mixture:
    return Mixture(name="m", sources=[MixtureSource(reader=reader, path=path) for reader, path in sources])


def test_media_folders_are_by_the_name_that_records_carry():
    found = media_folders([mixture(("rooms", "a"), ("jsonl", "b")), mixture(("rooms", "a"))], "DATA")
    assert found == {"synthetic_rooms": Path("DATA/a"), "jsonl": Path("DATA/b")}


def test_media_folders_refuse_two_for_one_source():
    with pytest.raises(ValueError, match=r"media of jsonl must lie in one folder, got DATA.a and DATA.b"):
        media_folders([mixture(("jsonl", "a"), ("jsonl", "b"))], "DATA")


def test_as_packs_packs_records_and_leaves_packs(tmp_path):
    args = GeodeStage2Config(**settings(tmp_path, tmp_path, questions_per_pack=3))
    records = make_records(count=6)
    packs = as_packs(records, args, shuffle=False)
    assert [len(pack) for pack in packs] == [3, 3]
    assert as_packs(packs, args, shuffle=False) is packs
    assert as_packs([records], args, shuffle=True) == [records]
    assert isinstance(as_packs([record.to_dict() for record in records], args, shuffle=True), ScenePacks)
    with pytest.raises(ValueError, match="at least one record, got none"):
        as_packs([], args, shuffle=True)


def test_frozen_modules_of_a_model_that_trains_are_none():
    assert frozen_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
    assert frozen_modules(nn.Linear(2, 2).requires_grad_(False))[0].in_features == 2


@pytest.mark.parametrize("overrides", [None, {"drm_config": {"question_conditioned": False}}])
def test_load_model_keeps_the_commit_and_an_adapter_names_it(tmp_path, monkeypatch, overrides):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    put_in_hub_cache(geode.tiny_checkpoint(), "org/base", tmp_path / "hf")
    model = load_model("org/base", overrides=overrides)
    assert drm_origin(model)["base_revision"] == COMMIT
    assert complete_peft_config(LoraConfig(), model).revision == COMMIT
    assert complete_peft_config(LoraConfig(revision="v1"), model).revision == "v1"
    assert "_commit_hash" not in model.config.to_dict()
    local = load_model(geode.tiny_checkpoint())
    assert drm_origin(local)["base_revision"] is None
    assert complete_peft_config(LoraConfig(), local).revision is None
