# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from geode.configuration.configuration_geode import GeodeConfig
from geode.trainers.stage1_config import GeodeStage1Config
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.training_config import GeodeTrainingConfig, overridden
from tests.modeling_geode.common_geode import tiny_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "cut"}, r"`overlong` must be one of .*'cut'"),
        ({"questions_per_pack": 0}, r"`questions_per_pack` must be a whole number of at least 1, got 0"),
        ({"max_length": 2.5}, r"`max_length` .* got 2.5"),
        ({"num_frames": True}, r"`num_frames` .* got True"),
        ({"num_eval_examples": -1}, r"`num_eval_examples` .* at least 0, got -1"),
        ({"remove_unused_columns": True}, r"`remove_unused_columns` must be false"),
        ({"train_sampling_strategy": "group_by_length"}, r"got 'group_by_length'.*`questions_per_pack`"),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor` must be 0, got 0.1"),
        ({"model_overrides": "{nonsense"}, r"`model_overrides` must be JSON, got '\{nonsense'"),
        ({"model_overrides": "nonsense"}, r"`model_overrides` must be a mapping .* got 'nonsense'"),
        ({"model_overrides": {"drh": {}}}, r"fields of `GeodeConfig`, got 'drh'"),
        ({"model_overrides": {"drh_config": 3}}, r"must be a mapping of fields, got 3"),
        ({"model_overrides": {"drh_config": {"weight": 1}}}, r"fields of `GeodeDrhConfig`, got \['weight'\]"),
    ],
)
def test_options_are_checked_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        GeodeTrainingConfig("out", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            GeodeStage2Config,
            {"drh_learning_rate": "1e-4"},
            r"`drh_learning_rate` must be a positive number .* got '1e-4'",
        ),
        (GeodeStage1Config, {"use_geometry": False}, r"`use_geometry` must be true"),
        (GeodeStage1Config, {"alignment_loss_weight": 0.1}, r"0.1 needs `rationale_encoder_name_or_path`"),
        (GeodeStage1Config, {"alignment_loss_weight": -1}, r"`alignment_loss_weight` .* got -1"),
        (GeodeStage1Config, {"alignment_temperature": 0}, r"`alignment_temperature` .* got 0"),
        (
            GeodeStage1Config,
            {"alignment_loss_weight": 0.1, "rationale_encoder_name_or_path": "x", "per_device_train_batch_size": 1},
            r"at least 2, got 1",
        ),
    ],
)
def test_options_of_a_stage_are_checked_with_their_values(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind("out", use_cpu=True, bf16=False, **options)


def test_an_encoder_without_its_term_has_no_effect_and_says_so(caplog):
    GeodeStage1Config("out", use_cpu=True, bf16=False, rationale_encoder_name_or_path="x")
    assert "no effect while `alignment_loss_weight` is 0" in caplog.text


def test_activations_are_checkpointed_unless_someone_says_no():
    options = {"use_cpu": True, "bf16": False}
    assert GeodeTrainingConfig("out", **options).activation_checkpointing is True
    assert GeodeTrainingConfig("out", activation_checkpointing=False, **options).activation_checkpointing is False
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        assert GeodeTrainingConfig("out", gradient_checkpointing=False, **options).activation_checkpointing is False


def test_overrides_come_as_json_and_change_only_what_they_name():
    args = GeodeTrainingConfig(
        "out",
        use_cpu=True,
        bf16=False,
        model_overrides='{"drh_config": {"loss_weight": 0.5}, "reconstructor_config": null}',
    )
    config = tiny_config()
    new = overridden(config, args.model_overrides)
    assert (config.drh_config.loss_weight, new.drh_config.loss_weight) == (1.0, 0.5)
    new.drh_config.loss_weight = 1.0
    assert new.to_dict() == config.to_dict()


def test_overrides_are_checked_against_the_model():
    with pytest.raises(ValueError, match=r"fields of the model's, got \['layers'\]"):
        overridden(tiny_config(), {"text_config": {"layers": 3}})
    with pytest.raises(StrictDataclassClassValidationError, match="divisible"):
        overridden(tiny_config(), {"drm_config": {"num_attention_heads": 7}})
    assert overridden(GeodeConfig(), None).to_dict() == GeodeConfig().to_dict()


def test_dry_run_in_bf16_needs_no_accelerator():
    """On a machine without one the library refuses bf16, unless it is told to use the CPU."""
    config = GeodeTrainingConfig("out", bf16=True, dry_run=True)
    assert config.use_cpu is not torch.accelerator.is_available()
    assert config.bf16
    assert not GeodeTrainingConfig("out", use_cpu=False, bf16=False).use_cpu


def test_memory_is_pinned_only_for_an_accelerator(tmp_path):
    """Where there is none, torch would warn of it at every start."""
    arguments = GeodeTrainingConfig(str(tmp_path), bf16=False)
    assert arguments.dataloader_pin_memory is torch.accelerator.is_available()
