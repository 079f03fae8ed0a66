"""Wrong variants of how PDM-Closed chooses and what it hands out."""

from __future__ import annotations

from mutation import Mutation, broken

__all__ = ["PDM_SCORING_RULES"]

CLOSED = "rewards/pdm_closed.py"
PROPOSALS = "rewards/pdm_proposals.py"
SCORING = "rewards/pdm_scoring.py"
WHOLE = "test_pdm_closed.py::"
RATED = "test_pdm_scoring.py::"
HELD = "forecast.pose[counted][:, held]"
LATER = HELD.replace("held", "(np.arange(REFERENCE_STEPS) + 1) // 2")

PDM_SCORING_RULES: tuple[Mutation, ...] = (
    broken(
        "occupancy at 10 Hz",
        RATED + "test_boxes_are_held_for_two_steps_and_follow_the_forecast",
        SCORING,
        HELD,
        f"({HELD} + {LATER}) / 2",
    ),
    broken(
        "t0 overlaps count in the planner's collisions",
        RATED + "test_boxes_are_held_for_two_steps_and_follow_the_forecast",
        SCORING,
        "counted = ~forecast.shapes.ignored[: len(forecast.agent)]",
        "counted = np.ones(len(forecast.agent), dtype=np.bool_)",
    ),
    broken(
        "TLC forgives an ignored red light",
        RATED + "test_a_red_light_that_holds_the_ego_is_not_forgiven",
        SCORING,
        "active = np.ones((len(forecast.red_row), REFERENCE_STEPS), dtype=np.bool_)",
        "active = np.repeat(~shapes.ignored[agents:, None], REFERENCE_STEPS, axis=1)",
    ),
    broken(
        "v2's planner rates comfort",
        RATED + "test_v1_rates_comfort_and_v2_does_not",
        SCORING,
        "metrics = score_states(road, agents, states, rules=V2_RULES, lights=lights)",
        "metrics = score_states(road, agents, states, rules=V2_RULES, lights=lights)\n"
        "        factor = score_states(road, agents, states, rules=V1_RULES).c",
        "        factor = metrics.nc * metrics.dac * metrics.ddc * metrics.tlc",
        "        factor *= metrics.nc * metrics.dac * metrics.ddc * metrics.tlc",
    ),
    broken(
        "v2's planner without driving direction",
        RATED + "test_v2_multiplies_driving_direction_and_v1_does_not",
        SCORING,
        "metrics.dac * metrics.ddc * metrics.tlc",
        "metrics.dac * metrics.tlc",
    ),
    broken(
        "v2's planner without red lights",
        RATED + "test_v2_rates_red_lights_and_v1_does_not",
        SCORING,
        "metrics.ddc * metrics.tlc",
        "metrics.ddc",
    ),
    broken(
        "v2's planner without lane keeping",
        RATED + "test_v2_rates_lane_keeping",
        SCORING,
        "2.0 * metrics.lk + 2.0",
        "2.0 + 2.0",
    ),
    broken(
        "v1's planner does not mask progress",
        RATED + "test_a_proposal_off_the_road_does_not_raise_the_bar",
        SCORING,
        "progress = metrics.progress_m * factor",
        "progress = metrics.progress_m",
    ),
    broken(
        "planner's low-progress branch missing",
        RATED + "test_nobody_gets_beyond_5_m",
        SCORING,
        "if most > _LOW_PROGRESS_M else stuck",
        "if most > 0.0 else stuck",
    ),
    broken(
        "last of equals",
        WHOLE + "test_inside_a_red_connector_v2_rates_all_zero_and_takes_the_first",
        CLOSED,
        "best = int(np.argmax(scores))",
        "best = len(scores) - 1 - int(np.argmax(scores[::-1]))",
    ),
    broken(
        "init speed hypot",
        WHOLE + "test_proposals_start_with_the_signed_longitudinal_speed",
        CLOSED,
        "initial_speed=float(ego_init[3])",
        "initial_speed=float(np.hypot(ego_init[3], ego_init[4]))",
    ),
    broken(
        "row 0 is the ego",
        WHOLE + "test_an_ego_beside_the_road_is_steered_back_and_the_plan_starts_on_the_path",
        PROPOSALS,
        "        out.poses[rows, 0] = pose_at(path, around.start[i])",
        "        out.poses[rows, 0] = 0.0",
    ),
    broken(
        "simulated states handed out",
        WHOLE + "test_a_free_road_is_driven_on_the_centreline_at_the_limit",
        CLOSED,
        "    world = to_world_frame(chosen.poses,",
        "    chosen.poses[:, :NUM_STATES] = search.states[..., :3]\n    world = to_world_frame(chosen.poses,",
    ),
    broken(
        "exact times",
        WHOLE + "test_the_reference_is_the_trajectory_at_truncated_times",
        CLOSED,
        "query_times_us(t0_us))[0]",
        "times[:NUM_STATES])[0]",
    ),
    broken(
        "an unknown limit is 10 m/s",
        WHOLE + "test_an_unknown_limit_means_15_mps",
        CLOSED,
        "_FALLBACK_SPEED_MPS = 15.0",
        "_FALLBACK_SPEED_MPS = 10.0",
    ),
    broken(
        "winner inherits from its last leader",
        "test_pdm_proposals.py::test_speed_of_a_slower_proposal_leaks_into_a_faster_one",
        PROPOSALS,
        "    shared = np.zeros(3)\n",
        "    shared = np.zeros(3)\n    shared[:] = lead[0, steps[0] - 1]\n",
        "        shared[:] = 0.0\n",
        "        if steps[0] == 1:\n            shared[:] = 0.0\n",
    ),
)
