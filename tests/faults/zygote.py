# SPDX-License-Identifier: Apache-2.0
"""
A process that has imported the libraries, and forks a child for each command that it reads: a kill then costs no import.

Each child runs `geode.cli.main`, as the command does, in a session of its own. An order is a line of JSON (`arguments`, `log`,
`folder`, `die_at`); the answers are the child's id, and how it ended.
"""

import json
import os
import signal
import sys
import traceback
from typing import TextIO


# What changes a file, as Python's audit hooks name it; `os.replace` is a rename.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
MODULES = (
    "embreex.mesh_construction",
    "geode.cli",
    "geode.commands",
    "geode.data.synthetic_rooms.dataset",
    "geode.evaluating",
    "geode.hub_cards.cards",
    "geode.trainers.precompute",
    "geode.trainers.stage2",
    "PIL.ImageDraw",
    "scipy.spatial",
)


def watch(folder: str, die_at: int | None) -> list[int]:
    """Count what this process does to files below a folder, and kill it, and what it started, before one of these events."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if os.path.abspath(os.fspath(arguments[0])).startswith(folder):
            count[0] += 1
            if count[0] == die_at:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def run(order: dict, answers: TextIO) -> None:
    """Be the command, to its end."""
    os.setsid()
    answers.write(f"{os.getpid()}\n")  # Not before: who reads it may kill the session.
    answers.flush()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from geode.cli import main

    code, count = 1, watch(order["folder"], order["die_at"])
    try:
        code = main(order["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        traceback.print_exc() if code == 1 and sys.exc_info()[0] else None
        sys.stdout.flush()
        sys.stderr.flush()
        with open(f"{order['log']}.events", "w", encoding="ascii") as file:
            file.write(str(count[0]))
        os._exit(code)


def serve() -> None:
    """Answer until the input ends."""
    for module in MODULES:
        __import__(module)
    with os.fdopen(os.dup(1), "w") as answers:
        answers.write("ready\n")
        answers.flush()
        for line in sys.stdin:
            order = json.loads(line)
            child = os.fork()
            if child == 0:
                run(order, answers)
            _, status = os.waitpid(child, 0)
            answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
            answers.flush()


if __name__ == "__main__":
    serve()
