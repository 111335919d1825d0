"""Memory of this process, as Linux counts it."""

from pathlib import Path


def resident(key: str) -> int:
    """Bytes resident now (`VmRSS`) or at the most (`VmHWM`; not `ru_maxrss`, which starts at the parent's peak)."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0])
