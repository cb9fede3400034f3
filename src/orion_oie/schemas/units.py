"""Byte counts as text. Memory is shown in binary units, as operating systems do; files and device
memory in decimal units, as vendors do.
"""


def in_gib(size_bytes: int) -> str:
    """A size such as 512 MiB or 1.5 GiB."""
    gib = size_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{size_bytes / 2**20:.0f} MiB"


def in_mib(size_bytes: int) -> str:
    """A size such as 1,536 MiB, for sizes that are compared with each other."""
    return f"{size_bytes / 2**20:,.0f} MiB"


def in_gb(size_bytes: int) -> str:
    """A size such as 1.61 GB."""
    return f"{size_bytes / 1e9:.2f} GB"


def size_text(count: float) -> str:
    """A size such as "512 bytes", "1.2 kB", "98.4 MB" or "4.68 GB"."""
    if count < 1e3:
        return f"{count:.0f} bytes"
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
