"""Which likelihood fits which decoding process, and why not: plain data, for recipes and for errors.

Names are those of `rlhf_drive.likelihood.ESTIMATORS` and of `rlhf_drive.policies.processes.PROCESSES`; this file needs
neither, so that a recipe is checked without loading a network library.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LIKELIHOODS", "PROBED", "draws_refusal", "likelihoods_of", "refusal", "replay_refusal", "steps_refusal"]

LIKELIHOODS = ("trace", "marginal", "mean_field", "coupled", "elbo", "random_mask", "sandwich")
"""Likelihoods by name; the first is the exact one and fits every process."""
PROBED = ("coupled", "elbo", "random_mask", "sandwich")
"""Those that average over drawn masks, and so take a number of draws."""
STEPPED = ("trace", "marginal")
"""Those that visit the decode steps, so that some of the steps can be drawn."""

PAIRED = ("elbo", "sandwich")
"""Those whose masks can be drawn in complementary pairs; `coupled` always draws pairs."""
OWN_STATES = ("trace", "marginal", "mean_field")
"""Those that look at states which the sampler visited, so that its routing can be replayed in them."""

_NO_MASKS = {
    "flow": "a flow policy's states are noisy plans: it was never trained on hidden tokens",
    "autoregressive": "an autoregressive policy sees the tokens before a position and no others: it was never trained "
    "to fill in a plan with hidden tokens",
}
_START_ONLY = {
    "flow": "scoring the finished plan from the noise it started from leaves out every later step, and weighs the "
    "rollouts wrongly (importance weights are biased)",
    "autoregressive": _NO_MASKS["autoregressive"],
}
_MARGINAL = {
    "masked": "a masked policy's step shows the token it drew, so that there is nothing to sum over: its trace is the "
    "marginal",
    "autoregressive": "an autoregressive policy's step shows the token it drew, so that there is nothing to sum over: "
    "its trace is the marginal",
}
_REASONS: Mapping[str, Mapping[str, str]] = {
    "trace": {},
    "marginal": _MARGINAL,
    "mean_field": _START_ONLY,
    **dict.fromkeys(PROBED, _NO_MASKS),
}

_PRODUCTS = {"gmpo": "a geometric mean over the rollout's tokens", "wll": "the rollout's whole log-probability"}
"""Loss types that are no sum of token terms."""


def likelihoods_of(process: str) -> tuple[str, ...]:
    """Names of the likelihoods that fit a process.

    Example:
        >>> likelihoods_of("flow")
        ('trace', 'marginal')
    """
    return tuple(name for name in LIKELIHOODS if process not in _REASONS[name])


def refusal(likelihood: str, process: str) -> str | None:
    """Why a likelihood does not fit a process, with those that do; None if it fits.

    Args:
        likelihood: One of `LIKELIHOODS`; a name of someone else's is let through.
        process: `masked`, `flow` or `autoregressive`.

    Example:
        >>> refusal("trace", "flow") is None
        True
    """
    reason = _REASONS.get(likelihood, {}).get(process)
    if reason is None:
        return None
    return (
        f"Likelihood {likelihood!r} does not fit process {process!r}: {reason}. "
        f"Use one of: {', '.join(likelihoods_of(process))}."
    )


def steps_refusal(likelihood: str, loss_type: str, importance_sampling_level: str) -> str | None:
    """Why only some decode steps may not be drawn (`likelihood_steps` above 0); None if they may.

    A drawn subset, weighed K/m, is unbiased for a sum over slots and for nothing else.

    Args:
        likelihood: One of `LIKELIHOODS`.
        loss_type: As in a recipe.
        importance_sampling_level: As in a recipe.
    """
    if likelihood not in STEPPED:
        return (
            f"likelihood_steps draws some of the decode steps, which likelihood {likelihood!r} does not visit; set it "
            f"to 0 or use one of: {', '.join(STEPPED)}."
        )
    if loss_type in _PRODUCTS:
        return (
            f"likelihood_steps leaves decode steps out, and loss_type {loss_type!r} needs {_PRODUCTS[loss_type]}; set "
            "likelihood_steps to 0 or use a token-level loss such as 'grpo'."
        )
    if importance_sampling_level not in ("token", "step"):
        return (
            f"likelihood_steps leaves decode steps out, and importance_sampling_level {importance_sampling_level!r} "
            "needs the ratios of all slots together; set likelihood_steps to 0 or use level 'token' or 'step'."
        )
    return None


def draws_refusal(likelihood: str, draws: int, antithetic: bool) -> str | None:
    """Why `likelihood_draws` and `likelihood_antithetic` do not fit a likelihood; None if they do.

    Args:
        likelihood: One of `LIKELIHOODS`.
        draws: Masks (pairs of them for `coupled`) that are averaged; ignored by likelihoods that draw none.
        antithetic: Whether masks come in complementary pairs.
    """
    if draws > 1 and likelihood in LIKELIHOODS and likelihood not in PROBED:
        return f"likelihood_draws has no effect with likelihood {likelihood!r}, which draws nothing; set it to 1."
    if not antithetic:
        return None
    if likelihood not in PAIRED:
        return f"likelihood_antithetic pairs the masks of {' and '.join(PAIRED)}; for {likelihood!r} set it to false."
    if draws % 2:
        return f"likelihood_antithetic pairs masks, so likelihood_draws must be even; got {draws}."
    return None


def replay_refusal(likelihood: str) -> str | None:
    """Why the sampler's routing cannot be replayed (`router: replay`) in a likelihood's passes; None if it can."""
    if likelihood in OWN_STATES or likelihood not in LIKELIHOODS:
        return None
    return (
        f"router 'replay' repeats the sampler's experts, and likelihood {likelihood!r} looks at states that the "
        f"sampler did not visit; use router 'record', or one of: {', '.join(OWN_STATES)}."
    )
