"""The table of likelihoods and processes agrees with what exists and with what the estimators do."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from oracles.tabular import TabularDenoiser, all_outcomes, scheduled_trace

from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood import ESTIMATORS, make_likelihood
from rlhf_drive.likelihood_fits import (
    LIKELIHOODS,
    PROBED,
    draws_refusal,
    likelihoods_of,
    refusal,
    replay_refusal,
    steps_refusal,
)
from rlhf_drive.policies.processes import PROCESSES

FITS = {
    "masked": {"trace", "mean_field", "coupled", "elbo", "random_mask", "sandwich"},
    "flow": {"trace", "marginal"},
    "autoregressive": {"trace"},
}


def test_names_are_those_of_the_registries() -> None:
    assert set(LIKELIHOODS) == set(ESTIMATORS)
    assert set(FITS) == set(PROCESSES)


@pytest.mark.parametrize(("likelihood", "process"), list(itertools.product(LIKELIHOODS, FITS)))
def test_refuses_what_does_not_fit_and_names_what_does(likelihood: str, process: str) -> None:
    reason = refusal(likelihood, process)
    assert (reason is None) == (likelihood in FITS[process])
    assert set(likelihoods_of(process)) == FITS[process]
    if reason is not None:
        offered = set(reason.rpartition("Use one of: ")[2].rstrip(".").split(", "))
        assert offered == FITS[process]
        assert repr(process) in reason


@pytest.mark.parametrize("likelihood", [name for name in LIKELIHOODS if name not in ("trace", "marginal")])
@pytest.mark.parametrize("process", ["flow", "autoregressive"])
def test_estimators_refuse_traces_without_masked_states(likelihood: str, process: str) -> None:
    policy = TabularDenoiser(1, 3, 3, seed=0)
    trace = scheduled_trace(all_outcomes(3, 3), [[0], [1], [2]], 3)
    trace = replace(trace, state=trace.action) if process == "flow" else replace(trace, prefix=True)
    estimator = make_likelihood(likelihood, draws=2)
    shape = estimator.probe_shape(3)
    probes = None if shape is None else estimator.draw(trace, torch.rand(len(trace), *shape))
    with pytest.raises(ConfigError, match=re.escape(str(refusal(likelihood, process)))):
        estimator(policy, torch.tensor([0]), trace, probes)


def test_estimators_and_table_agree_on_steps_and_draws() -> None:
    for name in LIKELIHOODS:
        estimator = make_likelihood(name, draws=2)
        assert estimator.name == name
        assert estimator.visits_steps == (steps_refusal(name, "grpo", "token") is None)
        assert (estimator.probe_shape(3) is not None) == (name in PROBED)
        assert (replay_refusal(name) is None) == (name not in PROBED)


def test_steps_are_drawn_for_sums_of_token_terms_only() -> None:
    assert steps_refusal("trace", "grpo", "token") is None
    assert "importance_sampling_level 'sequence'" in str(steps_refusal("trace", "grpo", "sequence"))
    assert "loss_type 'gmpo'" in str(steps_refusal("marginal", "gmpo", "token"))
    assert "loss_type 'wll'" in str(steps_refusal("trace", "wll", "token"))
    assert "likelihood 'elbo'" in str(steps_refusal("elbo", "grpo", "token"))


def test_pairs_need_an_even_number_of_masks() -> None:
    assert draws_refusal("elbo", 4, True) is None
    assert draws_refusal("elbo", 3, False) is None
    assert "even; got 3" in str(draws_refusal("elbo", 3, True))
    assert "'coupled'" in str(draws_refusal("coupled", 2, True))
    with pytest.raises(ConfigError, match="even"):
        make_likelihood("elbo", draws=3, antithetic=True)
