# SPDX-License-Identifier: Apache-2.0
"""A run that is asked to end (SIGTERM, as schedulers send it before they kill) saves after the step it is at, and ends."""

import logging
import signal
import threading

import torch
from transformers import TrainerCallback


logger = logging.getLogger(__name__)


class StoppedBySignal(Exception):
    """Training has ended early, and what it was at is saved."""


class SaveOnSigterm(TrainerCallback):
    """
    Save a checkpoint after the step in which SIGTERM arrives, and leave training with [`StoppedBySignal`].

    The library's `enable_jit_checkpoint` saves between the gradients and the step that they are for, after which a resumed run
    has other random numbers than one that nobody stopped; and it goes on to the end of the script, as if training were finished.

    Args:
        accelerator (`accelerate.Accelerator`): That of the run, whose processes stop after the same step.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.is_asked, self._before = False, None

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the signal over."""
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number, frame) -> None:
        self.is_asked = True

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint, in all processes if one of them was asked to end."""
        if args.world_size > 1:
            asked = torch.tensor(int(self.is_asked), device=self.accelerator.device)
            self.is_asked = bool(self.accelerator.reduce(asked, "sum"))
        if self.is_asked:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Leave, once the checkpoint is there."""
        if self.is_asked:
            self.release()
            raise StoppedBySignal(
                f"Stopped by SIGTERM after step {state.global_step} of {state.max_steps}, which is saved. "
                "The same command with `--resume_from_checkpoint true` goes on."
            )

    def on_train_end(self, args, state, control, **kwargs):
        """Give the signal back."""
        self.release()

    def release(self) -> None:
        """Let SIGTERM do what it did before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None


__all__ = ["SaveOnSigterm", "StoppedBySignal"]
