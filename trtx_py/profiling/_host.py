"""Memory of this process, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def host_memory(status: Path = _STATUS) -> tuple[int, int] | None:
    """Resident bytes now, and the most since the process began; None where the kernel does not tell.

    Source: VmRSS and VmHWM of /proc/self/status
    """
    try:
        text = status.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        now, peak = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (KeyError, ValueError, IndexError):
        return None
    return now, peak
