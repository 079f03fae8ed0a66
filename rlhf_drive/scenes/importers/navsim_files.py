"""Where the metric caches of a folder are: by its metadata, or by looking for them."""

from __future__ import annotations

from pathlib import Path

from rlhf_drive.errors import DataError

__all__ = ["CACHE_FILE", "navsim_cache_files"]

CACHE_FILE = "metric_cache.pkl"
"""Name of every cache; the folder that holds it is named by the token."""


def navsim_cache_files(folder: Path | str) -> list[tuple[str, Path]]:
    """Token and path of every metric cache of a folder as NAVSIM's caching script fills it.

    ``metadata/*.csv`` lists the caches. Its paths may be absolute or relative to the folder or to the working
    directory; a path that leads nowhere, because the folder was moved, is replaced by the cache of that token in the
    folder. Without metadata, every ``metric_cache.pkl`` below the folder counts.

    Args:
        folder: The cache folder, or a single cache.

    Raises:
        DataError: There is no cache, one that is listed is missing, or a token has two different ones.

    Example:
        >>> [token for token, path in navsim_cache_files("exp/metric_cache")]  # doctest: +SKIP
    """
    folder = Path(folder)
    if folder.is_file():
        return [(folder.parent.name, folder)]
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Give the folder that NAVSIM's metric caching wrote.")
    listed = [line for path in sorted((folder / "metadata").glob("*.csv")) for line in _lines(path)]
    tree = _Tree(folder)
    found = _listed_files(folder, listed, tree) if listed else tree.all_files()
    if not found:
        raise DataError(
            f"{folder} holds no metric cache: neither metadata/*.csv nor any <token>/{CACHE_FILE}. "
            "Give the folder that NAVSIM's metric caching wrote."
        )
    return list(found.items())


def _lines(path: Path) -> list[str]:
    """Paths of one metadata file, without its heading."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of paths ({error}). Restore or remove it.") from error
    return [line.strip().strip('"').replace("\\", "/") for line in lines[1:] if line.strip()]


class _Tree:
    """Caches below a folder by token, looked for once and only if needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, list[Path]] | None = None

    def of(self, token: str) -> list[Path]:
        return self._all().get(token, [])

    def all_files(self) -> dict[str, Path]:
        """One path by token, rising."""
        return {token: self.one(token) for token in sorted(self._all())}

    def one(self, token: str) -> Path:
        """The cache of `token`, of which there is at least one."""
        first, *others = self.of(token)
        if others:
            raise DataError(f"Token {token!r} has two metric caches: {first} and {others[0]}. Remove one of them.")
        return first

    def _all(self) -> dict[str, list[Path]]:
        if self._found is None:
            self._found = {}
            for path in sorted(self.folder.rglob(CACHE_FILE)):
                self._found.setdefault(path.parent.name, []).append(path)
        return self._found


def _listed_files(folder: Path, listed: list[str], tree: _Tree) -> dict[str, Path]:
    """Path of every listed cache, in the order of the list."""
    found: dict[str, Path] = {}
    missing: list[str] = []
    for line in listed:
        token = Path(line).parent.name
        if not token or Path(line).name != CACHE_FILE:
            raise DataError(f"{folder / 'metadata'} lists {line!r}, which is no path of a <token>/{CACHE_FILE}.")
        path = next((p for p in (folder / line, Path(line)) if p.is_file()), None)
        if path is None and tree.of(token):
            path = tree.one(token)
        if path is None:
            missing.append(line)
        elif token in found and found[token].resolve() != path.resolve():
            raise DataError(f"Token {token!r} is listed with two metric caches: {found[token]} and {path}. Keep one.")
        else:
            found[token] = path
    if missing:
        raise DataError(
            f"{len(missing)} of {len(listed)} metric caches that {folder / 'metadata'} lists are missing, there and "
            f"below {folder}; the first is {missing[0]}. Restore them or take them off the list."
        )
    return found
