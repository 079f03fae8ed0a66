"""From a recipe's `reward` section to a reward and the service that scores with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewards.compose import RewardConfig, RewardSpec
from rewards.service import LocalRewardService
from rlhf_drive.config import RewardSection

if TYPE_CHECKING:
    from rewards.ray_service import RayRewardService

__all__ = ["build_service", "metric_config", "reward_config"]


def reward_config(section: RewardSection) -> RewardConfig:
    """The section as data that any worker can build a reward from."""
    return RewardConfig(
        terms=tuple(RewardSpec(term.name, term.weight, dict(term.options)) for term in section.terms),
        gates=tuple(RewardSpec(gate.name, 1.0, dict(gate.options)) for gate in section.gates),
        scorer=section.scorer,
        scorer_options=dict(section.scorer_options),
    )


def metric_config(metric: str, section: RewardSection | None = None) -> RewardConfig:
    """The reward that is a metric itself.

    Args:
        metric: `pdms` or `epdms`.
        section: A recipe's reward; its scorer options are taken over where its scorer is the metric's.
    """
    options = dict(section.scorer_options) if section and section.scorer == metric else {}
    return RewardConfig((RewardSpec(metric),), scorer=metric, scorer_options=options)


def build_service(
    config: RewardConfig, section: RewardSection, *, address: str | None = None
) -> LocalRewardService | RayRewardService:
    """The service that scores by `config` on the engine that the section names.

    Use it in a ``with`` block: what is left by an exception does not wait for a reward that hangs.

    Args:
        config: What is scored.
        section: A recipe's; engine, workers and time limit are taken from it.
        address: Of the Ray cluster, see :class:`~rewards.ray_service.RayRewardService`.

    Raises:
        ConfigError: The reward or the engine cannot be had; the message says why.
    """
    if section.engine == "ray":
        from rewards.ray_service import RayRewardService

        return RayRewardService(config, workers=section.workers, timeout_s=section.timeout_s, address=address)
    return LocalRewardService(config.build(), workers=section.workers, timeout_s=section.timeout_s)
