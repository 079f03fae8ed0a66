"""Wrong variants of what NAVSIM v1.1 alone does."""

from __future__ import annotations

from mutation import Mutation, broken

__all__ = ["V1_RULES"]

COMFORT = "rewards/kernels/comfort.py"
PDMS = "rewards/pdms.py"
COMFORT_TESTS = "test_kernels_comfort.py::"
PDMS_TESTS = "test_pdms.py::"

V1_RULES: tuple[Mutation, ...] = (
    broken(
        "EP low-progress branch 5 m missing",
        PDMS_TESTS + "test_low_progress_counts_as_full_unless_the_plan_fails",
        PDMS,
        "far = most > _LOW_PROGRESS_M",
        "far = most > 0.0",
    ),
    broken(
        "EP of a failing plan that gets nowhere is 1",
        PDMS_TESTS + "test_low_progress_counts_as_full_unless_the_plan_fails",
        PDMS,
        "np.where(metrics.nc * metrics.dac == 0.0, 0.0, 1.0)",
        "np.ones(len(own))",
    ),
    broken(
        "EP v1 unmasked",
        PDMS_TESTS + "test_half_collision_counts_twice",
        PDMS,
        "own / np.where(far, most, 1.0)",
        "metrics.progress_m / np.where(far, most, 1.0)",
    ),
    broken(
        "EP against the batch",
        PDMS_TESTS + "test_progress_is_never_normalised_over_the_batch",
        PDMS,
        "    most = np.maximum(own, ",
        "    most = np.maximum(np.max(own, initial=0.0), ",
    ),
    broken(
        "comfort v1 with v2 windows",
        COMFORT_TESTS + "test_acceleration_is_smoothed_by_one_quadratic_over_all_steps",
        COMFORT,
        "NUM_STATES, NUM_STATES, 2), 3)",
        "NUM_STATES, 8, 2), 41)",
        "NUM_STATES, NUM_STATES, 2, 1) @ smoothing_matrix(NUM_STATES, 8, 2), 2)",
        "NUM_STATES, 15, 2, 1) @ smoothing_matrix(NUM_STATES, 8, 2), 41)",
    ),
    broken(
        "jerk of a signal that is not smoothed first",
        COMFORT_TESTS + "test_jerk_is_the_slope_of_that_quadratic",
        COMFORT,
        "NUM_STATES, NUM_STATES, 2, 1) @ smoothing_matrix(NUM_STATES, 8, 2), 2)",
        "NUM_STATES, NUM_STATES, 2, 1), 2)",
    ),
    broken(
        "yaw over all steps as accelerations",
        COMFORT_TESTS + "test_yaw_bounds_use_windows_of_five",
        COMFORT,
        "_YAW_ACCELERATION = stencil(5, 3, 2)",
        "_YAW_ACCELERATION = stencil(41, 3, 2)",
    ),
    broken(
        "bounds include their ends",
        COMFORT_TESTS + "test_longitudinal_acceleration_bounds_are_strict",
        COMFORT,
        "inside &= low < value < high",
        "inside &= low <= value <= high",
    ),
)
