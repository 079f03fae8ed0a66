"""Each tracker gets every number under the right run and step, goes on after a resume, and never ends the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_drive.errors import ConfigError
from rlhf_drive.training.metrics import MetricsWriter, read_metrics
from rlhf_drive.training.trackers import Tracker, check_trackers, make_trackers, tracking_id

IDENTITY = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder of its own name and identity."""
    path = tmp_path / "my run"
    path.mkdir()
    (path / "recipe.yaml").write_text("job: rl\n")
    (path / "stages.json").write_text(json.dumps({"id": IDENTITY, "seconds": 0.0, "done": {}}))
    return path


@dataclass
class Service:
    """What a foreign service got: runs by name, with their rows, whether they ended, and what they were opened with."""

    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)


def _fake_wandb(service: Service) -> Any:
    """As far as the package's own documentation describes it; a run that is there is gone on with."""

    def init(**options: Any) -> Any:
        name = options["id"]
        service.opened.append(options)
        rows = service.rows.setdefault(name, [])

        def define_metric(metric: str, step_metric: str | None = None) -> None:
            service.steps.setdefault(name, []).append((metric, step_metric))

        return SimpleNamespace(log=rows.append, finish=lambda: service.ended.append(name), define_metric=define_metric)

    return SimpleNamespace(init=init, Settings=lambda **options: options)


def _fake_trackio(service: Service) -> Any:
    def init(project: str, name: str, group: str, config: Mapping[str, object], resume: str, embed: bool) -> Any:
        service.opened.append({"project": project, "name": name, "group": group, "config": config, "resume": resume})
        rows = service.rows.setdefault(name, [])

        def log(metrics: Mapping[str, float], step: int) -> None:
            rows.append({**metrics, "step": step})

        return SimpleNamespace(log=log, finish=lambda: service.ended.append(name))

    return SimpleNamespace(init=init)


FAKES: dict[str, Callable[[Service], Any]] = {"wandb": _fake_wandb, "trackio": _fake_trackio}


@pytest.fixture(params=sorted(FAKES))
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Service:
    """A stand-in for the package of the parameter's name."""
    found = Service()
    monkeypatch.setitem(sys.modules, request.param, FAKES[request.param](found))
    found.name = request.param  # type: ignore[attr-defined]
    return found


def _trackers(folder: Path, service: Any) -> list[Tracker]:
    wanted = {name: name == service.name for name in FAKES}
    return make_trackers(folder, project="my-project", config={"rl": {"max_steps": 3}}, **wanted)


def test_a_run_per_phase_gets_every_number_at_its_step(folder: Path, service: Service) -> None:
    with MetricsWriter(folder, False, _trackers(folder, service)) as writer:
        writer.log(1, {"loss/train": 2.0}, phase="sft")
        writer.log(2, {"loss/train": 1.5}, phase="sft")
        writer.log(1, {"reward/total": 0.25, "kl/ref_k3": 0.125}, phase="rl-seed0")
        assert service.ended == ["my-run-01234567-sft"]  # SFT's run does not look alive while RL runs
    assert service.rows == {
        "my-run-01234567-sft": [{"loss/train": 2.0, "step": 1}, {"loss/train": 1.5, "step": 2}],
        "my-run-01234567-rl-seed0": [{"reward/total": 0.25, "kl/ref_k3": 0.125, "step": 1}],
    }
    assert service.ended == ["my-run-01234567-sft", "my-run-01234567-rl-seed0"]
    assert {(o["project"], o["group"], o["config"]["rl"]["max_steps"]) for o in service.opened} == {
        ("my-project", "my run", 3)
    }


def test_a_resumed_run_goes_on_in_its_own(folder: Path, service: Service) -> None:
    with MetricsWriter(folder, False, _trackers(folder, service)) as writer:
        writer.log(1, {"reward/total": 0.1}, phase="rl-seed0")
        writer.log(2, {"reward/total": 0.2}, phase="rl-seed0")
    with MetricsWriter(folder, False, _trackers(folder, service)) as writer:  # another process, later
        writer.resume(1, phase="rl-seed0")
        writer.log(2, {"reward/total": 0.2}, phase="rl-seed0")
    assert [row["step"] for row in service.rows["my-run-01234567-rl-seed0"]] == [1, 2, 2]
    assert [options["resume"] for options in service.opened] == ["allow", "allow"]


def test_nothing_is_opened_before_the_first_step(folder: Path, service: Service) -> None:
    with MetricsWriter(folder, False, _trackers(folder, service)) as writer:
        writer.resume(0, phase="sft")
    assert service.opened == []


def test_weights_and_biases_counts_by_a_step_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own step may only rise, so that the steps that come again after a resume would be dropped.
    found = Service()
    monkeypatch.setitem(sys.modules, "wandb", _fake_wandb(found))
    with MetricsWriter(folder, False, make_trackers(folder, project="p", trackio=False, wandb=True)) as writer:
        writer.log(7, {"loss/train": 2.0}, phase="sft")
    assert found.steps["my-run-01234567-sft"] == [("step", None), ("*", "step")]
    assert found.opened[0]["dir"] == str(folder)
    assert found.opened[0]["reinit"] == "create_new"


@dataclass
class Failing:
    """Fails at one of its calls."""

    fails: str
    name: str = "Foreign"
    calls: list[str] = field(default_factory=list)

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if what == self.fails:
            raise ConnectionError("no route to host\nand much more")

    def log(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._call(f"log {step}")

    def resume(self, step: int, phase: str) -> None:
        self._call("resume")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize(
    ("fails", "calls", "off"),
    [("log 2", ["resume", "log 1", "log 2"], [0, 0, 1]), ("resume", ["resume"], [1, 1, 1])],
)
def test_a_tracker_that_fails_is_switched_off_said_once_and_counted(
    folder: Path, fails: str, calls: list[str], off: list[int]
) -> None:
    said: list[str] = []
    bad, good = Failing(fails), Failing("")
    with MetricsWriter(folder, False, [bad, good], say=said.append) as writer:
        writer.resume(0, phase="rl")
        for step in (1, 2, 3):
            writer.log(step, {"reward/total": step}, phase="rl")
    when = "at rl step 2" if fails == "log 2" else "on going on after rl step 0"
    assert said == [
        f"warning: Foreign failed {when} and gets no more metrics (ConnectionError: no route to host); "
        "metrics.jsonl has them all"
    ]
    assert bad.calls == calls
    assert good.calls == ["resume", "log 1", "log 2", "log 3", "close"]
    lines = read_metrics(folder)
    assert [line["reward/total"] for line in lines] == [1.0, 2.0, 3.0]
    assert [line.get("logging/trackers_off", 0) for line in lines] == off


def test_a_tracker_that_fails_at_the_end_is_said_too(folder: Path) -> None:
    said: list[str] = []
    with MetricsWriter(folder, False, [Failing("close")], say=said.append) as writer:
        writer.log(1, {"reward/total": 1}, phase="rl")
    assert [text.partition(" (")[0] for text in said] == ["warning: Foreign failed at the end and gets no more metrics"]


def test_tensorboard_is_a_tracker_like_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    said: list[str] = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fail)
    with MetricsWriter(folder, True, say=said.append) as writer:
        writer.log(1, {"reward/total": 1}, phase="rl")
    assert len(read_metrics(folder)) == 1
    assert said[0].startswith("warning: TensorBoard failed at rl step 1")


def test_missing_packages_are_all_found_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_drive.training.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_trackers(True, True, True)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "logging.tensorboard", "logging.trackio", "logging.wandb",
    ]  # fmt: skip
    assert 'pip install "rlhf-drive[trackio]"' in str(caught.value)
    assert 'pip install "rlhf-drive[wandb]"' in str(caught.value)
    check_trackers(False, False, False)


def test_runs_of_one_name_are_told_apart(folder: Path) -> None:
    first = tracking_id(folder)
    assert first == tracking_id(folder) == "my-run-01234567"
    (folder / "stages.json").write_text(json.dumps({"id": "fedcba9876543210"}))
    assert tracking_id(folder) == "my-run-fedcba98"


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs the package trackio")
def test_trackio_itself_keeps_every_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    with MetricsWriter(folder, False, make_trackers(folder, project="p", trackio=True, wandb=False)) as writer:
        for step in (1, 2):
            writer.log(step, {"reward/total": step / 4}, phase="rl")
    logs = SQLiteStorage.get_logs("p", "my-run-01234567-rl")
    assert [(row["step"], row["reward/total"]) for row in logs] == [(1, 0.25), (2, 0.5)]
