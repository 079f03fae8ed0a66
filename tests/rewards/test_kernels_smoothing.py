"""The stencils against scipy's filter and against recorded operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.signal import savgol_filter

from rewards.kernels.smoothing import smooth, stencil

FILTERS = [(8, 2, 0), (15, 2, 1), (5, 2, 1), (5, 3, 2), (5, 2, 2)]


def filtered(signal: np.ndarray, window: int, order: int, derivative: int) -> np.ndarray:
    out = np.empty_like(signal)
    smooth(stencil(window, order, derivative), signal, out)
    return out


@pytest.mark.parametrize("samples", [15, 16, 36, 40, 41, 55, 56])
@pytest.mark.parametrize(("window", "order", "derivative"), FILTERS)
def test_smooth_is_scipys_filter_rounded_to_eight_decimals(
    samples: int, window: int, order: int, derivative: int
) -> None:
    signal = np.random.default_rng(samples).normal(size=samples)
    expected = savgol_filter(signal, window, order, deriv=derivative, delta=0.1)
    np.testing.assert_allclose(filtered(signal, window, order, derivative), expected, rtol=0.0, atol=5.1e-9)


@pytest.mark.parametrize("samples", [36, 41, 55, 56])
@pytest.mark.parametrize(("window", "order", "derivative"), FILTERS)
def test_smooth_is_the_recorded_operator(
    navsim_golden: Path, samples: int, window: int, order: int, derivative: int
) -> None:
    with np.load(navsim_golden / "golden" / "savgol_ops.npz", allow_pickle=False) as archive:
        name = f"n{samples}_w{window}_p{order}_d{derivative}"
        if name not in archive.files:
            pytest.skip(f"no operator {name}")
        expected = archive[name]
    columns = [filtered(unit, window, order, derivative) for unit in np.eye(samples)]
    np.testing.assert_allclose(np.stack(columns, axis=1), expected, rtol=0.0, atol=6e-9)


def test_results_are_rounded_to_eight_decimals() -> None:
    assert filtered(np.full(20, 1.0 + 4e-9), 8, 2, 0).tolist() == [1.0] * 20
    assert filtered(np.full(20, 1.0 + 6e-9), 8, 2, 0).tolist() == [1.00000001] * 20


def test_an_even_window_is_half_a_step_late() -> None:
    """Of a ramp, sample i of the inside is the value at i + 1/2; the four at either end are where they belong."""
    ramp = np.arange(20.0)
    np.testing.assert_allclose(filtered(ramp, 8, 2, 0), np.r_[0:4, 4.5:16.5, 16:20], atol=1e-7)
