"""The decoding processes a policy can be trained and sampled with, by the name that recipes and checkpoints use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlhf_drive.errors import ConfigError, UnknownNameError, did_you_mean
from rlhf_drive.policies.autoregressive import Autoregressive
from rlhf_drive.policies.flow import DiscreteFlow
from rlhf_drive.policies.masked import MaskedDiffusion
from rlhf_drive.policies.process import Process
from rlhf_drive.policies.tokenizer import TrajectoryTokenizer

__all__ = ["PROCESSES", "build_process"]

PROCESSES: Mapping[str, Callable[..., Process]] = {
    "masked": MaskedDiffusion,
    "autoregressive": Autoregressive,
    "flow": DiscreteFlow,
}
"""``factory(tokenizer, **options)`` by name."""


def build_process(name: str, options: Mapping[str, float], tokenizer: TrajectoryTokenizer) -> Process:
    """The process called `name`.

    Args:
        name: A key of `PROCESSES`.
        options: Numbers of the process, as its `options` gives them.
        tokenizer: What the tokens stand for.

    Raises:
        UnknownNameError: There is no such process.
        ConfigError: It has no such option.
    """
    if name not in PROCESSES:
        raise UnknownNameError(f"Unknown decoding process {name!r}. {did_you_mean(name, PROCESSES)}")
    try:
        return PROCESSES[name](tokenizer, **options)
    except TypeError:
        raise ConfigError(f"Process {name!r} does not take the options {', '.join(options) or '(none)'}.") from None
