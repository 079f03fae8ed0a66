"""NAVSIM's scoring rules as Numba kernels: float64, GIL released, machine code cached beside the source."""

from pathlib import Path


def _drop_stale_machine_code() -> None:
    """Remove cached machine code older than the newest kernel source.

    Numba looks only at the file of the outermost function, so after an edit of a kernel its callers in other files
    would go on with the old one.
    """
    folder = Path(__file__).parent
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    for cache in (folder / "__pycache__", folder.parent / "__pycache__"):
        for index in cache.glob("*.nbi"):
            try:
                if index.stat().st_mtime < newest:
                    index.unlink()
            except OSError:  # Another process removed it, or the installation is read-only.
                continue


_drop_stale_machine_code()
