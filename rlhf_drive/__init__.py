"""rlhf-drive: RL fine-tuning of driving policies that decode discrete tokens."""

from importlib.util import find_spec
from pathlib import Path

__all__ = ["__version__"]

__version__ = "0.1.0"


def _check_companions() -> None:
    """Make sure that `rewards`, `rollout` and `recipes` are ours: they lie beside this package.

    They are found without being imported.

    Raises:
        PluginError: Another module of that name comes first on the import path, or the package is missing.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("rewards", "rollout", "recipes"):
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin == home / name / "__init__.py":
            continue
        from rlhf_drive.errors import PluginError

        found = (
            str(origin) if origin else "nothing" if spec is None else f"a folder without __init__.py called {name!r}"
        )
        raise PluginError(
            f"'import {name}' finds {found} instead of {home / name}, which belongs to rlhf-drive. Rename or move that "
            f"file, or start Python from another directory; if nothing is found, reinstall rlhf-drive."
        )


_check_companions()
