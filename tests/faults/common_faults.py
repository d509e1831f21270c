# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed at random moments, and started again."""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.trainers.common_launch import ROOT


SEED = "FAULTS_SEED"  # the environment variable that repeats a run
MAX_SECONDS = 600


def seeded_generator() -> random.Random:
    """A generator of a new seed, which pytest shows of a failure, or of that in the environment."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(1 << 32))
    print(f"{SEED}={seed} repeats this test.")  # noqa: T201
    return random.Random(seed)


class Ended(NamedTuple):
    """How a command ended: its exit code, minus a signal's number, the seconds it took, and what it printed."""

    code: int
    seconds: float
    printed: str


class Zygote:
    """
    Starts commands as forks of one process, see `tests/faults/zygote.py`.

    Args:
        folder (`Path`): For its logs.
        environment (`dict[str, str]`): Of the process, and so of all commands.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.log, self.number = folder / "command.log", 0
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        paths = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**environment, **settings, "PYTHONPATH": paths},
        )
        assert self._answer() == "ready"

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def _answer(self, seconds: float = MAX_SECONDS) -> str | None:
        """The next line, or None if there is none yet."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        # Unbuffered, as `select` sees only what was not read.
        line = b""
        while not line.endswith(b"\n"):
            character = os.read(self.process.stdout.fileno(), 1)
            assert character, "The process that forks the commands has ended."
            line += character
        return line.decode().strip()

    def run(
        self,
        arguments: list,
        folder: Path,
        *,
        die_at: int | None = None,
        after: float | None = None,
        when: Callable[[int], bool] | None = None,
        number: int = signal.SIGKILL,
    ) -> Ended:
        """
        Run a command to its end, or send it a signal.

        Args:
            arguments (`list`): Of the command line.
            folder (`Path`): Where it writes.
            die_at (`int`, *optional*): Before how many changes of files below the folder it is killed.
            after (`float`, *optional*): After how many seconds the signal comes.
            when (`Callable`, *optional*): The signal comes as soon as this is true of the process.
            number (`int`): The signal.

        Returns:
            [`Ended`]: How it ended.
        """
        self.log.write_bytes(b"")
        order = {"arguments": list(map(str, arguments)), "log": str(self.log), "folder": str(folder), "die_at": die_at}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        group, start, code = int(self._answer()), time.monotonic(), None
        if after is not None:
            code = self._answer(after)
        while when is not None and code is None and not when(group):
            code = self._answer(0.002)
            assert time.monotonic() - start < MAX_SECONDS
        if code is None and (after is not None or when is not None):
            # The whole session if it is a kill, so that workers die with it; other signals go to the command alone.
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself since, and its code follows
                (os.killpg if number == signal.SIGKILL else os.kill)(group, number)
        code = self._answer() if code is None else code
        assert code is not None, f"{arguments} hangs: {self.log.read_text('utf-8')[-2000:]}"
        return Ended(int(code), time.monotonic() - start, self.log.read_text("utf-8", errors="replace"))

    def num_events(self) -> int:
        """How often the last command, which came to its end, has changed files."""
        return int(Path(f"{self.log}.events").read_text("ascii"))


class Kills:
    """
    Kills a command again and again, and compares what comes of it.

    Args:
        zygote ([`Zygote`]): Starts it.
        arguments (`Callable`): Makes the arguments from the place where it writes.
        compare (`Callable`): Compares such a place with the undisturbed one; it asserts.
        remove (`Callable`): Removes a place.
    """

    def __init__(self, zygote: Zygote, arguments, compare, *, remove=shutil.rmtree):
        self.zygote, self.arguments, self.compare, self.remove = zygote, arguments, compare, remove

    def reference(self, out: Path) -> Ended:
        """Run undisturbed."""
        ended = self.zygote.run(self.arguments(out), out)
        assert ended.code == 0, ended.printed
        self.seconds, self.events = ended.seconds, self.zygote.num_events()  # none: it is only killed after some time
        return ended

    def loop(self, out: Path, num_kills: int) -> None:
        """
        Kill as often, half of the times before a change of files, else after some time; each run resumes the one before.

        Every run that comes to its end is compared, and what follows it begins anew.
        """
        generator, kills, finished = seeded_generator(), 0, 0
        while kills < num_kills:
            at_event = generator.random() < 0.5 and self.events > 0
            moment = generator.random()
            options = {"die_at": 1 + int(moment * self.events)} if at_event else {"after": moment * self.seconds}
            ended = self.zygote.run(self.arguments(out), out, **options)
            if ended.code == -signal.SIGKILL:
                kills += 1
                continue
            assert ended.code == 0, f"{options}: {ended.printed[-3000:]}"
            self.compare(out)
            self.remove(out)
            finished += 1
            assert finished <= 3 * num_kills, "The kills come too late."
        ended = self.zygote.run(self.arguments(out), out)
        assert ended.code == 0, ended.printed[-3000:]
        self.compare(out)


__all__ = ["SEED", "Ended", "Kills", "Zygote", "seeded_generator"]
