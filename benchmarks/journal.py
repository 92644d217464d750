"""Where a part is, told in a file, so that a crash or a hang costs what it came from and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

DONE, AT, FATAL = "done ", "at ", "fatal "
WHOLE = "the case"  # as opposed to one of its methods


class Journal:
    """Journal of what a part has done and is doing. Skips what `blame` recorded for earlier processes.

    Args:
        path: the file to append to; None keeps no journal.
    """

    def __init__(self, path: Path | None) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self._known = {*lines}
        self._fatal = Counter(line.rpartition(" | ")[2] for line in self._known if line.startswith(FATAL))
        self._path = path

    def is_done(self, case: object) -> bool:
        return f"{DONE}{case}" in self._known

    def is_fatal(self, case: object, what: str) -> bool:
        """Whether an earlier process died at this, or at the same method of two other cases."""
        return f"{FATAL}{case} | {what}" in self._known or (what != WHOLE and self._fatal[what] >= 2)

    def at(self, case: object, what: object) -> None:
        self._write(f"{AT}{case} | {what}")

    def done(self, case: object) -> None:
        self._write(f"{DONE}{case}")

    def _write(self, line: str) -> None:
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def blame(path: Path) -> str | None:
    """Returns the line that makes a journal skip what a part was doing when it died. None if it was idle."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return FATAL + lines[-1].removeprefix(AT) if lines and lines[-1].startswith(AT) else None
