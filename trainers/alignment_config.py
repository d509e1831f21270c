# SPDX-License-Identifier: Apache-2.0
"""Options of the alignment stage."""

from dataclasses import dataclass, field

from geode.trainers.training_config import GeodeTrainingConfig


@dataclass(kw_only=True)
class GeodeAlignmentConfig(GeodeTrainingConfig):
    """
    Options of [`GeodeAlignmentTrainer`]: those of [`GeodeTrainingConfig`] with other defaults.

    The rationale module and the regression head are not trained yet, so by default there are no `<spatio>` tokens, and numbers
    are digits.

    Args:
        learning_rate (`float`, defaults to 1e-3): Highest learning rate.
        use_geometry (`bool`, defaults to `False`): See [`GeodeTrainingConfig`].
        with_values (`bool`, defaults to `False`): See [`GeodeTrainingConfig`].
    """

    learning_rate: float = field(default=1.0e-3, metadata={"help": "Highest learning rate."})
    use_geometry: bool = field(default=False, metadata={"help": "Show <spatio> tokens, which are not trained yet."})
    with_values: bool = field(default=False, metadata={"help": "Regress numbers, by a head that is not trained yet."})


__all__ = ["GeodeAlignmentConfig"]
