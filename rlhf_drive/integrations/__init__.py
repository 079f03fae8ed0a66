"""Bridges to other trainers: our rewards in TRL."""

from rlhf_drive.integrations.trl import as_trl_reward, prompt_rows

__all__ = ["as_trl_reward", "prompt_rows"]
