# SPDX-License-Identifier: Apache-2.0
"""Alignment: the 2D projector learns to speak to the frozen language model."""

from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.alignment_config import GeodeAlignmentConfig
from geode.trainers.base_trainer import GeodeTrainer


class GeodeAlignmentTrainer(GeodeTrainer):
    """
    Trains the 2D projector, and nothing else. Arguments are those of [`GeodeTrainer`].

    Source: paper, section 3.1, which names the corpus; what trains is our decision 12 (docs/architecture.md).

    Example:
        ```python
        args = GeodeAlignmentConfig("aligned", mixture="alignment", data_root="DATA")
        GeodeAlignmentTrainer("geode-1.5b", args).train()
        ```
    """

    _tag_names = ["geode", "alignment"]  # noqa: RUF012
    _name = "Alignment"
    args: GeodeAlignmentConfig
    config_class = GeodeAlignmentConfig

    @staticmethod
    def trained_parts(model: GeodeForConditionalGeneration) -> list[str]:
        """Return the names of the parts that train."""
        return ["model.multi_modal_projector"]


__all__ = ["GeodeAlignmentTrainer"]
