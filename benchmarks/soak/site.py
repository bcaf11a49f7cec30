"""`onebase serve` as a process of its own: started on a free port, watched, stopped, killed."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

START_SECONDS = 300  # until the server says where it listens


class Site:
    """A running server. Its output goes to `log`. Raises RuntimeError with the log where it does not start."""

    def __init__(self, base: str, adapters: Path, log: Path, **options: object) -> None:
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in options.items()
        ]
        command = [sys.executable, "-m", "onebase", "serve", "--base", base, "--adapters", str(adapters)]
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--port=0", *flags], stdout=file, stderr=subprocess.STDOUT
            )
        self.url = self._listening()

    def _listening(self) -> str:
        end = time.monotonic() + START_SECONDS
        while not (found := re.search(r"at (http://\S+:\d+)", self.said())):
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"the server did not start:\n{self.said()}")
            time.sleep(0.05)
        return found[1]

    def __enter__(self) -> Site:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def resident(self) -> float:
        """The memory that it holds now, in MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1e3
        raise OSError("the server is gone")

    def ask_to_end(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def ended(self, seconds: float) -> int:
        """Its exit code; -9 where it had to be killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL, if it still runs; the exit code."""
        self.process.kill()
        return self.process.wait()


def digests(folder: Path) -> Mapping[str, str]:
    """The SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
