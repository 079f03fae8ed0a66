"""Log-probability of a rollout: exact from the decode trace, or one of the published surrogates."""

from rlhf_drive.likelihood.base import LikelihoodEstimator, Probes, TokenLogp, flatten_steps, tempered_logp
from rlhf_drive.likelihood.estimators import ESTIMATORS, make_likelihood
from rlhf_drive.likelihood.mean_field import mean_field_logp
from rlhf_drive.likelihood.trace import trace_logp

__all__ = [
    "ESTIMATORS",
    "LikelihoodEstimator",
    "Probes",
    "TokenLogp",
    "flatten_steps",
    "make_likelihood",
    "mean_field_logp",
    "tempered_logp",
    "trace_logp",
]
