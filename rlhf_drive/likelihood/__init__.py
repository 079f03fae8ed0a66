"""Log-probability of a rollout."""
