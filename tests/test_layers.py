"""Imports point one way, and the light parts stay light: the rules that keep the rooms apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rlhf_drive", "rewards", "rollout", "recipes")

LAYERS: tuple[tuple[str, ...], ...] = (
    ("rlhf_drive.cli",),
    ("rlhf_drive.estimate",),
    ("rlhf_drive.training", "rlhf_drive.compare", "rlhf_drive.integrations"),
    ("rlhf_drive.runs",),
    ("rollout", "rewards"),
    ("rlhf_drive.likelihood", "rlhf_drive.objectives"),
    ("rlhf_drive.policies",),
    ("rlhf_drive.scenes",),
    ("rlhf_drive.config", "recipes"),
    ("rlhf_drive.workers",),
    ("rlhf_drive.likelihood_fits", "rlhf_drive.objective_rules"),
    ("rlhf_drive.registry", "rlhf_drive.disk"),
    ("rlhf_drive.errors",),
)
"""From the top down; a room imports from lower lines only, never from another room of its own line."""
EXCEPTIONS = {("rlhf_drive.training.comparison", "rlhf_drive.compare")}
"""A pipeline ends with a comparison, so that one module of training may call compare."""
NO_TORCH = (
    "rewards",
    "rlhf_drive.runs",
    "rlhf_drive.scenes",
    "rlhf_drive.config",
    "rlhf_drive.registry",
    "rlhf_drive.disk",
    "rlhf_drive.workers",
    "rlhf_drive.likelihood_fits",
    "rlhf_drive.objective_rules",
    "rlhf_drive.errors",
    "recipes",
)
ONLY_IN_FUNCTIONS = {"navsim", "peft", "ray", "trackio", "trl", "vllm", "wandb"}


@dataclass(frozen=True)
class Import:
    """One import statement."""

    target: str
    """Module that is imported; for ours, the module itself rather than a name in it."""
    in_function: bool
    """Whether it runs only when a function is called."""


def _modules() -> dict[str, Path]:
    """Path by dotted name of every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[Import]:
    """All imports of a module, at any depth."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield Import("." * child.level + (full if full in known else base), in_function)
            else:
                yield from visit(child, in_function or isinstance(child, ast.FunctionDef | ast.Lambda))

    return visit(tree, False)


IMPORTS = {name: list(_imports(ast.parse(path.read_text("utf-8")), MODULES)) for name, path in MODULES.items()}


def _room(module: str) -> tuple[int, str] | None:
    """Line and room a module belongs to; config and cli are several files of one room."""
    for i, line in enumerate(LAYERS):
        for room in line:
            family = room in ("rlhf_drive.config", "rlhf_drive.cli") and module.startswith(f"{room}_")
            if module == room or module.startswith(f"{room}.") or family:
                return i, room
    return None


def _violations(imports: dict[str, list[Import]]) -> list[str]:
    """Imports that point up or sideways."""
    found = []
    for module, statements in imports.items():
        here = _room(module)
        for statement in statements:
            there = _room(statement.target)
            if here is None or there is None or here[1] == there[1] or (module, there[1]) in EXCEPTIONS:
                continue
            if there[0] <= here[0]:
                found.append(f"{module} imports {statement.target}")
    return found


def test_every_module_belongs_to_a_room() -> None:
    assert [name for name in MODULES if _room(name) is None] == ["rlhf_drive"]
    assert len(MODULES) > 30


def test_imports_point_down() -> None:
    assert _violations(IMPORTS) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("rlhf_drive.scenes.store", "rlhf_drive.policies.policy"),
        ("rewards.service", "rollout.service"),
        ("rlhf_drive.likelihood_fits", "rlhf_drive.objective_rules"),
        ("rlhf_drive.objectives.kl", "rlhf_drive.likelihood"),
        ("rlhf_drive.training.rl", "rlhf_drive.compare.report"),
        ("rlhf_drive.compare.score", "rlhf_drive.cli_scenes"),
    ],
)
def test_the_rule_sees_an_import_that_points_up_or_sideways(module: str, target: str) -> None:
    assert _violations({module: [Import(target, True)]}) == [f"{module} imports {target}"]


def test_no_import_is_relative() -> None:
    relative = [name for name, statements in IMPORTS.items() for s in statements if s.target.startswith(".")]
    assert relative == []


def _reachable(start: str) -> set[str]:
    """Modules of ours that importing `start` runs, or may run later from a function."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        waiting += [statement.target for statement in IMPORTS[module]]
        waiting += [module.rpartition(".")[0]]
    return seen


@pytest.mark.parametrize("room", NO_TORCH)
def test_no_torch_is_reachable_from_the_light_rooms(room: str) -> None:
    for start in (name for name in MODULES if name == room or name.startswith((f"{room}.", f"{room}_"))):
        for module in _reachable(start):
            heavy = [s.target for s in IMPORTS[module] if s.target.partition(".")[0] in ("torch", "accelerate")]
            assert heavy == [], f"{start} reaches {module}, which imports {heavy}"


def test_optional_packages_are_imported_inside_functions_only() -> None:
    eager = [
        f"{name}: {statement.target}"
        for name, statements in IMPORTS.items()
        for statement in statements
        if statement.target.partition(".")[0] in ONLY_IN_FUNCTIONS and not statement.in_function
    ]
    assert eager == []


def test_importing_the_light_parts_loads_nothing_heavy() -> None:
    script = (
        "import sys, rlhf_drive.cli, rlhf_drive.config, rewards, rlhf_drive.scenes, recipes\n"
        "heavy = {'torch', 'accelerate', 'numba', 'datasets', 'matplotlib', 'pyarrow', 'scipy', 'shapely', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_every_scene_and_reward_module_loads_no_torch() -> None:
    names = [name for name in MODULES if name.startswith(("rewards", "rlhf_drive.scenes"))]
    script = (
        f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["rewards", "rollout", "recipes"])
def test_a_module_of_the_same_name_is_reported(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("")
    script = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import rlhf_drive"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"'import {name}' finds {tmp_path / name}.py instead of {ROOT / name}" in done.stderr
