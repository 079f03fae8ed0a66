"""Limits on updates: what counts as a breach, and what each answer leaves behind."""

from __future__ import annotations

import json
import math
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

from rlhf_drive.errors import ConfigError, TrainingError
from rlhf_drive.training.guards import LimitGuard, Limits, OnLimit, breached

CALM = {"kl/old_approx": 0.001, "ratio/min": 0.9, "ratio/max": 1.1}
WILD = {"kl/old_approx": 0.5, "ratio/min": 0.9, "ratio/max": 1.1}


@pytest.mark.parametrize(
    ("metrics", "limits", "said"),
    [
        ({"kl/old_approx": 0.1}, (0.1, 0.0), None),  # at the limit is allowed
        ({"kl/old_approx": 0.11}, (0.1, 0.0), r"^kl/old_approx is 0.11, above rl.kl_limit = 0.1$"),
        ({"kl/old_approx": math.nan}, (0.1, 0.0), "kl/old_approx is nan"),
        ({"kl/old_approx": math.inf}, (0.1, 0.0), "kl/old_approx is inf"),
        ({"ratio/min": 0.5, "ratio/max": 2.0}, (0.0, 2.0), None),
        ({"ratio/min": 0.499, "ratio/max": 1.0}, (0.0, 2.0), r"from 0.499 to 1, outside \[1/2, 2\]"),
        ({"ratio/min": 1.0, "ratio/max": 2.001}, (0.0, 2.0), r"from 1 to 2.001, outside \[1/2, 2\]"),
        ({"ratio/min": 1.0, "ratio/max": math.nan}, (0.0, 2.0), "from 1 to nan"),
        ({"ratio/min": math.nan, "ratio/max": 1.0}, (0.0, 2.0), "from nan to 1"),
        ({"kl/old_approx": 9.0, "ratio/min": 0.0, "ratio/max": 9.0}, (0.0, 0.0), None),  # both off
        ({"kl/old_approx": 9.0, "ratio/min": 0.1, "ratio/max": 9.0}, (0.1, 2.0), "kl_limit.* and .*ratio_limit"),
    ],
)
def test_what_counts_as_a_breach(metrics: dict[str, float], limits: tuple[float, float], said: str | None) -> None:
    found = breached(metrics, Limits(*limits, "stop"))
    assert (found is None) == (said is None)
    assert said is None or re.search(said, str(found)), found


def test_a_limit_on_what_nobody_measures_is_refused() -> None:
    assert breached({}, Limits(0.0, 0.0, "stop")) is None
    with pytest.raises(ConfigError, match=r"rl.ratio_limit limits ratio/min, .* set rl.ratio_limit to 0"):
        breached({"kl/old_approx": 0.0}, Limits(0.1, 2.0, "stop"))
    with pytest.raises(ConfigError, match=r"rl.kl_limit limits kl/old_approx"):
        breached({"ratio/min": 1.0, "ratio/max": 1.0}, Limits(0.1, 0.0, "stop"))


@pytest.mark.parametrize(
    ("kl", "ratio", "on_limit", "said"),
    [
        (-0.1, 0.0, "stop", "rl.kl_limit = -0.1"),
        (math.nan, 0.0, "stop", "rl.kl_limit = nan"),
        (0.0, 1.0, "stop", "rl.ratio_limit = 1.0 must be 0 .off. or above 1"),
        (0.0, 0.5, "stop", "rl.ratio_limit = 0.5"),
        (0.0, math.inf, "stop", "rl.ratio_limit = inf"),
        (0.0, 0.0, "rollbak", "Did you mean 'rollback'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(kl: float, ratio: float, on_limit: OnLimit, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Limits(kl, ratio, on_limit)


def make(on_limit: OnLimit) -> tuple[nn.Linear, torch.optim.Optimizer, LimitGuard]:
    torch.manual_seed(0)
    policy = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    return policy, optimizer, LimitGuard(Limits(0.1, 0.0, on_limit), policy, optimizer)


def learn(policy: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    policy(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weights(policy: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def run(guard: LimitGuard, policy: nn.Module, optimizer: torch.optim.Optimizer, wild: list[bool]) -> None:
    """One step of two updates for each entry; a wild one breaches before its second update."""
    for step, breach in enumerate(wild):
        guard.begin()
        learn(policy, optimizer, 2 * step)
        policy(torch.ones(1, 4)).sum().backward()
        if guard.check(WILD if breach else CALM, step):
            assert all(p.grad is None for p in policy.parameters())
            continue
        optimizer.zero_grad(set_to_none=True)
        learn(policy, optimizer, 2 * step + 1)


def test_rollback_leaves_what_the_other_steps_alone_would_have_left() -> None:
    policy, optimizer, guard = make("rollback")
    run(guard, policy, optimizer, [False, True, False])
    expected, expected_optimizer, _ = make("rollback")
    for seed in (0, 1, 4, 5):
        learn(expected, expected_optimizer, seed)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), weights(expected), strict=True))
    assert guard.metrics() == {"guard/rollbacks": 1.0, "guard/early_stops": 0.0}


def test_next_batch_keeps_the_update_and_skips_the_rest() -> None:
    policy, optimizer, guard = make("next_batch")
    run(guard, policy, optimizer, [False, True, True, True, True, False])
    expected, expected_optimizer, _ = make("next_batch")
    for seed in (0, 1, 2, 4, 6, 8, 10, 11):
        learn(expected, expected_optimizer, seed)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), weights(expected), strict=True))
    assert guard.metrics() == {"guard/rollbacks": 0.0, "guard/early_stops": 4.0}


def test_stop_ends_the_run_at_once() -> None:
    policy, optimizer, guard = make("stop")
    with pytest.raises(TrainingError, match=r"^Step 2: kl/old_approx is 0.5, .* rl.on_limit is stop. Lower") as error:
        run(guard, policy, optimizer, [False, True])
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_three_rollbacks_in_a_row_stop_the_run() -> None:
    policy, optimizer, guard = make("rollback")
    run(guard, policy, optimizer, [True, True, False, True, True])
    assert guard.rollbacks == 4
    before = weights(policy)
    with pytest.raises(TrainingError, match=r"Step 1: .* updates of 3 steps in a row had to be undone"):
        run(guard, policy, optimizer, [True])
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), before, strict=True))


def test_a_resumed_run_counts_on() -> None:
    policy, optimizer, guard = make("rollback")
    run(guard, policy, optimizer, [False, True, True])
    kept = json.loads(json.dumps(guard.state()))
    resumed = LimitGuard(guard.limits, policy, optimizer)
    resumed.restore(kept)
    assert resumed.metrics() == guard.metrics() == {"guard/rollbacks": 2.0, "guard/early_stops": 0.0}
    with pytest.raises(TrainingError, match="3 steps in a row"):
        run(resumed, policy, optimizer, [True])
    calm = LimitGuard(guard.limits, policy, optimizer)
    calm.restore(kept)
    run(calm, policy, optimizer, [False, True, True])  # the calm step ended the row
    fresh = LimitGuard(guard.limits, policy, optimizer)
    fresh.restore({})
    assert fresh.metrics() == {"guard/rollbacks": 0.0, "guard/early_stops": 0.0}


def test_without_limits_nothing_is_watched() -> None:
    policy, optimizer, _ = make("rollback")
    guard = LimitGuard(Limits(0.0, 0.0, "rollback"), policy, optimizer)
    guard.begin()
    assert not guard.check({}, 0)
    assert not guard.limits.active
    assert Limits(0.0, 1.5, "stop").active
    assert Limits(0.1, 0.0, "stop").active
