"""Bridges to other trainers: our rewards in TRL, and TRL's configuration as keys of a recipe."""

from rlhf_drive.integrations.trl import as_trl_reward, prompt_rows
from rlhf_drive.integrations.trl_config import grpo_config_from_recipe, recipe_keys_from_grpo_config

__all__ = ["as_trl_reward", "grpo_config_from_recipe", "prompt_rows", "recipe_keys_from_grpo_config"]
