# SPDX-License-Identifier: Apache-2.0
import pytest

from geode.trainers.alignment_config import GeodeAlignmentConfig
from geode.trainers.alignment_trainer import GeodeAlignmentTrainer
from tests.trainers.common_collator import make_media, make_model, make_processor, make_records
from tests.trainers.common_training import changed, settings, snapshot, steps


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A trainer that has trained, and the parameters before."""
    processor = make_processor()
    args = GeodeAlignmentConfig(
        **settings(
            tmp_path_factory.mktemp("out"), root, max_steps=12, learning_rate=1.0e-2, activation_checkpointing=True
        )
    )
    trainer = GeodeAlignmentTrainer(
        make_model(processor), args, train_dataset=make_records(count=4), processing_class=processor
    )
    before = snapshot(trainer.model)
    trainer.train()
    return trainer, before


def test_projector_alone_has_gradients_and_changes(run):
    trainer, before = run
    projector = {name for name in before if name.startswith("model.multi_modal_projector.")}
    assert projector
    assert changed(before, trainer.model) == projector
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == projector


def test_loss_falls_through_the_frozen_language_model(run):
    losses = [entry["loss/ce"] for entry in steps(run[0])]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_neither_spatial_tokens_nor_control_tokens_are_shown(run):
    trainer, _ = run
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids = [trainer.processing_class.rationale_token_id]
    ids += [entry["token_id"] for entry in trainer.processing_class.control_tokens.values()]
    assert not any((batch["input_ids"] == token_id).any() for token_id in ids)
    assert not any(name.startswith(("point_", "camera_")) for name in batch)
    assert all("loss/drh" not in entry for entry in steps(trainer))


def test_frozen_parts_stay_in_evaluation_mode(run):
    model = run[0].model
    assert not model.model.vision_tower.training
    assert not model.model.drm.training
    assert not any(layer.self_attn.training for layer in model.model.language_model.layers)
    assert model.model.multi_modal_projector.training
