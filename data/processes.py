# SPDX-License-Identifier: Apache-2.0
"""Processes that were launched together and share long work."""

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


LONGEST_WAIT = timedelta(days=30)  # one process may have much longer videos than the others


def process_state() -> PartialState:
    """
    Tell which of the launched processes this is, and its device. The first call joins the others.

    Without an accelerator the processes of `torchrun` join on the CPU. Each would otherwise take itself for the only one, and
    write over the others.

    Returns:
        [`PartialState`]: The state.
    """
    is_on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=is_on_cpu, timeout=LONGEST_WAIT)


__all__ = ["LONGEST_WAIT", "process_state"]
