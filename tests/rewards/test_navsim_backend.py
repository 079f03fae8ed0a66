from __future__ import annotations

import ast
import gc
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from navsim_standin import ENDS, HANGS, RAISES, plan, write_cache, write_environment, write_interpreter
from numpy.typing import NDArray
from typer.testing import CliRunner

from rewards import LocalRewardService, PartlyScoredError, RewardConfig, RewardSpec, build_reward, navsim_backend
from rewards.navsim_process import NavsimProcess
from rewards.navsim_worker import find_caches, pack_message, pair_progress, read_message
from rewards.scorer import Scorer
from rlhf_drive.cli_rewards import rewards_app
from rlhf_drive.errors import ConfigError, RewardError
from rlhf_drive.scenes import SceneReference, Trajectories
from rlhf_drive.scenes.importers.vectors import read_vector

Make = Callable[..., Scorer]
WORKER = Path(navsim_backend.navsim_worker.__file__)


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Interpreter with the stand-in of each version."""
    return {v: write_environment(tmp_path_factory.mktemp("environment"), v) for v in ("v1.1", "v2.2")}


@pytest.fixture
def make(environments: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """``make(version, **options)``: the scorer on ``tmp_path/cache``, which holds scene `a`; its workers are ended."""
    made: list[weakref.ref[NavsimProcess]] = []
    start = NavsimProcess.__init__

    def remember(self: NavsimProcess, *args: Any) -> None:
        made.append(weakref.ref(self))
        start(self, *args)

    def build(version: str = "v2.2", **options: Any) -> Scorer:
        cache = tmp_path / "cache"
        if not cache.exists():
            write_cache(cache, "a", version)
        options = {"python": environments[version], "cache": str(cache), "version": version} | options
        return navsim_backend.navsim_scorer(**options)

    monkeypatch.setattr(NavsimProcess, "__init__", remember)
    yield build
    for known in made:
        if (process := known()) is not None:
            process.close()


def _reference(x: float = 3.0, y: float = 4.0) -> SceneReference:
    return cast(SceneReference, SimpleNamespace(ego_init=np.array([x, y, *[0.0] * 9])))


def _process(scorer: Scorer) -> NavsimProcess:
    return cast(Any, scorer.score).__self__.process


def _pid(scorer: Scorer) -> int:
    return cast(Any, _process(scorer))._running._process.pid


def _plans(*plans: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack(plans)


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_progress_of_v1_is_taken_pair_by_pair(make: Make) -> None:
    scorer = make("v1.1")
    found = scorer.score(
        scorer.prepare("a", _reference()), _plans(plan(10), plan(40), plan(10, 0.5), plan(10, 0)), None
    )
    # The reference makes 20 m: 10 / 20; 40 / 40; 10 * .5 / 20; 0. The second plan does not lower the others.
    assert found["ep"].tolist() == [0.5, 1.0, 0.25, 0.0]
    expected = [(5 * 0.5 + 5 + 2) / 12, 1.0, 0.5 * (5 * 0.25 + 5 + 2) / 12, 0.0]
    np.testing.assert_allclose(found["pdms"], expected, rtol=1e-15)
    assert tuple(found) == scorer.columns == ("nc", "dac", "ep", "ttc", "c", "ddc", "pdms")
    assert str(scorer.info) == "NAVSIM (NAVSIM v1.1 (official package), log replay)"


def test_progress_of_v2_is_not_masked_by_the_plans_own_faults(make: Make) -> None:
    scorer = make()
    found = scorer.score(
        scorer.prepare("a", _reference()), _plans(plan(10), plan(40), plan(10, 0.5), plan(10, 0)), None
    )
    assert found["ep"].tolist() == [0.5, 1.0, 0.5, 0.5]
    np.testing.assert_allclose(found["epdms"], [11.5 / 14, 1.0, 0.5 * 11.5 / 14, 0.0], rtol=1e-15)
    assert np.isnan(found["ec"]).all()
    assert str(scorer.info) == "NAVSIM (NAVSIM v2.2 (official package), human filter on, log replay)"
    assert scorer.optional == {"ec"}


def test_progress_up_to_the_limit_is_standing_still() -> None:
    raw, product = np.array([5.0, 2.0, 2.0, 6.0]), np.array([1.0, 1.0, 0.0, 1.0])
    assert pair_progress(raw, product, 5.0, "v1.1").tolist() == [1.0, 1.0, 0.0, 1.0]
    assert pair_progress(raw, product, 5.0, "v2.2").tolist() == [1.0, 1.0, 1.0, 1.0]
    assert pair_progress(raw, product, 4.0, "v1.1").tolist() == [1.0, 0.4, 0.0, 1.0]


def test_a_plan_scores_the_same_alone(make: Make) -> None:
    scorer = make("v1.1")
    plans = _plans(*(plan(x, nc) for x in (1.0, 7.0, 33.0) for nc in (0.5, 1.0)))
    together = scorer.score(scorer.prepare("a", _reference()), plans, None)["pdms"]
    assert [scorer.score("a", plans[i : i + 1], None)["pdms"][0] for i in range(6)] == together.tolist()


def test_a_fault_of_the_human_is_forgiven(make: Make, tmp_path: Path) -> None:
    human = SimpleNamespace(poses=plan(20, nc=0.5, ttc=0))  # half a fault is not forgiven
    write_cache(tmp_path / "cache", "b", "v2.2", human_trajectory=human)
    synthetic = SimpleNamespace(name="SYNTHETIC")
    write_cache(tmp_path / "cache", "c", "v2.2", human_trajectory=human, scene_type=synthetic)
    plans = _plans(plan(20, nc=0.5, ttc=0), plan(20))
    on, off = make(), make(human_filter="off")
    forgiven = on.score(on.prepare("b", _reference()), plans, None)
    assert (forgiven["ttc"].tolist(), forgiven["nc"].tolist()) == ([1.0, 1.0], [0.5, 1.0])
    assert forgiven["epdms"].tolist() == [0.5, 1.0]
    for scorer, token in ((off, "b"), (on, "c")):
        assert scorer.score(scorer.prepare(token, _reference()), plans, None)["epdms"].tolist() == [0.5 * 9 / 14, 1.0]
    assert off.info.human_filter == "off"
    again = make()
    write_cache(tmp_path / "cache", "d", "v2.2", human_trajectory=SimpleNamespace(poses=plan(20, ttc=0.5)))
    assert again.score(again.prepare("d", _reference()), plans, None)["ttc"].tolist() == [0.0, 1.0]


def test_the_plan_of_the_frame_before_counts_two_of_sixteen(make: Make) -> None:
    scorer = make()
    plans, previous = _plans(plan(20), plan(20)), _plans(plan(20), plan(19))
    found = scorer.score(scorer.prepare("a", _reference()), plans, previous)
    assert found["ec"].tolist() == [1.0, 0.0]
    assert found["epdms"].tolist() == [1.0, 14 / 16]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_plan_that_navsim_raises_on_is_lost_alone(make: Make) -> None:
    scorer = make()
    plans = _plans(plan(10), plan(RAISES), plan(20))
    with pytest.raises(PartlyScoredError) as caught:
        scorer.score(scorer.prepare("a", _reference()), plans, None)
    assert caught.value.failures == {1: ("raised", "navsim: ArithmeticError: seven")}
    np.testing.assert_allclose(caught.value.values[:, -1], [11.5 / 14, np.nan, 1.0])
    assert np.isnan(caught.value.values[1]).all()
    assert _process(scorer).starts == 1


def test_a_plan_that_ends_the_worker_is_lost_alone(make: Make) -> None:
    scorer = make()
    scorer.score(scorer.prepare("a", _reference()), _plans(*[plan(10)] * 4), None)  # so that calls get four rows
    with pytest.raises(PartlyScoredError) as caught:
        scorer.score("a", _plans(plan(10), plan(ENDS), plan(20)), None)
    reason = "the process with navsim ended with status 3: out of luck!"
    assert caught.value.failures == {1: ("worker_died", reason)}
    np.testing.assert_allclose(caught.value.values[:, -1], [11.5 / 14, np.nan, 1.0])
    assert _process(scorer).starts > 1
    assert scorer.score("a", _plans(plan(20)), None)["epdms"].tolist() == [1.0]


def test_a_plan_that_hangs_is_lost_alone_and_its_worker_ended(make: Make) -> None:
    scorer = make(timeout_s=1.0)
    scorer.prepare("a", _reference())
    pid = _pid(scorer)
    with pytest.raises(PartlyScoredError) as caught:
        scorer.score("a", _plans(plan(10), plan(HANGS), plan(20)), None)
    assert caught.value.failures == {1: ("timeout", "took longer than 1 s")}
    np.testing.assert_allclose(caught.value.values[:, -1], [11.5 / 14, np.nan, 1.0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_scene_that_keeps_ending_workers_gets_no_more(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(navsim_backend, "_MOST_LOSSES", 2)
    write_cache(tmp_path / "cache", "b", "v2.2", reference=plan(ENDS))
    write_cache(tmp_path / "cache", "a", "v2.2")
    scorer = make()
    for _ in range(2):
        with pytest.raises(Exception, match="ended with status 3"):
            scorer.prepare("b", _reference())
    with pytest.raises(RewardError, match="ended 2 times in a row on this scene"):
        scorer.prepare("b", _reference())
    assert _process(scorer).starts == 2
    assert scorer.score(scorer.prepare("a", _reference()), _plans(plan(20)), None)["epdms"].tolist() == [1.0]


def test_a_scene_without_a_cache_of_its_own_is_refused(make: Make) -> None:
    scorer = make()
    with pytest.raises(RewardError, match="no metric cache of token 'b' among 1"):
        scorer.prepare("b", _reference())
    with pytest.raises(RewardError, match="token 'a' is of another scene: its ego is 5 m off"):
        scorer.prepare("a", _reference(6.0, 8.0))


def test_a_cache_of_the_other_version_is_refused(make: Make, tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", "a", "v1.1")
    scorer = make("v2.2")
    with pytest.raises(RewardError, match=r"was not written by NAVSIM v2\.2"):
        scorer.prepare("a", _reference())


def test_the_service_keeps_reasons_by_row(make: Make, environments: dict[str, str], tmp_path: Path) -> None:
    make("v1.1")
    options = {"python": environments["v1.1"], "cache": str(tmp_path / "cache"), "version": "v1.1"}
    reward = build_reward([RewardSpec("pdms")], scorer="navsim", scorer_options=options)
    scenes = [SimpleNamespace(token=token, reference=_reference()) for token in ("a", "b")]
    plans = Trajectories(_plans(plan(20), plan(RAISES), plan(20), plan(10)), np.array([0, 0, 1, 0]))
    with LocalRewardService(reward, workers=2) as service:
        scores = service.score(cast(Any, scenes), plans)
    assert scores.total[[0, 3]].tolist() == [1.0, (5 * 0.5 + 5 + 2) / 12]
    assert {row: (f.source, f.kind) for row, f in scores.failures.items()} == {
        1: ("scorer", "raised"),
        2: ("scene", "invalid_scene"),
    }
    assert scores.failures[1].reason == "scene 'a': scoring failed: navsim: ArithmeticError: seven"
    assert scores.failures[2].reason.endswith("RewardError: navsim: LookupError: no metric cache of token 'b' among 1")


# -- what is refused at the start -------------------------------------------------------------------------------------


def test_wrong_options_are_refused(make: Make, tmp_path: Path) -> None:
    for options, message in (
        ({"version": "v2.2", "human_filter": "pre_2025_09_29"}, "unknown human_filter 'pre_2025_09_29'"),
        ({"python": "/no/such/python"}, "there is no interpreter '/no/such/python'"),
        ({"cache": str(tmp_path / "none")}, "is no folder"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0; got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**options)
    with pytest.raises(ConfigError, match=r"unknown version 'v2'\. Did you mean 'v2\.2'"):
        navsim_backend.navsim_scorer(python="python", cache=str(tmp_path), version="v2")
    with pytest.raises(ConfigError, match=r"reward\.scorer_options\.cache \(str\) is missing"):
        RewardConfig((RewardSpec("epdms"),), scorer="navsim", scorer_options={"python": "python"}).build()


def test_an_environment_without_the_package_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the package navsim is not installed for"):
        make(python=write_interpreter(tmp_path))


def test_another_project_of_that_name_is_refused(make: Make, tmp_path: Path) -> None:
    python = write_environment(tmp_path, "v2.2", without="navsim/evaluate")
    with pytest.raises(ConfigError, match=r"is another project.*it has no navsim\.evaluate\.pdm_score"):
        make(python=python)


def test_an_environment_without_nuplan_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nuplan-devkit is not installed"):
        make(python=write_environment(tmp_path, "v2.2", without="nuplan"))


@pytest.mark.parametrize(("asked", "there"), [("v1.1", "v2.2"), ("v2.2", "v1.1")])
def test_the_other_version_is_refused(make: Make, environments: dict[str, str], asked: str, there: str) -> None:
    with pytest.raises(ConfigError, match=f"is NAVSIM {there[:2]}, not {asked}"):
        make(asked, python=environments[there])


def test_something_that_is_no_python_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="false cannot run the worker: the process with navsim ended with status 1"):
        make(python=str(shutil.which("false")))


def test_half_an_installation_is_tried_once(make: Make, tmp_path: Path) -> None:
    scorer = make(python=write_environment(tmp_path, "v2.2", broken="navsim/evaluate/pdm_score.py"))
    for _ in range(3):
        with pytest.raises(RewardError, match="cannot be used: RuntimeError: half an installation"):
            scorer.prepare("a", _reference())
    assert _process(scorer).starts == 1


def test_a_folder_without_caches_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match=r"no metric_cache\.pkl in"):
        make(cache=str(tmp_path / "empty")).prepare("a", _reference())


def test_the_command_line_shows_it_without_its_options() -> None:
    done = CliRunner().invoke(rewards_app, ["show", "navsim"])
    assert done.exit_code == 0
    assert "option python: 'str'\n  option cache: 'str'\n  option version: 'str' = 'v2.2'\n" in done.output


# -- the worker -------------------------------------------------------------------------------------------------------


def test_the_worker_ends_with_its_scorer(make: Make) -> None:
    process = NavsimProcess(_process(make())._command, 10.0)
    process.request({"kind": "load", "token": "a"}, {})
    running = cast(Any, process)._running
    assert running._process.poll() is None
    del process
    gc.collect()
    assert running._process.poll() == 0


def test_messages_survive_the_way() -> None:
    values = np.array([[np.nan, -0.0], [np.inf, 1e-300]])
    data = pack_message({"kind": "scored"}, {"values": values, "none": np.empty((0, 3))})
    header, arrays = read_message(_reader(data))
    assert header == {"kind": "scored"}
    assert arrays["values"].tobytes() == values.tobytes()
    assert arrays["none"].shape == (0, 3)
    with pytest.raises(ValueError, match="must begin with b'NVS1'; got b'prin'"):
        read_message(_reader(b"print" * 20))


def _reader(data: bytes) -> Callable[[int], bytes]:
    view = [data]

    def read(count: int) -> bytes:
        part, view[0] = view[0][:count], view[0][count:]
        return part

    return read


def test_caches_are_found_where_the_metadata_says_and_where_they_moved_to(tmp_path: Path) -> None:
    here = write_cache(tmp_path / "cache", "a", "v1.1")
    moved = write_cache(tmp_path / "cache", "b", "v1.1")
    apart = write_cache(tmp_path / "apart", "c", "v1.1")
    assert find_caches(tmp_path / "cache") == {"a": here, "b": moved}
    (tmp_path / "cache" / "metadata").mkdir()
    for node, line in enumerate(("log/unknown/a/metric_cache.pkl", "/gone/log/unknown/b/metric_cache.pkl", str(apart))):
        (tmp_path / "cache" / "metadata" / f"metadata_node_{node}.csv").write_text(f"file_name\n{line}\n")
    assert find_caches(tmp_path / "cache") == {"a": here, "b": moved, "c": apart}


def test_the_worker_is_python_3_9_and_needs_nothing_of_ours() -> None:
    tree = ast.parse(WORKER.read_text("utf-8"), feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names} == {"numpy"}
    assert not any(isinstance(node, ast.Match) for node in ast.walk(tree))


# -- the package itself -----------------------------------------------------------------------------------------------


@pytest.mark.navsim
@pytest.mark.parametrize("version", ["v1.1", "v2.2"])
def test_the_official_package_gives_its_golden_scores(version: str, navsim_golden: Path) -> None:
    python = os.environ.get("RLHF_DRIVE_NAVSIM_PYTHON", "")
    if not python:
        pytest.skip("RLHF_DRIVE_NAVSIM_PYTHON names no interpreter with the package navsim")
    caches = navsim_golden / "metric_caches" / version.replace(".", "_")
    try:
        scorer = navsim_backend.navsim_scorer(python=python, cache=str(caches), version=version)
    except ConfigError as error:
        if f"not {version}" not in str(error):
            raise
        pytest.skip(str(error))
    for token in find_caches(caches):
        scene = read_vector(navsim_golden / "golden" / f"{token}.scene.json")
        golden = np.load(navsim_golden / "golden" / f"{token}.golden.npz")
        prepared = scorer.prepare(token, scene.reference)
        previous = np.asarray(scene.prev_candidates, dtype=np.float64) if version == "v2.2" else None
        found = scorer.score(prepared, np.asarray(scene.candidates, dtype=np.float64), previous)
        for name in scorer.columns:
            np.testing.assert_allclose(
                found[name], golden[f"v{version[1]}_{name}"], atol=1e-9, err_msg=f"{token} {name}"
            )
    _process(scorer).close()
