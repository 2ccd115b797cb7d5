"""How much memory is free, so that a model that does not fit is refused before it is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_memory(device: str = "cpu") -> int:
    """Bytes that a device, as PyTorch names it, still has to give; what caches files counts as free."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if found := re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text() if MEMINFO.exists() else ""):
        free = 1024 * int(found[1])
    else:  # no Linux: what there is at all
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else ""
    return min(free, int(limit)) if limit.isdigit() else free


def gigabytes(size: int) -> str:
    """ "13.5 GB" """
    return f"{size / 1e9:.1f} GB"
