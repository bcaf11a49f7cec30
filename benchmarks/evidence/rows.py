"""The file of finished runs: a JSON object a line, each with its key, its numbers, and where and when it was made."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.evidence.plan import Job
from benchmarks.evidence.settings import Setting
from onebase.errors import OutputExists
from onebase.files import process_lock

COMMITTED = Path(__file__).parents[2] / "docs" / "evidence" / "rows.jsonl"


class Rows:
    """The rows of one setting in a file that several processes may add to."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.setting = path, setting
        self.read()

    def read(self) -> None:
        """Take in what was added since. A last line that a kill cut short does not count."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self._rows: dict[str, dict[str, Any]] = {}
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                self._rows[row["key"]] = row

    def get(self, job: Job) -> Mapping[str, Any] | None:
        """What the job gave, None where it has not been run with this code and these sizes."""
        row = self.row(job)
        return None if row is None else row["found"]

    def row(self, job: Job) -> Mapping[str, Any] | None:
        """The whole row."""
        return self._rows.get(job.key(self.setting))

    def valid(self) -> list[Mapping[str, Any]]:
        """The rows that this code and these sizes would make again."""
        return [row for row in self._rows.values() if _job(row).key(self.setting) == row["key"]]

    def add(self, job: Job, found: Mapping[str, Any]) -> None:
        """Append the job's row."""
        row = {
            "key": job.key(self.setting),
            **job._asdict(),
            "found": dict(found),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            cut = file.read(1) not in (b"", b"\n")  # a kill may have cut the last line
            # One write, at the end: what another process adds comes before it or after it.
            file.write(("\n" * cut + json.dumps(row, allow_nan=False) + "\n").encode())
        self.read()

    @contextlib.contextmanager
    def claimed(self, job: Job, work: Path) -> Generator[bool]:
        """Whether this process may run the job: several share the work, each job is one's alone."""
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in job.key(self.setting))
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(process_lock(work / "locks" / f"{name}.lock", wait=False))
            except OutputExists:
                yield False
                return
            self.read()
            yield self.get(job) is None


def _job(row: Mapping[str, Any]) -> Job:
    return Job(**{name: row[name] for name in Job._fields})
