"""Offline comparison of policies: frozen scenes, paired statistics, one self-contained report."""

from rlhf_drive.compare.analysis import Bootstrap, Comparison, analyse
from rlhf_drive.compare.baselines import BASELINES, BaselinePlanner, baseline_planners
from rlhf_drive.compare.evaluate import Evaluation, Planner, PlannerResult, evaluate
from rlhf_drive.compare.report import print_table, summary, write_report
from rlhf_drive.compare.statistics import (
    Difference,
    Interval,
    PooledDifference,
    mean_interval,
    paired_difference,
    pooled_difference,
)
from rlhf_drive.compare.two_frame import TwoFramePlanner

__all__ = [
    "BASELINES",
    "BaselinePlanner",
    "Bootstrap",
    "Comparison",
    "Difference",
    "Evaluation",
    "Interval",
    "Planner",
    "PlannerResult",
    "PooledDifference",
    "TwoFramePlanner",
    "analyse",
    "baseline_planners",
    "evaluate",
    "mean_interval",
    "paired_difference",
    "pooled_difference",
    "print_table",
    "summary",
    "write_report",
]
