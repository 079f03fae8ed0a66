"""Memory of a prepared scene of recorded size, and its scores against plain NumPy and shapely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.epdms import score_epdms
from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rewards.prepare_epdms import prepare_epdms

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the modules beside the benchmark importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def nbytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    return sum(nbytes(part) for part in parts)


def test_a_prepared_scene_of_recorded_size_stays_below_two_megabytes(benchmarks: None) -> None:
    from real_size import NUM_AGENTS, NUM_POLYGONS, real_size_scene

    reference = real_size_scene(0, plans=1).reference
    assert len(reference.map_layer) == NUM_POLYGONS
    assert len(reference.agent_type) == NUM_AGENTS
    v1, v2 = nbytes(prepare_scene(reference)), nbytes(prepare_epdms(reference))
    # 5,342 vertices make 10,684 edges of 32 bytes: 0.34 MB; 60 agents x 51 steps x 4 numbers: 0.1 MB.
    assert 400_000 < v1 < 2_000_000
    assert 400_000 < v2 < 2_000_000


@pytest.mark.parametrize("seed", [0, 3])
def test_scores_of_a_scene_of_recorded_size_equal_plain_numpy_and_shapely(seed: int, benchmarks: None) -> None:
    """All rules of both versions at once, with red lights in seed 3, among plans that hit, leave the road and pass."""
    from real_size import real_size_scene
    from reference_scorer import PlainScene, plain_epdms, plain_pdms

    scene = real_size_scene(seed, plans=48)
    plain = PlainScene.of(scene.reference)
    v1, v2 = score_pdms(plain.v1, scene.plans), score_epdms(plain.v2, scene.plans, scene.previous)
    np.testing.assert_allclose(v1.pdms, plain_pdms(plain, scene.plans), atol=1e-9)
    np.testing.assert_allclose(v2.epdms, plain_epdms(plain, scene.plans, scene.previous), atol=1e-9)
    without = score_epdms(plain.v2, scene.plans)
    np.testing.assert_allclose(without.epdms, plain_epdms(plain, scene.plans), atol=1e-9)
    assert 0 < (v1.pdms == 0.0).sum() < 48
    assert len(np.unique(np.round(v2.epdms, 3))) > 3
