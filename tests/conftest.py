"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os

# Before torch is there: runs are compared with those of other processes, which have one thread each, to the last bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_drive.config import Recipe, ScenesSection, load_recipe, read_recipe_text
from rlhf_drive.scenes.store import SceneStore

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to the folder that holds this data")
    return folder


@pytest.fixture(scope="session")
def navsim_golden() -> Path:
    """Folder with the scorer's golden vectors (`golden/`, `golden_pdm_closed/`)."""
    return _folder("RLHF_DRIVE_NAVSIM_VECTORS", SHARED / "navsim")


@pytest.fixture(scope="session")
def recorded_scenes() -> Path:
    """Folder of recorded driving scenarios."""
    return _folder("RLHF_DRIVE_RECORDED_SCENES", SHARED / "scenes")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> SceneStore:
    """48 generated scenes of all kinds with references, split three to one."""
    from rlhf_drive.training.scenes import build_scenes

    section = ScenesSection(source="generate", path=None, store=None, count=48, seed=3, heldout_fraction=0.25)
    return build_scenes(section, tmp_path_factory.mktemp("scenes") / "store", workers=1)


TINY = (
    "policy.d_model=32", "policy.num_heads=2", "policy.encoder_layers=1", "policy.decoder_layers=1",
    "policy.num_experts=4", "policy.expert_dim=16", "policy.max_agents=6", "policy.max_polylines=8",
    "policy.points_per_polyline=5", "tokenizer.low=-5", "tokenizer.high=15", "tokenizer.step=0.1",
    "sft.max_epochs=2", "sft.batch_size=16", "sft.save_steps=1", "rollout.num_generations=4",
    "rollout.scenes_per_step=6", "rollout.steps=4", "rl.max_steps=4", "rl.save_steps=1", "rl.micro_batch_scenes=3",
    "compare.samples=1", "compare.steps=4", "compare.bootstrap_samples=200", "compare.pictures=1",
)  # fmt: skip
"""Overrides that shrink a recipe to seconds; those of sections that it lacks are left out."""


@pytest.fixture
def tiny_recipe(tiny_store: SceneStore, tmp_path: Path) -> Callable[..., Recipe]:
    """``tiny_recipe(name, *overrides)``: a shipped recipe on the tiny store, shrunk, with runs in the test's folder."""

    def make(name: str = "quickstart", *overrides: str) -> Recipe:
        where = (f"output_dir={tmp_path / 'runs'}", "scenes.source=store", f"scenes.store={tiny_store.path}")
        sections = {line.partition(":")[0] for line in read_recipe_text(name).splitlines()}
        shrunk = [item for item in TINY if item.partition(".")[0] in sections]
        return load_recipe(name, [*where, *shrunk, *overrides])

    return make
