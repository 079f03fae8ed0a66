"""Cached machine code never outlives the kernels it was compiled from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INNER = "from numba import njit\n\n@njit(cache=True)\ndef inner(x):\n    return x + {}\n"
OUTER = """from numba import njit
from package.kernels.inner import inner

@njit(cache=True)
def outer(x):
    return inner(x)
"""


def test_callers_in_other_files_follow_an_edited_kernel(tmp_path: Path) -> None:
    import rewards.kernels

    folder = tmp_path / "package" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").touch()
    (folder / "__init__.py").write_text(Path(str(rewards.kernels.__file__)).read_text(encoding="utf-8"))
    (folder / "outer.py").write_text(OUTER)
    results = []
    for step, added in enumerate((1, 2)):
        (folder / "inner.py").write_text(INNER.format(added))
        if step:
            later = (folder / "inner.py").stat().st_mtime + 10
            os.utime(folder / "inner.py", (later, later))
        run = [sys.executable, "-c", "from package.kernels.outer import outer; print(outer(1))"]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
        results.append(done.stdout.strip())
    assert results == ["2", "3"]
