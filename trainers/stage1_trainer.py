# SPDX-License-Identifier: Apache-2.0
"""Stage 1: the rationale module learns tokens from which the frozen language model can tell the rationale."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from geode.modeling_geode.modeling_geode import GeodeCausalLMOutputWithPast, GeodeForConditionalGeneration
from geode.trainers.base_trainer import GeodeTrainer
from geode.trainers.collator import rationale_of, records_of
from geode.trainers.drm_files import drm_origin, load_drm, load_projection, save_drm
from geode.trainers.packing import IGNORED_LABEL, ScenePacks
from geode.trainers.stage1_config import GeodeStage1Config
from geode.trainers.training_setup import freeze_except


PROJECTION = "alignment_projection"
PROJECTION_FILE = f"{PROJECTION}.safetensors"


@dataclass
class ProjectedOutput(GeodeCausalLMOutputWithPast):
    """
    Output of a model whose rationale tokens are compared with texts.

    Args:
        rationale_embeds (`torch.Tensor` of shape `(batch_size, encoder_hidden_size)`, *optional*):
            The projected mean of each row's rationale tokens.
    """

    rationale_embeds: torch.Tensor | None = None


class GeodeStage1Trainer(GeodeTrainer):
    """
    Trains the rationale module, and nothing else. Arguments are those of [`GeodeTrainer`].

    Source: paper, section 2.1.2, Eq. 4: cross-entropy of the rationale, given E_spatio, by the frozen language model. The row
    is the chat's head, M `<spatio>` tokens, the question, which is not learned, and the rationale. Deviation: the optional
    `alignment_loss_weight` adds InfoNCE between the mean of E_spatio, through a linear layer that is thrown away, and the mean
    state of a frozen text encoder over the row's rationales (e_R, which no equation of the paper uses). Its other rows are
    those of the micro-batch that show other scenes.

    Checkpoints and result are `drm.safetensors` and `stage1.json`; see [`load_drm`]. Under FSDP and DeepSpeed, checkpoints
    (not the result) are those of these libraries, with the frozen parts.

    Example:
        ```python
        args = GeodeStage1Config("drm", mixture="stage1", data_root="DATA")
        trainer = GeodeStage1Trainer("geode-1.5b-aligned", args)
        trainer.train()
        trainer.save_model("drm")
        ```
    """

    _tag_names = ["geode", "stage-1"]  # noqa: RUF012
    _name = "Stage 1"
    args: GeodeStage1Config
    config_class = GeodeStage1Config
    extra_metrics = ["loss/alignment"]  # noqa: RUF012

    def __init__(self, model, args: GeodeStage1Config | None = None, **kwargs):
        super().__init__(model, args, **kwargs)
        if self.args.alignment_loss_weight:
            self.rationale_encoder.to(self.args.device)

    @staticmethod
    def trained_parts(model: GeodeForConditionalGeneration) -> list[str]:
        """Return the names of the parts that train."""
        return ["model.drm"]

    def collator_options(self, args: GeodeStage1Config) -> dict:
        """Return options of the collator that the stage adds."""
        return {
            "target": "rationale",
            "keep_visual_tokens": args.keep_visual_tokens,
            "rationale_from_answer": args.rationale_from_answer,
            "sample_num_rationale_tokens": args.sample_num_rationale_tokens,
        }

    def select_records(self, dataset, args: GeodeStage1Config):
        """Return the records that have a rationale. Packs are left as they are."""
        if isinstance(dataset, ScenePacks) or not dataset or isinstance(dataset[0], list | tuple):
            return dataset
        kept = [
            number
            for number in range(len(dataset))
            if rationale_of(records_of(dataset[number])[0], from_answer=args.rationale_from_answer) is not None
        ]
        if not kept:
            raise ValueError(f"Stage 1 needs records with a rationale, and none of {len(dataset)} has one.")
        return dataset.select(kept) if hasattr(dataset, "select") else [dataset[number] for number in kept]

    def prepare_model(self, model: PreTrainedModel, args: GeodeStage1Config) -> PreTrainedModel:
        """Freeze everything but the rationale module, and note what it belongs to."""
        freeze_except(model, self.trained_parts(model))
        self.origin = drm_origin(model)
        if args.alignment_loss_weight:
            name = str(args.rationale_encoder_name_or_path)
            self.rationale_tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
            self.rationale_encoder = AutoModel.from_pretrained(name).requires_grad_(False).eval()
            width = self.rationale_encoder.config.hidden_size
            # A part of the model, so that every launcher averages its gradients.
            setattr(model, PROJECTION, nn.Linear(model.config.text_config.hidden_size, width))
            model.register_forward_hook(_add_projection)
        return model

    # ---- the loss ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Count the rows of the whole optimiser step as well, over which the InfoNCE term is a mean."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.args.alignment_loss_weight:
            count = self._count_globally(torch.tensor(sum(len(batch["input_ids"]) for batch in batches)), device)
            for batch in batches:
                batch["num_alignment_rows"] = count
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute Eq. 4 and, where it is wanted, the InfoNCE term."""
        num_rows = inputs.pop("num_alignment_rows", None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.args.alignment_loss_weight:
            texts = self._rationales(inputs["labels"])
            losses = info_nce(
                outputs.rationale_embeds,
                self._embed(texts),
                temperature=self.args.alignment_temperature,
                is_same=same_scenes(inputs),
            )
            self._sums["train" if model.training else "eval"].add({"loss/alignment": (losses.sum(), len(losses))})
            term = losses.sum() / (len(losses) if num_rows is None else num_rows)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                # As the library scales the rest: gradients are averaged over processes, and the count is of all of them.
                term = term * (self.accelerator.num_processes // self.get_tp_size())
            loss = loss + self.args.alignment_loss_weight * term
        return (loss, outputs) if return_outputs else loss

    def total_loss(self, metrics: dict[str, float]) -> float:
        """Return the loss that the stage minimises, from the means of its terms."""
        return metrics["loss/ce"] + self.args.alignment_loss_weight * metrics.get("loss/alignment", 0.0)

    def _rationales(self, labels: torch.Tensor) -> list[str]:
        """What each row learns, as text; the rationales of a pack one after another."""
        tokenizer = self.processing_class.tokenizer
        rows = [row[row != IGNORED_LABEL] for row in labels.cpu()]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> torch.Tensor:
        """Mean state of the frozen text encoder, `(num_texts, hidden_size)`."""
        # Rationales are text of a dataset, which may spell the special tokens of any tokenizer.
        options = {"padding": True, "truncation": True, "split_special_tokens": True, "return_tensors": "pt"}
        inputs = self.rationale_tokenizer(texts, **options)
        inputs = {name: tensor.to(self.args.device) for name, tensor in inputs.items()}
        states = self.rationale_encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    # ---- the result ----

    @property
    def _saves_drm_only(self) -> bool:
        return not self.args.save_full_model

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir or "."
        if self._saves_drm_only:
            if self.args.should_save:
                save_drm(self.geode_model, output_dir, origin=self.origin, state_dict=state_dict)
            return
        state_dict = self.geode_model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: t for name, t in state_dict.items() if not name.startswith(f"{PROJECTION}.")})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        projection = getattr(self.geode_model, PROJECTION, None)
        if projection is not None and self.args.should_save and not self.is_fsdp_enabled:
            save_file(projection.state_dict(), os.path.join(output_dir, PROJECTION_FILE), metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._saves_drm_only and not self.is_fsdp_enabled:
            load_drm(self.geode_model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        projection = getattr(self.geode_model, PROJECTION, None)
        if projection is not None and not self.is_fsdp_enabled:
            load_projection(projection, Path(resume_from_checkpoint) / PROJECTION_FILE)

    def _load_best_model(self) -> None:
        if self._saves_drm_only and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_drm(self.geode_model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


def _add_projection(model, args, outputs):
    """Forward hook: project the mean of E_spatio, inside the model's forward, where launchers look for its gradients."""
    if outputs.rationale_hidden_states is not None:
        pooled = outputs.rationale_hidden_states.float().mean(dim=(1, 2))
        return ProjectedOutput(**outputs, rationale_embeds=getattr(model, PROJECTION)(pooled))
    return outputs


def info_nce(
    queries: torch.Tensor, keys: torch.Tensor, *, temperature: float, is_same: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Contrast each query with the keys of other rows, and each key with the queries of other rows.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), Eq. 4, in both
    directions as CLIP has it, over cosine similarities.

    Args:
        queries (`torch.Tensor` of shape `(num_rows, width)`): One for each row.
        keys (`torch.Tensor` of shape `(num_rows, width)`): Their counterparts.
        temperature (`float`): Divides the similarities.
        is_same (`torch.BoolTensor` of shape `(num_rows, num_rows)`, *optional*): Rows that are no contrast to each other.

    Returns:
        `torch.Tensor` of shape `(num_rows,)`: The mean of both directions.
    """
    queries, keys = F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)
    logits = queries @ keys.T / temperature
    if is_same is not None:
        itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(is_same & ~itself, -torch.inf)
    numbers = torch.arange(len(logits), device=logits.device)
    there = F.cross_entropy(logits, numbers, reduction="none")
    back = F.cross_entropy(logits.T, numbers, reduction="none")
    return (there + back) / 2


def same_scenes(inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """
    Say which rows of a batch show the same scene.

    Args:
        inputs (`dict[str, torch.Tensor]`): Inputs of the model.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, batch_size)`, *optional*: None if the rows have no geometry.
    """
    for name in ("point_token_positions", "point_coords", "geometry_frames"):
        if name in inputs:
            rows = inputs[name].flatten(1)
            return torch.stack([(rows == row).all(dim=1) for row in rows])
    return None


__all__ = ["GeodeStage1Trainer", "info_nce", "same_scenes"]
