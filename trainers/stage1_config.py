# SPDX-License-Identifier: Apache-2.0
"""Options of stage 1, rationale pretraining."""

import logging
from dataclasses import dataclass, field

from geode.trainers.training_config import GeodeTrainingConfig, check_positive


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GeodeStage1Config(GeodeTrainingConfig):
    """
    Options of [`GeodeStage1Trainer`], beside those of [`GeodeTrainingConfig`].

    > Parameters that control the rows

    Args:
        keep_visual_tokens (`bool`, defaults to `False`):
            Also show the language model the frames. Otherwise they reach it through the `<spatio>` tokens alone.
        rationale_from_answer (`bool`, defaults to `True`):
            Free texts of one turn without a rationale are rationales themselves, as those of complex ViCA-322K.
        sample_num_rationale_tokens (`list[int]`, *optional*):
            Numbers of `<spatio>` tokens of which each batch takes one, such as `[4, 8, 16]`. Evaluation has all of them.

    > Parameters that control the loss

    Args:
        alignment_loss_weight (`float`, defaults to 0):
            Weight of the InfoNCE term between E_spatio and the rationale's embedding. The paper's objective, Eq. 4, has none.
        rationale_encoder_name_or_path (`str`, *optional*):
            The frozen text encoder that makes the embedding; required by the term.
        alignment_temperature (`float`, defaults to 0.07):
            Divides the similarities of the term.

    > Parameters that control the result

    Args:
        save_full_model (`bool`, defaults to `False`):
            Checkpoints and result hold the whole model, instead of `drm.safetensors` and `stage1.json`.
    """

    learning_rate: float = field(default=1.0e-4, metadata={"help": "Highest learning rate."})
    keep_visual_tokens: bool = field(default=False, metadata={"help": "Also show the language model the frames."})
    rationale_from_answer: bool = field(default=True, metadata={"help": "Free texts are rationales themselves."})
    sample_num_rationale_tokens: list[int] | None = field(
        default=None, metadata={"help": "Numbers of <spatio> tokens of which each batch takes one."}
    )
    alignment_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the InfoNCE term; 0 is none."})
    rationale_encoder_name_or_path: str | None = field(
        default=None, metadata={"help": "Frozen text encoder of the term."}
    )
    alignment_temperature: float = field(default=0.07, metadata={"help": "Divides the similarities of the term."})
    save_full_model: bool = field(default=False, metadata={"help": "Save the frozen parts as well."})

    def __post_init__(self):
        super().__post_init__()
        if not self.use_geometry:
            raise ValueError("`use_geometry` must be true, got false: stage 1 trains the module that reads geometry.")
        check_positive("alignment_temperature", self.alignment_temperature)
        if self.alignment_loss_weight != 0:
            check_positive("alignment_loss_weight", self.alignment_loss_weight)
            if self.rationale_encoder_name_or_path is None:
                raise ValueError(
                    f"`alignment_loss_weight` {self.alignment_loss_weight} needs `rationale_encoder_name_or_path`, the text encoder "
                    "that embeds rationales; got None."
                )
            if self.per_device_train_batch_size < 2:
                raise ValueError(
                    "`alignment_loss_weight` compares the rows of a batch, so `per_device_train_batch_size` must be at least 2, got "
                    f"{self.per_device_train_batch_size}."
                )
        elif self.rationale_encoder_name_or_path is not None:
            logger.warning("`rationale_encoder_name_or_path` has no effect while `alignment_loss_weight` is 0.")


__all__ = ["GeodeStage1Config"]
