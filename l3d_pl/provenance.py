"""What travels with every result: versions, git commit, date."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("l3d_pl", "torch", "lightning", "torchmetrics", "tensorly", "safetensors", "huggingface_hub", "numpy")


def provenance() -> dict[str, Any]:
    """Library versions, Python, git commit of the code, UTC time.

    The commit has `+dirty` after it for uncommitted changes; outside a checkout it is None.
    """
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions | {"python": platform.python_version()},
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """Commit of the checkout this package runs from; None for an installed package."""
    head, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return None if head is None or status is None else head.strip() + ("+dirty" if status.strip() else "")


def git_diff() -> str | None:
    """How the checkout's tracked files differ from its commit; None for an installed package."""
    return _git("diff", "HEAD")


def git_untracked() -> list[str] | None:
    """Files of the checkout that git neither tracks nor ignores; None for an installed package."""
    found = _git("ls-files", "--others", "--exclude-standard")
    return None if found is None else found.splitlines()


def _git(*command: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", *command], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
