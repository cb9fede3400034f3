"""What processes take of the machine's memory. The only importer of psutil."""


def resident_bytes(pid: int) -> int | None:
    """Resident set size of a process in bytes; None when it is gone."""
    import psutil  # not needed until somebody asks

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return None
