# SPDX-License-Identifier: Apache-2.0
"""What the trainers of all stages share: losses as means over the global batch, what is logged, and evaluation."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.base_trainer import _BaseTrainer  # private, but the base of every trainer of trl; checked on trl 1.16

from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers.checkpoints import checkpoint_to_resume, find_damage, write_checksums
from geode.trainers.collator import GeodeDataCollator, exchanged_scenes, records_of
from geode.trainers.licence_texts import read_texts, write_texts
from geode.trainers.packing import IGNORED_LABEL
from geode.trainers.training_card import build_training_card
from geode.trainers.training_config import GeodeTrainingConfig
from geode.trainers.training_metrics import MetricSums, batch_sums, count_regression_targets, metric_names
from geode.trainers.training_setup import (
    adapt_processor,
    as_packs,
    build_collator,
    freeze_except,
    frozen_modules,
    keep_in_eval,
    keep_inputs_exact,
    load_mixtures,
    load_model,
)


logger = logging.getLogger(__name__)

EXAMPLES_FILE = "eval_examples.jsonl"


class GeodeTrainer(_BaseTrainer):
    """
    The part of training that does not depend on the stage; use the trainer of a stage.

    Every loss is a mean over its *global* batch: all micro-batches of an optimiser step, of all processes. Whatever is logged
    besides it (`loss/ce`, `loss/drh`, `token_accuracy`, `mae/<REG>`, `mra/<REG>`, ...) is a ratio of sums over the
    logging window and all processes, and in evaluation over the whole set.

    Args:
        model ([`GeodeForConditionalGeneration`], a PEFT model of one, or `str`):
            The model; a path or Hub id is loaded.
        args ([`GeodeTrainingConfig`], *optional*):
            The stage's configuration.
        data_collator (`Callable`, *optional*):
            Default: a [`GeodeDataCollator`] made from `args`.
        train_dataset (*optional*):
            Records, their dicts, a `datasets.Dataset` of these, or packs; the default is `args.mixture`.
        eval_dataset (*optional*):
            Likewise, or a dict of several; the default is `args.eval_mixture`.
        processing_class ([`GeodeProcessor`], *optional*):
            The processor; the default is the one of the model's folder.
        callbacks (`list`, *optional*):
            See [`~transformers.Trainer`].
        optimizers (`tuple`, defaults to `(None, None)`):
            Optimiser and schedule.

    Raises:
        ValueError: If there is nothing to train on, or several devices are visible to one process.
    """

    _tag_names = ["geode"]  # noqa: RUF012 - the base class's form
    _name = "GEODE"
    _paper = {  # noqa: RUF012
        "title": "Beyond Flatlands: Unlocking Spatial Intelligence by Decoupling 3D Reasoning from Numerical Regression",
        "id": "2511.11239",
    }
    # The model divides by counts of the whole step, which `get_batch_samples` takes.
    loss_is_scaled_for_ga = True  # type: ignore[assignment]
    args: GeodeTrainingConfig
    config_class = GeodeTrainingConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: GeodeTrainingConfig | None = None,
        *,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: GeodeProcessor | None = None,
        callbacks=None,
        optimizers=(None, None),
    ):
        args = self.config_class() if args is None else args
        if args.n_gpu > 1:
            raise ValueError(
                f"One process must have one device, got {args.n_gpu}: scenes cannot be scattered. Start one process for each "
                "with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
            )
        source = model if isinstance(model, str) else model.config._name_or_path
        if isinstance(model, str):
            model = load_model(model, overrides=args.model_overrides)
        if processing_class is None:
            processing_class = GeodeProcessor.from_pretrained(source)
        self.geode_model: GeodeForConditionalGeneration = _without_adapter(model)
        self._licence_texts = read_texts(self.geode_model)
        adapt_processor(processing_class, args, self.geode_model.config)
        model = self.prepare_model(model, args)
        if train_dataset is None and eval_dataset is None:
            train_dataset, eval_dataset = load_mixtures(args)
        if train_dataset is None and eval_dataset is None:
            raise ValueError("There is nothing to train on: give `train_dataset`, or name a `mixture`.")
        if data_collator is None:
            options = self.collator_options(args)
            data_collator = build_collator(args, self.geode_model, processing_class, **options)
        self.frozen_parts = frozen_modules(model)
        self.eval_collator = _full_size(data_collator)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=as_packs(self.select_records(train_dataset, args), args, shuffle=True),
            eval_dataset=self._eval_packs(eval_dataset, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if (self.is_deepspeed_enabled or self.is_fsdp_enabled) and self.args.bf16:
            logger.warning(
                "DeepSpeed and FSDP compute with weights of the regression head that bf16 rounds to three digits, and with them "
                "values. DDP computes with float32: see configuration/accelerate."
            )
        names = metric_names(self.geode_model.config.control_tokens) + self.extra_metrics
        self._sums = {mode: MetricSums(names, self.args.device) for mode in ("train", "eval")}

    # ---- what a stage decides ----

    extra_metrics: list[str] = []  # noqa: RUF012

    @staticmethod
    def trained_parts(model: GeodeForConditionalGeneration) -> list[str]:
        """Return the names of the parts that train."""
        raise NotImplementedError

    def collator_options(self, args: GeodeTrainingConfig) -> dict:
        """Return options of the collator that the stage adds."""
        return {}

    def select_records(self, dataset, args: GeodeTrainingConfig):
        """Return the part of a dataset that the stage can train on."""
        return dataset

    def prepare_model(self, model: PreTrainedModel, args: GeodeTrainingConfig) -> PreTrainedModel:
        """Freeze what does not train. A model with an adapter keeps what it was made with."""
        if model is self.geode_model:
            freeze_except(model, self.trained_parts(model))
        return model

    @classmethod
    def for_dry_run(cls, model: GeodeForConditionalGeneration, args: GeodeTrainingConfig, peft_config=None):
        """Freeze a model without weights as training would."""
        freeze_except(model, cls.trained_parts(model))
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """
        Train.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Where to go on, see [`checkpoint_to_resume`]: True is the last whole checkpoint of the output folder.
            trial (*optional*):
                See [`~transformers.Trainer.train`].
            ignore_keys_for_eval (`list[str]`, *optional*):
                Likewise.

        Returns:
            `TrainOutput`: Steps, training loss and speed.

        Raises:
            ValueError: If the checkpoint was not written to its end.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
        return super().train(checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)

    # ---- the step ----

    def _run_epoch(self, model, epoch, train_dataloader, *args, **kwargs):
        # A run that had ended is resumed: the library makes one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        # Resuming within an epoch wraps the loader so that dataset and sampler are not told the epoch: other packs would follow.
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(epoch)
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the library's accelerator, which leaves inputs as they are."""
        super().create_accelerator_and_postprocess()
        keep_inputs_exact(self.accelerator)

    def _prepare_input(self, data):
        # For DeepSpeed the library would round points and regression targets to the model's dtype.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """
        Count the regression targets of the whole optimiser step, as the library counts its tokens.

        Each micro-batch takes the count along, so that its regression loss is a share of the mean over the step.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            count = self._count_globally(
                torch.stack([count_regression_targets(batch) for batch in batches]).sum(), device
            )
            for batch in batches:
                batch["num_regression_targets"] = count
        return batches, num_items

    def _count_globally(self, count: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Add up over processes where the library does so with its tokens; those that share a batch count once."""
        count = count.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the loss of a micro-batch, its share of the global batch's mean, and count what is logged."""
        if model.training:
            keep_in_eval(self.frozen_parts, self.geode_model.model.language_model)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        counted = {**inputs} if num_items_in_batch is None else {**inputs, "num_items_in_batch": num_items_in_batch}
        sums = batch_sums(counted, outputs, self.geode_model.config.control_tokens)
        self._sums["train" if model.training else "eval"].add(sums)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; with a window's training loss go the window's ratios."""
        if "loss" in logs:
            logs |= self._sums["train"].pop(self.accelerator.gather)
        super().log(logs, start_time)

    # ---- evaluation ----

    def _eval_packs(self, dataset, args):
        if isinstance(dataset, dict):
            return {name: self._eval_packs(part, args) for name, part in dataset.items()}
        return as_packs(self.select_records(dataset, args), args, shuffle=False)

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the loader of an evaluation, which shows every scene with all its rationale tokens."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._eval_packs(eval_dataset, self.args)
        return self._loader_with(self.eval_collator, eval_dataset)

    def _loader_with(self, collator, eval_dataset):
        training_collator, self.data_collator = self.data_collator, collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """Evaluate a batch. Rows that fill the last batch of several processes up are not counted."""
        state = self.accelerator.gradient_state
        if self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
            kept = max(0, state.remainder - self.args.process_index * self.args.eval_batch_size)
            inputs["labels"][kept:] = IGNORED_LABEL
            inputs["regression_targets"][kept:] = torch.nan
        inputs = {**inputs, "num_regression_targets": count_regression_targets(inputs)}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix: str = "eval",
    ):
        """
        Evaluate; then, in `evaluate`, once more with other scenes shown, and generate some answers.

        The losses are means over the set, not means of the batches' means.
        """
        output = self._counted_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if description != "Evaluation" or not isinstance(self.eval_collator, GeodeDataCollator):
            return output
        dataset = dataloader.dataset
        exchanged = exchanged_scenes(dataset) if self.args.shuffled_scene_gate else {}
        if exchanged:
            collator = dataclasses.replace(self.eval_collator, shown_scenes=exchanged)
            # The library keeps a loader of `self.eval_dataset` for later evaluations.
            kept, self._eval_dataloaders = getattr(self, "_eval_dataloaders", {}), {}
            try:
                loader = self._loader_with(collator, dataset)
            finally:
                self._eval_dataloaders = kept
            shuffled = self._counted_loop(loader, "Other scenes", True, ignore_keys, f"{metric_key_prefix}_shuffled")
            output.metrics.update(shuffled.metrics)
        self._show_examples(self.generate_examples(dataset), metric_key_prefix)
        return output

    def _counted_loop(self, dataloader, description, prediction_loss_only, ignore_keys, prefix):
        self._sums["eval"].pop()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, prefix)
        metrics = self._sums["eval"].pop(self.accelerator.gather)
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        if "loss/ce" in metrics:
            output.metrics[f"{prefix}_loss"] = self.total_loss(metrics)
        return output

    def total_loss(self, metrics: dict[str, float]) -> float:
        """Return the loss that the stage minimises, from the means of its terms."""
        weight = self.geode_model.config.drh_config.loss_weight
        return metrics["loss/ce"] + weight * metrics.get("loss/drh", 0.0)

    @torch.no_grad()
    def generate_examples(self, dataset) -> list[dict]:
        """
        Generate answers to some questions, spread over a dataset.

        Every process generates the same ones, since the weights may be sharded.

        Args:
            dataset: Packs or records.

        Returns:
            `list[dict]`: `uid`, `question`, `expected` and `answer`.
        """
        collator, examples = self.eval_collator, []
        for number in range(min(self.args.num_eval_examples, len(dataset))):
            pack = records_of(dataset[number * len(dataset) // self.args.num_eval_examples])
            record = pack[number % len(pack)]
            inputs = self._prepare_inputs(collator.prompt(record))
            output = self.model.generate(
                **inputs, max_new_tokens=self.args.max_new_tokens, do_sample=False, return_dict_in_generate=True
            )
            (answer,) = self.processing_class.post_process_answers(output, input_ids=inputs["input_ids"])
            examples.append(
                {
                    "uid": record.uid,
                    "question": record.prompt,
                    "expected": collator.expected_answer(record),
                    "answer": answer.text,
                }
            )
        return examples

    def _show_examples(self, examples: list[dict], prefix: str) -> None:
        if not examples or not self.is_world_process_zero():
            return
        rows = [f"{entry['question']} | {entry['expected']} | {entry['answer']}" for entry in examples]
        logger.info("Step %d, question | expected | answer:\n%s", self.state.global_step, "\n".join(rows))
        folder = Path(self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / EXAMPLES_FILE, "a", encoding="utf-8") as file:
            for entry in examples:
                line = {"step": self.state.global_step, "set": prefix, **entry}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and not isinstance(self.model, PeftModel):  # an adapter holds no part's weights
            write_texts(self._licence_texts, Path(output_dir or self.args.output_dir or "."))

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        # The state is written last, and says that the rest is there. What an earlier run left says nothing about this one.
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                write_checksums(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # `torch.save` has a RuntimeError for a full disk
            if (
                find_damage(folder, without_optimizer=True) is None
            ):  # the Hub refused it, or no checksums could be written
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # nothing could go on from it, and others may need the room
            if "DataLoader worker" in str(error):  # of a signal, which may come at any moment
                raise
            raise OSError(
                f"{folder} could not be written ({error}). Make room, or name another `output_dir`; the same command with "
                "`--resume_from_checkpoint true` goes on from the last checkpoint."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state follows, and must not say so before every process has written.
        self.accelerator.wait_for_everyone()

    # ---- the result ----

    def _send_telemetry(self):
        """Send nothing: the base class reports each run to its authors, which users of this package did not ask for."""

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags=None
    ) -> None:
        """
        Write `README.md` from the facts of the run.

        Args:
            model_name (`str`, *optional*): Title; default the output folder's name.
            dataset_name (`str`, *optional*): What was trained on; default the mixture.
            tags (`str` or `list[str]`, *optional*): More tags.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        card = build_training_card(
            self,
            model_name=model_name or folder.resolve().name,
            dataset_name=dataset_name or self.args.mixture,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        )
        folder.mkdir(parents=True, exist_ok=True)
        card.save(folder / "README.md")


def _without_adapter(model: nn.Module) -> GeodeForConditionalGeneration:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _full_size(collator):
    """The collator of an evaluation: every scene has all its rationale tokens."""
    if not isinstance(collator, GeodeDataCollator):
        return collator
    return dataclasses.replace(collator, sample_num_rationale_tokens=None)


__all__ = ["EXAMPLES_FILE", "GeodeTrainer"]
