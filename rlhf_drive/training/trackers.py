"""Metrics beside `metrics.jsonl`: TensorBoard, Trackio and Weights & Biases, one class each.

Trackio and Weights & Biases get one run per phase, all in a group of the run folder's name, so that the curves of two
seeds lie in one panel. A resumed phase goes on in its run. What a killed process sent after its last checkpoint is sent
again with the same step: neither service takes a point back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rlhf_drive.errors import ConfigError
from rlhf_drive.runs.folders import open_run

__all__ = [
    "TensorBoard",
    "TrackedRun",
    "Tracker",
    "Trackers",
    "Trackio",
    "WeightsAndBiases",
    "check_trackers",
    "make_trackers",
    "tracking_id",
]


class Tracker(Protocol):
    """Takes the metrics of a run."""

    name: str
    """For messages."""

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """Numbers of `step` of `phase`."""

    def resume(self, step: int, phase: str) -> None:
        """`phase` goes on after `step`; what came later is void."""

    def close(self) -> None:
        """Send what is left."""


class Trackers:
    """Several trackers as one, none of which ends the run.

    Of one that raises it is said once, and it is left alone from then on.

    Args:
        trackers: What gets the metrics.
        say: Takes the warning.

    Example:
        >>> Trackers([], print).switched_off
        0
    """

    def __init__(self, trackers: list[Tracker], say: Callable[[str], None]) -> None:
        self._live, self._say = list(trackers), say
        self.switched_off = 0
        """Trackers that failed so far."""

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """As :meth:`Tracker.log`, for all that still work."""
        self._each(lambda tracker: tracker.log(step, metrics, phase), f"at {phase} step {step}")

    def resume(self, step: int, phase: str) -> None:
        """As :meth:`Tracker.resume`."""
        self._each(lambda tracker: tracker.resume(step, phase), f"on going on after {phase} step {step}")

    def close(self) -> None:
        """As :meth:`Tracker.close`; a second time does nothing."""
        self._each(lambda tracker: tracker.close(), "at the end")
        self._live.clear()

    def _each(self, act: Callable[[Tracker], None], when: str) -> None:
        for tracker in list(self._live):
            try:
                act(tracker)
            except Exception as error:  # whatever a foreign package raises: training does not depend on it
                self._live.remove(tracker)
                self.switched_off += 1
                reason = str(error).splitlines()[0] if str(error) else ""
                self._say(
                    f"warning: {tracker.name} failed {when} and gets no more metrics "
                    f"({type(error).__name__}: {reason}); metrics.jsonl has them all"
                )


class TensorBoard:
    """Event files in ``tensorboard/<phase>`` of the run folder."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._boards: dict[str, Any] = {}
        self._purge: dict[str, int] = {}

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """Scalars of `step`."""
        board = self._board(phase)
        for name, value in metrics.items():
            board.add_scalar(name, value, step)

    def resume(self, step: int, phase: str) -> None:
        """TensorBoard hides what it had of `phase` beyond `step`."""
        if phase in self._boards:
            self._boards.pop(phase).close()
        self._purge[phase] = step + 1

    def close(self) -> None:
        """Flush and close."""
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def _board(self, phase: str) -> Any:
        """Writer of a phase, opened at its first step."""
        if phase not in self._boards:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / "tensorboard" / phase
            self._boards[phase] = SummaryWriter(str(folder), purge_step=self._purge.get(phase))
        return self._boards[phase]


class _PhaseRuns:
    """A run per phase; the one before is finished when another phase begins.

    Args:
        start: Opens the run of a phase, a new one or the one that is there.
    """

    def __init__(self, start: Callable[[str], Any]) -> None:
        self._start, self._phase = start, ""
        self._run: Any = None

    def of(self, phase: str) -> Any:
        """The run of `phase`."""
        if phase != self._phase:
            self.finish()
            self._run, self._phase = self._start(phase), phase
        return self._run

    def finish(self) -> None:
        """End the open run."""
        run, self._run, self._phase = self._run, None, ""
        if run is not None:
            run.finish()


@dataclass(frozen=True)
class TrackedRun:
    """What a run is called in Trackio and Weights & Biases."""

    project: str
    """Project that it belongs to."""
    group: str
    """What its phases' runs have in common; the run folder's name."""
    run_id: str
    """No other run has it, see :func:`tracking_id`; the phases' runs are called ``<run_id>-<phase>``."""
    config: Mapping[str, object]
    """Recipe, shown beside the run."""


class Trackio:
    """Trackio, which writes to this machine: where its variable TRACKIO_DIR says, else in the user's cache."""

    name = "Trackio"

    def __init__(self, identity: TrackedRun) -> None:
        """Nothing is opened before the first step."""
        self._identity, self._runs = identity, _PhaseRuns(self._start)

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """Numbers of `step`."""
        self._runs.of(phase).log(dict(metrics), step=step)

    def resume(self, step: int, phase: str) -> None:
        """The phase's run is found again by its name; points sent before stay."""

    def close(self) -> None:
        """Write what is left."""
        self._runs.finish()

    def _start(self, phase: str) -> Any:
        import trackio

        its = self._identity
        return trackio.init(
            project=its.project, name=f"{its.run_id}-{phase}", group=its.group, config=dict(its.config),
            resume="allow", embed=False,
        )  # fmt: skip


class WeightsAndBiases:
    """Weights & Biases; its variables say where to (WANDB_MODE=offline sends nothing, and `wandb sync` does later)."""

    name = "Weights & Biases"

    def __init__(self, identity: TrackedRun, folder: Path) -> None:
        """Nothing is opened before the first step; its own files go to `folder`."""
        self._identity, self._folder, self._runs = identity, folder, _PhaseRuns(self._start)

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """Numbers of `step`."""
        self._runs.of(phase).log({**metrics, "step": step})

    def resume(self, step: int, phase: str) -> None:
        """The phase's run is found again by its id; points sent before stay."""

    def close(self) -> None:
        """Send what is left."""
        self._runs.finish()

    def _start(self, phase: str) -> Any:
        import wandb

        its = self._identity
        run = wandb.init(
            project=its.project, id=f"{its.run_id}-{phase}", name=f"{its.run_id}-{phase}", group=its.group,
            job_type=phase, config=dict(its.config), dir=str(self._folder), resume="allow", reinit="create_new",
            settings=wandb.Settings(console="off"),  # the live table owns the terminal
        )  # fmt: skip
        # Its own step may only rise, and points after the last checkpoint come twice: `step` is a metric of ours.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def check_trackers(tensorboard: bool, trackio: bool, wandb: bool) -> None:
    """Find out before any work starts that a package is missing.

    Raises:
        ConfigError: Which, and how to install it.
    """
    wanted = (
        ("tensorboard", tensorboard, 'It comes with rlhf-drive: pip install "rlhf-drive"'),
        ("trackio", trackio, 'Install it: pip install "rlhf-drive[trackio]"'),
        ("wandb", wandb, 'Install it: pip install "rlhf-drive[wandb]"'),
    )
    missing = [
        f"logging.{name}: the package {name} is not installed. {how}, or set logging.{name}=false"
        for name, asked, how in wanted
        if asked and not _is_there(name)
    ]
    if missing:
        raise ConfigError("\n".join(missing))


def make_trackers(
    folder: Path, *, project: str, trackio: bool, wandb: bool, config: Mapping[str, object] | None = None
) -> list[Tracker]:
    """What a recipe's section `logging` asks for beside TensorBoard, which `MetricsWriter` has itself.

    Args:
        folder: Run folder.
        project: `logging.project`.
        trackio: Whether Trackio gets the metrics.
        wandb: Whether Weights & Biases gets them.
        config: Recipe as plain data.

    Raises:
        ConfigError: A package is missing.
        DataError: The folder holds no run.
    """
    check_trackers(False, trackio, wandb)
    if not (trackio or wandb):
        return []
    identity = TrackedRun(project, folder.resolve().name, tracking_id(folder), dict(config or {}))
    found: list[Tracker] = [Trackio(identity)] if trackio else []
    return found + ([WeightsAndBiases(identity, folder)] if wandb else [])


def tracking_id(folder: Path) -> str:
    """Name of the run of `folder` in Trackio and Weights & Biases: the folder's, and what no other run has.

    Raises:
        DataError: The folder holds no run.
    """
    run = open_run(folder)
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in run.name)
    return f"{name[:80]}-{run.identity[:8]}"


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module that was put in place by hand has no specification
        return True
