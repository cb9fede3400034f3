"""Numbers of bytes in words. Memory is told in binary units, as systems tell it; files and what
goes to devices in decimal ones, as they are sold.
"""


def in_gib(size_bytes: int) -> str:
    """Like 512 MiB, 1.5 GiB."""
    gib = size_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{size_bytes / 2**20:.0f} MiB"


def in_mib(size_bytes: int) -> str:
    """Like 1,536 MiB: for what is compared with each other."""
    return f"{size_bytes / 2**20:,.0f} MiB"


def in_gb(size_bytes: int) -> str:
    """Like 1.61 GB."""
    return f"{size_bytes / 1e9:.2f} GB"


def size_text(count: float) -> str:
    """A number of bytes: "512 bytes", "1.2 kB", "98.4 MB", "4.68 GB"."""
    if count < 1e3:
        return f"{count:.0f} bytes"
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
