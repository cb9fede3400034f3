"""What the machine has of memory, and what processes take of it. The only importer of psutil."""

_CALM_BYTES = 2 << 30


def is_calm() -> bool:
    """True while there is memory to spare."""
    return available_bytes() > _CALM_BYTES


def available_bytes() -> int:
    """Memory that could be used now without swapping, in bytes."""
    import psutil  # not needed by a mere import of the library

    return int(psutil.virtual_memory().available)


def resident_bytes(pid: int) -> int | None:
    """Resident set size of a process in bytes; None when it is gone."""
    import psutil  # not needed until somebody asks

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return None
