"""The checkout that a measurement belongs to; needs nothing installed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def commit() -> dict[str, Any]:
    """Which commit this is, and whether files differ from it; None where git does not say."""

    def git(*arguments: str) -> str | None:
        command = ["git", *arguments]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain")
    return {"id": git("rev-parse", "HEAD"), "changed": None if changes is None else changes != ""}
