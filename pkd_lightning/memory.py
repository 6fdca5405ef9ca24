"""How much memory there is, asked before a file from elsewhere is expanded into it."""

import os
from pathlib import Path

from pkd_lightning.errors import PKDError

MEMINFO = Path("/proc/meminfo")
# of the container, as it sees them: version 2 of control groups, and version 1
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_memory() -> int:
    """Bytes that this process can take at most: free memory and swap, and no more than its container's limit."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = 1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):  # another system than Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in LIMITS:
        try:
            free = min(free, int(file.read_text()))
        except (OSError, ValueError):  # no such file; or it says "max"
            continue
    return free


def check_memory(size: int, where: str, kind: type[PKDError]) -> None:
    """Raise `kind`, naming `where`, if its `size` in bytes, once it is read, is more than `available_memory`."""
    available = available_memory()
    if size > available:
        raise kind(f"{where}: reading it takes {size:,} bytes of memory, and {available:,} are available")
