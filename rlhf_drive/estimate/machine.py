"""What a machine needs for each piece of work: a fixed time a call, and a time a unit.

Measured on this machine (:mod:`~rlhf_drive.estimate.measure`), or reckoned from a device's data sheet. The shares of
the data sheet that are assumed to be reached (`GEMM_SHARE` and its neighbours) are assumptions: nothing here was run on
a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rlhf_drive.errors import UnknownNameError, did_you_mean
from rlhf_drive.estimate.traffic import Cost
from rlhf_drive.estimate.work import Calls

__all__ = ["DEVICES", "Device", "Machine", "Rate", "from_sheet"]

GEMM_SHARE = 0.35
"""Of the data sheet's dense rate that matrix products of a policy of width 1,024 and more are assumed to reach."""
BANDWIDTH_SHARE = 0.7
"""Of the memory's bandwidth that element by element work is assumed to reach."""
LINK_SHARE = 0.6
"""Of a link's bandwidth that collectives and copies are assumed to reach."""
KERNEL_S = 6e-6
"""To start a kernel from Python."""
CALL_S = 50e-6
"""Of Python around a call of a piece."""


@dataclass(frozen=True)
class Device:
    """A processor's data sheet."""

    name: str
    """As in `--gpu`."""
    flops_16: float
    """Dense bfloat16 operations a second."""
    flops_32: float
    """Float32 operations a second (without TF32)."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second, of its memory."""
    link: float
    """Bytes a second to other devices of a node, one direction."""
    network: float
    """Bytes a second a device to other nodes, one direction."""


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("H200", 989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
        Device("H100", 989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
        Device("A100", 312e12, 19.5e12, 80e9, 2.04e12, 300e9, 25e9),
        Device("A100-40", 312e12, 19.5e12, 40e9, 1.55e12, 300e9, 25e9),
        Device("L40S", 362e12, 91.6e12, 48e9, 0.864e12, 32e9, 25e9),
        Device("A10", 125e12, 31.2e12, 24e9, 0.6e12, 32e9, 12.5e9),
        Device("RTX4090", 165e12, 82.6e12, 24e9, 1.01e12, 32e9, 12.5e9),
        Device("CPU", 0.05e12, 0.05e12, 16e9, 0.01e12, 5e9, 1e9),
    )
}
"""Vendors' data sheets (SXM modules where there are any; links: NVLink, else PCIe 4 x16; network: 400, 200 or 100 Gb/s
a device). `CPU` stands for one core, where nothing was measured."""


@dataclass(frozen=True)
class Rate:
    """``fixed_s + unit_s * n`` for a call with n units."""

    fixed_s: float
    """Seconds a call."""
    unit_s: float
    """Seconds a unit."""

    def seconds(self, calls: float, units: float) -> float:
        """Of so many calls of so many units each."""
        return calls * (self.fixed_s + self.unit_s * units)


@dataclass(frozen=True)
class Machine:
    """All rates that a prediction needs."""

    name: str
    """For people."""
    measured: bool
    """Whether the policy's pieces were measured here; else they come from a data sheet."""
    rates: Mapping[str, Rate]
    """By piece; beside those of the device `features` (a scene's network inputs) and `plans` (random numbers and poses
    of a plan), on the host."""
    score: Rate
    """Scoring of plans by one worker, of prepared scenes."""
    prepare_s: float
    """Preparing a scene for the scorer."""
    monitor: Rate
    """Looking at a step's plans for signs of reward hacking."""
    heldout: Rate
    """EPDMS of held-out plans with the frame before, one plan a scene."""
    scorer_measured: bool = True
    """Whether the scorer was measured here."""
    cores: int = 1
    """Cores that score beside the trainer, where engine `local` scores."""
    core_gain: float = 1.0
    """By which a scoring thread on each of these cores is faster than a single one."""
    memory: float = 0.0
    """Bytes of a device; 0 = not known."""
    link: float = 5e9
    """Bytes a second between processes of a node, reached."""
    network: float = 1e9
    """Bytes a second a device to other nodes, reached."""
    host_copy: float = 2e9
    """Bytes a second of a copy on the host: into the object store, out of it, pickling."""
    disk: float = 1e9
    """Bytes a second written and hashed."""
    message_s: float = 1e-3
    """Of a message between processes."""

    def seconds(self, work: Iterable[Calls]) -> float:
        """Of all these calls, one after the other."""
        return sum(self.rates[part.piece].seconds(part.calls, part.units) for part in work)


SCORE, PREPARE_S, MONITOR, HELDOUT = Rate(1e-3, 30e-6), 4.4e-3, Rate(1e-3, 20e-6), Rate(5e-3, 1e-3)
"""Of a core, on scenes as large as recorded ones, where nothing was measured (docs/performance.md)."""
HOST_RATES = {"features": Rate(0.0, 2e-3), "plans": Rate(1e-3, 30e-6)}


def from_sheet(device: str, costs: Mapping[str, Cost], *, bfloat16: bool, host: Machine | None = None) -> Machine:
    """A machine whose device follows its data sheet.

    A piece takes the longest of its operations, its bytes, and the start of its kernels; the weights' bytes are the
    fixed part, and element by element work is added to matrix products.

    Args:
        device: A key of `DEVICES`.
        costs: By piece.
        bfloat16: Precision of matrix products.
        host: Where the scorer was measured; None takes the documented rates.

    Raises:
        UnknownNameError: There is no such device.
    """
    if device not in DEVICES:
        raise UnknownNameError(f"Unknown GPU {device!r}. {did_you_mean(device, DEVICES)}")
    sheet = DEVICES[device]
    flops = GEMM_SHARE * (sheet.flops_16 if bfloat16 else sheet.flops_32)
    bandwidth = BANDWIDTH_SHARE * sheet.bandwidth
    kernel = KERNEL_S if device != "CPU" else 1e-6
    rates = {
        name: Rate(CALL_S + cost.fixed_bytes / bandwidth + cost.kernels * kernel,
                   cost.flops / flops + cost.bytes / bandwidth)
        for name, cost in costs.items()
    }  # fmt: skip
    if host is None:
        rates = HOST_RATES | rates
        host = Machine(sheet.name, False, rates, SCORE, PREPARE_S, MONITOR, HELDOUT, scorer_measured=False)
    return replace(
        host,
        name=f"{device} (data sheet, not run)",
        measured=False,
        rates={**host.rates, **rates},
        memory=sheet.memory,
        link=LINK_SHARE * sheet.link,
        network=LINK_SHARE * sheet.network,
    )
