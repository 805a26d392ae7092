"""Jobs of several processes on gloo: each runs once, does one thing after the other, and leaves what came of it for the tests to look at."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_job() -> Callable:
    """`run_job(script, folder, size)`: `script` of this folder in `size` processes, each given `folder`; fails if one of them does."""

    def run(script: str, folder: Path, size: int):
        processes = []
        for rank in range(size):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment = os.environ | {name: str(value) for name, value in places.items()} | {"OMP_NUM_THREADS": "1"}
            with (folder / f"log.{rank}").open("wb") as log:
                command = [sys.executable, str(Path(__file__).parent / script), str(folder)]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            statuses = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        logs = "\n".join((folder / f"log.{rank}").read_text() for rank in range(size))
        assert not any(statuses), logs

    return run
