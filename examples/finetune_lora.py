# SPDX-License-Identifier: Apache-2.0
"""
Fine-tune with LoRA on rows of your own, and merge the adapter into a plain model.

    python examples/finetune_lora.py
    python examples/finetune_lora.py DATA --model ORG/NAME --steps 2000 --learning-rate 1e-4

DATA holds `*.jsonl`, one object a line, with paths relative to DATA:
    {"video": "a.mp4", "geometry": "geometry/a", "question": "How long is the desk, in centimeters?", "answer": 142}

Numbers become `<REG>` tokens, whose value is regressed; data/readers/jsonl.py lists all fields. Without DATA, three rows are written first.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig
from sample_data import write_rows

import geode
from geode import GeodeForConditionalGeneration, GeodeProcessor
from geode.data.readers import read_records
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", nargs="?", type=Path)
parser.add_argument("--model", default=geode.tiny_checkpoint())
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--learning-rate", type=float, default=5e-3)
parser.add_argument("--out", type=Path, default=Path("example-lora"), help="adapter, and below it the merged model")
options = parser.parse_args()

data = options.data or write_rows(options.out / "data")
records = list(read_records("jsonl", data))
model = GeodeForConditionalGeneration.from_pretrained(options.model)
processor = GeodeProcessor.from_pretrained(options.model)
settings = GeodeStage2Config(
    str(options.out / "adapter"),
    media_root=str(data),
    max_steps=options.steps,
    learning_rate=options.learning_rate,
    drh_learning_rate=options.learning_rate,
    logging_steps=1,
    save_strategy="no",
    activation_checkpointing=False,  # what fits into memory need not be computed twice
    bf16=torch.cuda.is_available(),
    report_to="none",
)
lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
trainer = GeodeStage2Trainer(model, settings, train_dataset=records, processing_class=processor, peft_config=lora)
trainer.train()
trainer.save_model()  # the adapter, which `load_adapter` puts on the model again
trainer.model.merge_and_unload().save_pretrained(options.out / "merged")
processor.save_pretrained(options.out / "merged")
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
print(f"merged: {options.out / 'merged'}")
