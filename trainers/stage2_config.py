# SPDX-License-Identifier: Apache-2.0
"""Options of stage 2, joint fine-tuning."""

from dataclasses import dataclass, field

from geode.trainers.training_config import GeodeTrainingConfig, check_positive


@dataclass(kw_only=True)
class GeodeStage2Config(GeodeTrainingConfig):
    """
    Options of [`GeodeStage2Trainer`], beside those of [`GeodeTrainingConfig`].

    Args:
        drm_path (`str`, *optional*):
            Result of stage 1: its folder, or `drm.safetensors` in it. Default: the rationale module of the model.
        learning_rate (`float`, defaults to 1e-5):
            Highest learning rate of language model and projector, or of the adapter.
        drh_learning_rate (`float`, defaults to 1e-4):
            That of the regression head and, with an adapter, of the control tokens' rows. In full fine-tuning these rows lie
            in the embedding matrix, which has one rate: `learning_rate`. Scaling their gradients would change nothing,
            because Adam divides by the gradients' size.
    """

    learning_rate: float = field(
        default=1.0e-5, metadata={"help": "Highest learning rate of language model and projector."}
    )
    drm_path: str | None = field(default=None, metadata={"help": "Result of stage 1."})
    drh_learning_rate: float = field(
        default=1.0e-4, metadata={"help": "Highest learning rate of the regression head."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive("drh_learning_rate", self.drh_learning_rate)


__all__ = ["GeodeStage2Config"]
