"""rlhf-drive: RL fine-tuning of driving policies that decode discrete tokens."""
