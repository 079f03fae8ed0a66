"""Break every scoring rule in turn and check that its test notices; run by hand, pytest does not collect it.

A copy of the source tree receives one mutation at a time (the `*_rules.py` files beside this one), the named test runs
there in a process of its own, and the mutation is taken back. Numba is off, so nothing is compiled; recorded data is
hidden, so a rule counts as held only by hand-made scenes. Each old text must stand exactly once in its file: an edit of
the source that moves a rule shows here as "moved".

    python tests/mutations/run_mutations.py               # all of them, about two seconds each
    python tests/mutations/run_mutations.py jerk TTC      # those whose line in --list contains one of the words
    python tests/mutations/run_mutations.py --list

Whoever adds a rule to the scorer adds a mutation of it here. The exit status is 1 if any test does not notice.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from collision_rules import COLLISION_RULES
from mutation import Mutation
from pdm_closed_rules import PDM_CLOSED_RULES
from pdm_scoring_rules import PDM_SCORING_RULES
from shared_rules import SHARED_RULES
from v1_rules import V1_RULES
from v2_rules import V2_RULES

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("rewards", "rlhf_drive", "rollout", "recipes", "tests", "pyproject.toml")
GROUPS: dict[str, tuple[Mutation, ...]] = {
    "v1 and v2": COLLISION_RULES + SHARED_RULES,
    "v1": V1_RULES,
    "v2": V2_RULES,
    "PDM-Closed": PDM_CLOSED_RULES + PDM_SCORING_RULES,
}
CRASHES = ("SyntaxError", "NameError", "UnboundLocalError", "ImportError")


def copy_tree(target: Path) -> None:
    """Copy the packages and tests to an empty folder, without compiled code."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy2(source, target / name)


def run_tests(tree: Path, nodes: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of pytest on some tests of a copied tree, run as plain Python."""
    absent = str(tree / "absent")
    environment = os.environ | {
        "NUMBA_DISABLE_JIT": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(tree),
        "RLHF_DRIVE_NAVSIM_VECTORS": absent,
        "RLHF_DRIVE_RECORDED_SCENES": absent,
    }
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=short", *nodes]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def apply(tree: Path, mutation: Mutation) -> dict[Path, str] | str:
    """Write a mutation into a tree; returns the texts to put back, or why it cannot be applied."""
    before: dict[Path, str] = {}
    changed: dict[Path, str] = {}
    for edit in mutation.edits:
        path = tree / edit.file
        text = changed.get(path, path.read_text())
        before.setdefault(path, text)
        if text.count(edit.old) != 1:
            return f"{edit.file}: {edit.old!r} stands there {text.count(edit.old)} times"
        changed[path] = text.replace(edit.old, edit.new)
    for path, text in changed.items():
        path.write_text(text)
    return before


def judge(tree: Path, mutation: Mutation) -> tuple[bool, str]:
    """Whether the mutation's test fails for it, and in a few words how."""
    before = apply(tree, mutation)
    if isinstance(before, str):
        return False, f"moved: {before}"
    try:
        status, output = run_tests(tree, [f"tests/rewards/{mutation.test}"])
    finally:
        for path, text in before.items():
            path.write_text(text)
    failure = re.search(r"^(?:FAILED|ERROR) tests/rewards/(.*)$", output, re.MULTILINE)
    if status == 0:
        return False, "NOT NOTICED"
    if status != 1 or failure is None:
        return False, f"pytest ended with {status}: {output.strip().splitlines()[-1:]}"
    if any(crash in output for crash in CRASHES):
        return False, f"the variant does not run: {failure[1]}"
    return True, failure[1].partition(" - ")[0]


def describe(group: str, mutation: Mutation) -> str:
    """A mutation in one line."""
    return f"{group}: {mutation.rule} -> {mutation.test}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only those whose line in --list contains one of these")
    parser.add_argument("--list", action="store_true", help="print the rules and end")
    options = parser.parse_args()
    chosen = [
        (group, mutation)
        for group, mutations in GROUPS.items()
        for mutation in mutations
        if not options.words or any(word in describe(group, mutation) for word in options.words)
    ]
    if options.list:
        print("\n".join(describe(*pair) for pair in chosen))
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        nodes = sorted({f"tests/rewards/{mutation.test}" for _, mutation in chosen})
        status, output = run_tests(tree, nodes)
        if status != 0:
            print(f"The tests must pass before anything is broken:\n{output}")
            return 1
        for group, mutation in chosen:
            noticed, how = judge(tree, mutation)
            missed += not noticed
            print(f"{'held' if noticed else 'LOST'}  {group}: {mutation.rule} -> {how}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} wrong variants are noticed.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
