"""`Programs`: starts servers as processes with a log each, waits for them, and ends them whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

ROOT = str(Path(__file__).resolve().parents[2])
# Defaults, for variables that are not set: see recipes/benchmarks/vllm_check.py. The dev mode opens the routes by which weights come in.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


class Programs:
    """Holds processes that listen on this machine. Use as a context manager: all of them end with it.

    Args:
        folder (`Path`): takes a log of each.
        patience (`float`): seconds to wait for one to come up.
    """

    def __init__(self, folder: Path, patience: float):
        self.folder, self.patience = folder, patience
        self._running: dict[str, subprocess.Popen] = {}
        self._commands: dict[str, tuple[list[str], bool]] = {}

    def start(self, name: str, command: list[str], vllm: bool = False):
        """Start a program, in a session of its own.

        Raises:
            OSError: if it cannot be run.
        """
        self._commands[name] = command, vllm
        (self.folder / f"{name}.log").write_bytes(b"")
        self.start_again(name)

    def start_again(self, name: str):
        """Start a program that has ended once more, with the same command."""
        command, vllm = self._commands[name]
        path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        environment = {**(ENVIRONMENT if vllm else {}), **os.environ, "PYTHONPATH": path}
        if vllm:
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self, name: str):
        """Kill a program and its children, as the system does where memory is short."""
        process = self._running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60.0)

    def kill_child(self, name: str, of: str):
        """Kill the children of program `of` that have `name` in their command.

        Raises:
            LookupError: if there is none.
        """
        found = False
        for child in psutil.Process(self._running[of].pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any(name in part for part in child.cmdline()):
                    child.kill()
                    found = True
        if not found:
            raise LookupError(f"{of} has no child with {name} in its command.")

    def wait_for(self, url: str):
        """Wait until a program answers.

        Raises:
            OSError: if it does not within the time, or one of the programs has ended; the end of its log is in the message.
        """
        ends = time.monotonic() + self.patience
        while time.monotonic() < ends:
            for name, process in self._running.items():
                if process.poll() is not None:
                    raise OSError(f"{name} ended with status {process.returncode}:\n{self._log(name)}")
            with suppress(httpx.HTTPError):
                if httpx.get(url, timeout=5.0).status_code == 200:
                    return
            time.sleep(0.5)
        logs = "\n".join(f"{name}:\n{self._log(name)}" for name in self._running)
        raise OSError(f"{url} did not answer within {self.patience} s.\n{logs}")

    def ended(self, prefix: str) -> int:
        """Count the programs of a name that have ended of themselves: none is started again for that."""
        return sum(process.poll() is not None for name, process in self._running.items() if name.startswith(prefix))

    def memory(self) -> dict[str, int]:
        """Read the bytes of memory that each program itself holds, where the system tells."""
        held = {}
        for name, process in self._running.items():
            with suppress(OSError, ValueError, IndexError):
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                held[name] = pages * os.sysconf("SC_PAGE_SIZE")
        return held

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *exception):
        for number, wait in ((signal.SIGTERM, 60.0), (signal.SIGKILL, 10.0)):
            for process in reversed(self._running.values()):
                with suppress(ProcessLookupError):
                    # Its children are of its session: vLLM's engine is one of them.
                    os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
            for process in self._running.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(wait)


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
