# SPDX-License-Identifier: Apache-2.0
"""
Do on the device of `tests/remote_device.py` what was done on the CPU, and write down both: `python -m tests.run_remote_device OUT CASE ...`.

A process of its own, because whoever registers a device has it until the end, and libraries look for one.
"""

import contextlib
import json
import sys
import traceback
from pathlib import Path

import accelerate
import torch
import transformers
from peft import LoraConfig
from transformers import set_seed

import geode
from geode.data.feature_store import FeatureStore
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers.alignment_config import GeodeAlignmentConfig
from geode.trainers.alignment_trainer import GeodeAlignmentTrainer
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.precompute import VideoItem, precompute
from geode.trainers.stage1_config import GeodeStage1Config
from geode.trainers.stage1_trainer import GeodeStage1Trainer
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer
from tests.modeling_geode.common_geode import prepare_inputs, tiny_config, tiny_vggt
from tests.remote_device import REMOTE, RemoteDevice
from tests.trainers.common_collator import GEOMETRY, make_media, make_model, make_processor, make_records, text_record
from tests.trainers.common_training import settings, steps


ROOM = geode.embedded_scene()
QUESTIONS = ["Locate the sofa.", "How many chairs are in this room?"]
STAGES = {
    "alignment": (GeodeAlignmentTrainer, GeodeAlignmentConfig),
    "stage1": (GeodeStage1Trainer, GeodeStage1Config),
    "stage2": (GeodeStage2Trainer, GeodeStage2Config),
}


class Place:
    """Where a case happens: it moves models and inputs there."""

    def __init__(self, folder: Path, media: Path, *, is_remote: bool):
        self.folder, self.media, self.is_remote = folder, media, is_remote
        self.name = "remote" if is_remote else "cpu"
        self.out = folder / self.name

    def model(self, model):
        """Move a model. A parameter of another class is a new one, so that what was tied is tied again."""
        if self.is_remote:
            model.to(REMOTE).tie_weights()
            kinds = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
            assert kinds == {REMOTE}, kinds
        return model

    def inputs(self, inputs) -> dict:
        """Move inputs of a model."""
        if not self.is_remote:
            return dict(inputs)
        return {name: value.to(REMOTE) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def learn(model, inputs) -> list[float]:
    """Loss and norms of the gradients, which are where the model is."""
    loss = model.train()(**inputs).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert {parameter.grad.device for parameter in trained} == {model.device}
    return [loss.item(), *(parameter.grad.norm().item() for parameter in trained)]


def batch(place: Place, examples: list, *, attention: str = "sdpa", **options) -> list[float]:
    """A step on what the collator makes."""
    processor = make_processor()
    collator = GeodeDataCollator(processor=processor, media_root=place.media, geometry=GEOMETRY, **options)
    model = place.model(make_model(processor, attention=attention))
    return learn(model, place.inputs(collator(examples)))


def conditioned(place: Place) -> list[float]:
    """A step of a rationale module that reads the question."""
    set_seed(0)
    model = GeodeForConditionalGeneration(tiny_config(drm_config={"question_conditioned": True}))
    inputs = prepare_inputs(model.config, batch_size=3, has_control_tokens=True)
    question = {"question_input_ids": inputs["input_ids"][:, -5:]}
    inputs |= question | {"question_attention_mask": torch.ones_like(question["question_input_ids"])}
    return learn(place.model(model), place.inputs({**inputs, "labels": inputs["input_ids"]}))


def rationales() -> list:
    """Records for stage 1."""
    return [text_record(uid=f"text:{number}", rationale=f"Because of {number}.") for number in range(4)]


def shipped(place: Place) -> tuple:
    """The shipped model and its processor."""
    folder = geode.tiny_checkpoint()
    model = GeodeForConditionalGeneration.from_pretrained(folder).eval()
    return place.model(model), GeodeProcessor.from_pretrained(folder)


@torch.no_grad()
def generate(place: Place, **options) -> list[str]:
    """Answers of a batch of two questions."""
    model, processor = shipped(place)
    media = {"type": "video", "path": str(ROOM / "room.mp4"), "geometry": str(ROOM / "geometry")}
    chats = [[{"role": "user", "content": [media, {"type": "text", "text": question}]}] for question in QUESTIONS]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, padding_side="left"
    )
    inputs = place.inputs(inputs)
    set_seed(0)
    output = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, **options)
    return [answer.text for answer in processor.post_process_answers(output, input_ids=inputs["input_ids"])]


@torch.no_grad()
def ask(place: Place) -> list[str]:
    """Answers about a scene that is encoded once, and those after it was saved and loaded."""
    model, processor = shipped(place)
    scene = model.encode_scene(**processor.prepare_scene(video=ROOM / "room.mp4", geometry=ROOM / "geometry"))
    assert scene.rationale_tokens.device == model.device
    scene.save(place.out / "scene.safetensors")
    loaded = type(scene).load(place.out / "scene.safetensors")
    answers = [*model.ask(processor, scene, QUESTIONS), *model.ask(processor, loaded, QUESTIONS)]
    return [answer.text for answer in answers]


@torch.no_grad()
def reconstruct(place: Place) -> list[str]:
    """Answers from frames alone."""
    model, processor = shipped(place)
    model.attach_reconstructor(tiny_vggt())
    processor.geometry_frame_size = model.config.reconstructor_config.image_size
    scene = place.model(model).encode_scene(**processor.prepare_scene(video=ROOM / "room.mp4"))
    return [answer.text for answer in model.ask(processor, scene, QUESTIONS)]


def store(place: Place) -> list[float]:
    """What is stored of a video."""
    model, processor = shipped(place)
    items = [VideoItem("rooms/one.mp4", "geometry/one")]
    report = precompute(
        model, processor, items, place.out / "store", media_root=place.media, store_vision_features=True
    )
    assert report.num_scenes == 1, report.lines()
    found = FeatureStore(place.out / "store")
    return [tensor.float().norm().item() for key in found.keys() for tensor in found[key].tensors().values()]


def train(place: Place, stage: str, *, has_adapter: bool = False, **changes) -> list[float]:
    """Losses of a run, and of its evaluation with a generated answer and the gate. Nothing is saved: a storage cannot be remote."""
    trainer_class, config_class = STAGES[stage]
    records, processor = rationales() if stage == "stage1" else make_records(count=6), make_processor()
    changes = {"max_steps": 2, "num_eval_examples": 1, "shuffled_scene_gate": True, **changes}
    args = config_class(**settings(place.out / stage, place.media, **changes))
    data = {"train_dataset": records, "eval_dataset": records, "processing_class": processor}
    options = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if has_adapter else {}
    trainer = trainer_class(place.model(make_model(processor)), args, **data, **options)
    trainer.train()
    assert {parameter.device for parameter in trainer.model.parameters()} == {trainer.geode_model.device}
    return [*(step["loss"] for step in steps(trainer)), trainer.evaluate()["eval_loss"]]


def cases() -> dict:
    """Return the cases by name."""
    records, two_rooms = make_records(count=6), [*make_records(count=3), *make_records("rooms/two", count=3)]
    return {
        "rows of two rooms": lambda place: batch(place, two_rooms),
        "packs": lambda place: batch(place, [records[:3], records[3:]]),
        "packs, eager": lambda place: batch(place, [records], attention="eager"),
        "rationales": lambda place: batch(place, rationales(), target="rationale"),
        "digits": lambda place: batch(place, records, with_values=False),
        "no geometry": lambda place: batch(place, records[1:2], use_geometry=False),
        "fewer tokens": lambda place: batch(place, records, num_rationale_tokens=2),
        "question conditioned": conditioned,
        "generate": lambda place: generate(place, do_sample=False),
        "beams": lambda place: generate(place, num_beams=2),
        "sample": lambda place: generate(place, do_sample=True, num_return_sequences=2),
        "ask": ask,
        "frames alone": reconstruct,
        "store": store,
        **{stage: lambda place, stage=stage: train(place, stage) for stage in STAGES},
        "adapter in bf16": lambda place: train(
            place, "stage2", has_adapter=True, bf16=True, activation_checkpointing=True
        ),
    }


def main(folder: Path, names: list[str]) -> None:
    """Run cases in both places."""
    transformers.logging.set_verbosity_error()
    media = make_media(folder / "media")
    here, there = (Place(folder, media, is_remote=is_remote) for is_remote in (False, True))
    # The trainers are told by these where they are.
    devices = {owner: owner.device for owner in (accelerate.Accelerator, transformers.TrainingArguments)}
    found, known = {}, cases()
    for name in names:
        entry, case = found.setdefault(name, {}), known[name]
        for place in (here, there):
            place.out.mkdir(exist_ok=True)
            accelerate.state.AcceleratorState._reset_state(True)
            for owner, device in devices.items():
                owner.device = property(lambda self: REMOTE) if place.is_remote else device
            try:
                with RemoteDevice() if place.is_remote else contextlib.nullcontext():
                    entry[place.name] = case(place)
            except Exception:  # noqa: BLE001 - the test shows it
                entry["error"] = f"{place.name}: {traceback.format_exc()}"
    (folder / "found.json").write_text(json.dumps(found), encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
