"""Memory of the host that this process may still take: what the system has free, within the limits of its control groups."""

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 2**60  # control groups of version 1 write about 2^63 where there is no limit


def host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """(memory that this process may take, how much of it is in use), in bytes; None on systems other than Linux.

    Where several limits hold, that of a container for example, the one that leaves least. Memory that only caches files is free.

    Args:
      proc, groups: where the system tells about processes and control groups.
    """
    try:
        told = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        total, available = (int(told[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    limits = [(total, total - available), *_group_limits(proc, groups)]
    return min(limits, key=lambda limit: limit[0] - limit[1])


def _group_limits(proc: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """(limit, in use) of this process's control groups and of those above them."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, used, cached = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used, cached = (
                groups / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        inner = Path(path.lstrip("/"))
        # In a container the path is that of the host, where only the root of this file system is seen.
        for folder in (root / inner, *(root / parent for parent in inner.parents), root):
            try:
                most, held = (int((folder / name).read_text()) for name in (limit, used))
                stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no limit ("max"), or not there
                continue
            if most < _UNLIMITED:
                yield most, max(held - int(stat.get(cached, 0)), 0)
