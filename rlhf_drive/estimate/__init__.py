"""What a recipe costs before it runs: counts, rates of a machine, and the time, memory and bottleneck of a step."""

from rlhf_drive.estimate.counts import Parameters, count_parameters
from rlhf_drive.estimate.layout import ONE_PROCESS, Layout, layout_of
from rlhf_drive.estimate.machine import DEVICES, Machine, Rate, from_sheet
from rlhf_drive.estimate.memory import Memory, sampler_memory, trainer_memory
from rlhf_drive.estimate.predict import Prediction, Workload, predict
from rlhf_drive.estimate.sizes import NetworkSizes, StepSizes, network_of, step_of

__all__ = [
    "DEVICES",
    "ONE_PROCESS",
    "Layout",
    "Machine",
    "Memory",
    "NetworkSizes",
    "Parameters",
    "Prediction",
    "Rate",
    "StepSizes",
    "Workload",
    "count_parameters",
    "from_sheet",
    "layout_of",
    "network_of",
    "predict",
    "sampler_memory",
    "step_of",
    "trainer_memory",
]
