"""Log-probability of a rollout: exact from the decode trace, or the mean-field surrogate."""

from rlhf_drive.likelihood.base import LikelihoodEstimator, flatten_steps, tempered_logp
from rlhf_drive.likelihood.mean_field import mean_field_logp
from rlhf_drive.likelihood.trace import trace_logp

__all__ = ["LikelihoodEstimator", "flatten_steps", "mean_field_logp", "tempered_logp", "trace_logp"]
