"""Training jobs: SFT, RL, and the pipeline."""
