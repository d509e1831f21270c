# SPDX-License-Identifier: Apache-2.0
"""Real processes that train together on the CPU, and end with the test."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**changes) -> dict[str, str]:
    """That of the test on one thread, without the Hub and without what another launcher left."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **changes,
    }


def start_processes(
    module: str, *arguments, folder: Path, num_processes: int = 2, **changes
) -> list[subprocess.Popen]:
    """
    Start a module in processes that find each other by the environment, as `torchrun` starts them.

    Args:
        module (`str`): Such as `"tests.trainers.run_invariant"`.
        *arguments: Of its command line.
        folder (`Path`): Where the processes' output goes, as `rank_0.log` and so on.
        num_processes (`int`): How many.
        **changes: Environment variables.

    Returns:
        `list[subprocess.Popen]`: The processes, by rank.
    """
    port = str(free_port())
    command = [sys.executable, "-m", module, *map(str, arguments)]
    started = []
    for rank in range(num_processes):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
        places = {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
        with open(folder / f"rank_{rank}.log", "wb") as log:
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment(**places, **changes), stdout=log, stderr=log)
            )
    return started


def run_processes(
    module: str, *arguments, folder: Path, num_processes: int = 2, timeout: float = 240, **changes
) -> None:
    """
    Run a module in processes, see [`start_processes`], to their end.

    Args:
        module (`str`): The module.
        *arguments: Of its command line.
        folder (`Path`): Where the processes' output goes.
        num_processes (`int`): How many.
        timeout (`float`): Seconds after which they count as hanging.
        **changes: Environment variables.

    Raises:
        AssertionError: If one fails, or hangs. All are ended.
    """
    started = start_processes(module, *arguments, folder=folder, num_processes=num_processes, **changes)
    try:
        _wait_for_all(started, time.monotonic() + timeout, folder)
    finally:
        for process in started:
            process.kill()
            process.wait()


def _wait_for_all(started: list[subprocess.Popen], deadline: float, folder: Path) -> None:
    while True:
        codes = [process.poll() for process in started]
        failed = [rank for rank, code in enumerate(codes) if code]
        logs = {rank: (folder / f"rank_{rank}.log").read_text("utf-8", errors="replace")[-4000:] for rank in failed}
        assert not failed, "\n".join(f"process {rank} failed:\n{log}" for rank, log in logs.items())
        if None not in codes:
            return
        assert time.monotonic() < deadline, f"Processes hang: {codes}. Their output is in {folder}."
        time.sleep(0.05)
