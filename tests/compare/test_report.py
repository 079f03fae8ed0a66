from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlhf_drive.compare.analysis import Bootstrap, Comparison, analyse, plan_statistics, shown_components, without_ec
from rlhf_drive.compare.evaluate import Evaluation, PlannerResult
from rlhf_drive.compare.report import differing_scenes, print_table, summary, write_report
from rlhf_drive.errors import DataError, UnknownNameError
from rlhf_drive.scenes import Scene

HOW = Bootstrap(samples=300)
COMPONENTS = ("nc", "dac", "ep", "ttc", "c", "ddc", "pdms")


def result_of(pdms: list[float], *, reward: list[float] | None = None, speed: float = 5.0) -> PlannerResult:
    """Component k of 0..5 is ``pdms / (k + 1)``; the plans drive straight at `speed`."""
    column = np.array(pdms)
    scores = np.stack([column / (k + 1) for k in range(6)] + [column], axis=1)
    plans = np.zeros((len(pdms), 8, 3))
    plans[:, :, 0] = 0.5 * speed * np.arange(1, 9)
    failures = {f"s{i}": "too <long>" for i in np.flatnonzero(np.isnan(column))}
    valid = np.isfinite(column).astype(float)
    return PlannerResult(scores, column if reward is None else np.array(reward), valid, plans, scores, 1, failures)


@pytest.fixture
def scenes(make_scene) -> list[Scene]:
    kinds = ["cut_in", "cut_in", "<b>bend", "<b>bend"]
    return [make_scene(f"s{i}", kind=kinds[i], challenging=i >= 2) for i in range(4)]


@pytest.fixture
def evaluation(scenes: list[Scene]) -> Evaluation:
    planners = {
        "sft": result_of([0.2, 0.4, 0.6, 0.8]),
        "rl/0": result_of([0.6, 0.4, 0.9, 0.9]),
        "rl/1": result_of([0.4, 0.4, 0.9, 0.5]),
        "human": result_of([1.0, 1.0, 1.0, 0.8]),
    }
    return Evaluation(
        tokens=tuple(scene.token for scene in scenes),
        kinds=tuple(scene.kind for scene in scenes),
        clusters=tuple(scene.cluster for scene in scenes),
        challenging=np.array([scene.challenging for scene in scenes]),
        human=np.array([scene.reference.human_poses for scene in scenes]),
        components=COMPONENTS,
        planners=planners,
        scorer="pdms (test)",
    )


def with_planner(evaluation: Evaluation, name: str, result: PlannerResult) -> Evaluation:
    facts = {key: getattr(evaluation, key) for key in evaluation.__dataclass_fields__}
    return Evaluation(**facts | {"planners": {**evaluation.planners, name: result}})


RL = Comparison("rl", ("rl/0", "rl/1"), "sft")
V2 = ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec", "epdms")


def v2_result(epdms: list[float], ec: list[float]) -> PlannerResult:
    """EPDMS and EC as given, other components 1."""
    scores = np.ones((len(epdms), len(V2)))
    scores[:, -1], scores[:, -2] = epdms, ec
    return PlannerResult(scores, np.array(epdms), np.ones(len(epdms)), np.zeros((len(epdms), 8, 3)), scores, 1)


@pytest.fixture
def both(evaluation: Evaluation) -> Evaluation:
    """The evaluation with EPDMS beside PDMS; the human has no plan of the previous frame."""
    planners = {
        "sft": v2_result([0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 0.0]),
        "rl/0": v2_result([0.6, 0.5, 0.3, 0.4], [0.0, 0.0, 1.0, 0.0]),
        "rl/1": v2_result([0.4, 0.5, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0]),
        "human": v2_result([0.9, 0.9, 0.9, 0.9], [np.nan] * 4),
    }
    other = replace(evaluation, components=V2, planners=planners, scorer="epdms (test)")
    return replace(evaluation, secondary=(other,))


def test_summary_in_points_of_100(evaluation: Evaluation) -> None:
    result = summary(evaluation, "sft", ["rl/0", "rl/1"], 11.5, bootstrap_samples=300)
    assert result["sft"] == {"pdms": 50.0}
    # Seed means 70 and 55.
    assert result["rl"] == {"pdms": 62.5}
    assert result["gain"]["pdms"] == 12.5
    low, high = result["gain"]["ci95"]
    # Pooled differences per scene 30, 0, 30, -10: no resampled mean can leave [-10, 30].
    assert -10.0 <= low < 12.5 < high <= 30.0
    assert set(result["gain"]) == {"pdms", "ci95"}
    assert (result["minutes"], result["scenes"], result["scorer"]) == (11.5, 4, "pdms (test)")
    assert (result["win_rate"], result["tie_rate"]) == (0.5, 0.25)


def test_summary_lists_every_seed_and_the_challenging_scenes(evaluation: Evaluation) -> None:
    result = summary(evaluation, "sft", ["rl/0", "rl/1"], 1.0, bootstrap_samples=300)
    assert [seed["name"] for seed in result["seeds"]] == ["rl/0", "rl/1"]
    assert [seed["pdms"] for seed in result["seeds"]] == [70.0, 55.0]
    assert [seed["gain"]["pdms"] for seed in result["seeds"]] == [20.0, 5.0]
    # Challenging are scenes 2 and 3: sft 70, seeds 90 and 70.
    hard = result["challenging"]
    assert (hard["sft"]["pdms"], hard["rl"]["pdms"], hard["gain"]["pdms"], hard["scenes"]) == (70.0, 80.0, 10.0, 2)
    assert result["baselines"] == {"human": {"all": 95.0, "challenging": 90.0}}
    assert result["components"]["sft"]["ep"] == pytest.approx(50.0 / 3, abs=1e-4)


def test_summary_is_json_even_without_an_interval(evaluation: Evaluation) -> None:
    facts = {key: getattr(evaluation, key) for key in evaluation.__dataclass_fields__}
    one = Evaluation(**facts | {"clusters": ("x",) * 4, "challenging": np.zeros(4, dtype=bool)})
    result = json.loads(json.dumps(summary(one, "sft", ["rl/0"], 1.0), allow_nan=False))
    assert result["gain"] == {"pdms": 20.0, "ci95": [None, None]}
    assert result["challenging"]["gain"]["pdms"] is None


def test_summary_refuses_unknown_and_missing_policies(evaluation: Evaluation) -> None:
    with pytest.raises(UnknownNameError, match="No planner 'rl/7' was evaluated"):
        summary(evaluation, "sft", ["rl/7"], 1.0)
    with pytest.raises(DataError, match="names no policy"):
        summary(evaluation, "sft", [], 1.0)


def test_analysis_splits_by_kind_and_by_challenge(evaluation: Evaluation) -> None:
    table = analyse(evaluation, [RL], HOW)
    assert table["kinds"] == {"<b>bend": 2, "cut_in": 2}
    assert table["policies"]["sft"]["kinds"] == pytest.approx({"cut_in": 30.0, "<b>bend": 70.0})
    gains = table["comparisons"][0]
    assert {kind: gain["mean"] for kind, gain in gains["kinds"].items()} == pytest.approx({"cut_in": 15, "<b>bend": 10})
    assert gains["all"]["nc"]["mean"] == pytest.approx(12.5)
    assert gains["all"]["dac"]["mean"] == pytest.approx(6.25)
    assert gains["seeds"][1]["challenging"]["pdms"]["mean"] == pytest.approx(0.0)


def test_a_failed_scene_lowers_no_mean(evaluation: Evaluation) -> None:
    broken = with_planner(evaluation, "broken", result_of([1.0, np.nan, 1.0, 1.0]))
    policy = analyse(broken, [], HOW)["policies"]["broken"]
    assert (policy["all"]["pdms"]["mean"], policy["all"]["pdms"]["n"], policy["valid"]) == (100.0, 3, 0.75)
    assert policy["failures"] == {"s1": "too <long>"}


def test_the_reward_is_shown_only_where_it_is_not_pdms(evaluation: Evaluation) -> None:
    assert shown_components(evaluation) == ["pdms", "nc", "dac", "ep", "ttc", "c", "ddc"]
    other = with_planner(evaluation, "x", result_of([0.2, 0.2, 0.2, 0.2], reward=[0.1, 0.1, 0.1, 0.1]))
    assert shown_components(other)[-1] == "reward"
    assert analyse(other, [], HOW)["policies"]["x"]["all"]["reward"]["mean"] == pytest.approx(10.0)


def test_plan_statistics_on_hand_made_plans() -> None:
    forward, back, turned = np.zeros((3, 8, 3))
    forward[:, 0] = np.arange(1, 9)
    back[:, 0] = [1, 2, 3, 4, 5, 6, 7, 6.9]
    # Drives along -x with heading pi: not reversing.
    turned[:, 0], turned[:, 2] = -np.arange(1, 9), np.pi
    result = plan_statistics(np.stack([forward, back, turned]), np.stack([forward] * 3))
    assert result["final_reversal"] == pytest.approx(1 / 3)
    # Path lengths 8, 7.1 and 8 m in 4 s.
    assert result["mean_speed_mps"] == pytest.approx((8 + 7.1 + 8) / 3 / 4)
    assert result["fde_m"] == pytest.approx((0 + 1.1 + 16) / 3)
    assert result["ade_m"] == pytest.approx((0 + 1.1 / 8 + 9) / 3)


def test_a_plan_that_creeps_or_trembles_does_not_reverse() -> None:
    plans = np.zeros((3, 8, 3))
    plans[:, -1, 0] = [0.02, -0.02, -0.2]
    assert plan_statistics(plans, plans)["final_reversal"] == pytest.approx(1 / 3)


def test_plans_that_are_not_finite_are_left_out_of_the_statistics() -> None:
    plans = np.zeros((2, 8, 3))
    plans[1] = np.nan
    assert plan_statistics(plans, np.zeros((2, 8, 3)))["mean_speed_mps"] == 0.0
    assert np.isnan(plan_statistics(plans[1:], np.zeros((1, 8, 3)))["ade_m"])


def many(deltas: list[float], clusters: list[str]) -> Evaluation:
    count = len(deltas)
    planners = {"a": result_of([0.5 + d for d in deltas]), "b": result_of([0.5] * count)}
    tokens = tuple(f"s{i}" for i in range(count))
    facts = (tokens, ("k",) * count, tuple(clusters), np.zeros(count, dtype=bool), np.zeros((count, 8, 3)))
    return Evaluation(*facts, COMPONENTS, planners, "test")


def test_pictured_scenes_are_the_largest_gains_then_the_largest_losses() -> None:
    evaluation = many([0.1, -0.3, 0.4, 0.0, -0.1, 0.2], list("uvwxyz"))
    assert differing_scenes(evaluation, "a", "b", 4) == [2, 5, 1, 4]
    assert differing_scenes(evaluation, "a", "b", 3) == [2, 5, 1]
    assert differing_scenes(evaluation, "a", "b", 99) == [2, 5, 0, 1, 4]


def test_pictures_fill_up_with_gains_where_losses_are_few() -> None:
    evaluation = many([0.1, 0.2, 0.3, 0.4, -0.1], list("uvwxy"))
    assert differing_scenes(evaluation, "a", "b", 4) == [3, 2, 1, 4]


def test_one_scene_per_cluster_comes_first() -> None:
    evaluation = many([0.4, 0.3, 0.2, 0.1], ["u", "u", "v", "v"])
    assert differing_scenes(evaluation, "a", "b", 3) == [0, 2, 1]


class Page(HTMLParser):
    """Collects text and attributes, and checks that tags close in order."""

    VOID = ("meta", "img", "br", "wbr", "line", "rect", "circle")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_well_formed_and_holds_everything(
    evaluation: Evaluation, scenes: list[Scene], tmp_path: Path
) -> None:
    path = write_report(evaluation, tmp_path / "run", scenes=scenes, comparisons=[RL], pictures=3, bootstrap=HOW)
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join("".join(page.text).split())
    assert page.open == []
    assert path == tmp_path / "run" / "report.html"
    assert "+12.5" in text
    assert "<b>bend" in text
    # rl/0 minus sft: +40, 0, +30, +10: three scenes differ.
    assert [link.startswith("data:image/png;base64,") for link in page.links] == [True] * 3
    assert base64.b64decode(page.links[0].split(",")[1]).startswith(b"\x89PNG")


def test_the_page_fetches_nothing_and_runs_nothing(evaluation: Evaluation, scenes: list[Scene], tmp_path: Path) -> None:
    html = write_report(evaluation, tmp_path, scenes=scenes, comparisons=[RL], bootstrap=HOW).read_text("utf-8")
    assert not re.search(r"https?://|@import|url\(", html)
    assert not {"script", "link", "iframe", "object"} & Page(html).tags


def test_names_cannot_inject_markup(evaluation: Evaluation, scenes: list[Scene], tmp_path: Path) -> None:
    bad = '"><script>alert(1)</script>'
    result = result_of([0.1, 0.2, np.nan, 0.4])
    nasty = with_planner(evaluation, bad, result)
    options = {"scenes": scenes, "comparisons": [Comparison(bad, (bad,), "sft")], "bootstrap": HOW, "title": bad}
    html = write_report(nasty, tmp_path, **options).read_text("utf-8")
    assert "<script" not in html
    assert "too &lt;long&gt;" in html
    assert Page(html).open == []


def test_report_json_has_the_same_numbers_and_no_nan(
    evaluation: Evaluation, scenes: list[Scene], tmp_path: Path
) -> None:
    broken = with_planner(evaluation, "broken", result_of([1.0, np.nan, 1.0, 1.0]))
    write_report(broken, tmp_path, scenes=scenes, comparisons=[RL], pictures=0, bootstrap=HOW)
    text = (tmp_path / "report.json").read_text("utf-8")
    table = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert table["comparisons"][0]["all"]["pdms"]["mean"] == pytest.approx(12.5)
    assert table["per_scene"]["pdms"]["broken"] == [100.0, None, 100.0, 100.0]
    assert table["bootstrap"]["samples"] == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_policies_are_shown_in_the_order_asked_for(evaluation: Evaluation, scenes: list[Scene], tmp_path: Path) -> None:
    order = ["human", "rl/1", "rl/0", "sft"]
    write_report(evaluation, tmp_path, scenes=scenes, comparisons=[], policies=order, bootstrap=HOW)
    assert list(json.loads((tmp_path / "report.json").read_text("utf-8"))["policies"]) == order


def test_a_report_without_challenging_scenes_says_so(
    evaluation: Evaluation, scenes: list[Scene], tmp_path: Path
) -> None:
    facts = {key: getattr(evaluation, key) for key in evaluation.__dataclass_fields__}
    easy = Evaluation(**facts | {"challenging": np.zeros(4, dtype=bool)})
    html = write_report(easy, tmp_path, scenes=scenes, comparisons=[RL], bootstrap=HOW).read_text("utf-8")
    assert "No scene of this set is challenging" in html


def test_other_scenes_than_the_evaluated_are_refused(
    evaluation: Evaluation, scenes: list[Scene], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="must be the evaluated ones"):
        write_report(evaluation, tmp_path, scenes=scenes[::-1], comparisons=[RL])


def test_the_terminal_table_shows_points(evaluation: Evaluation) -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(print_table(evaluation))
    line = next(line for line in console.export_text().splitlines() if "rl/0" in line)
    # PDMS, five parts (pdms / k), challenging PDMS, share scored.
    assert re.findall(r"[\d.]+%?", line)[1:] == [
        "70.0", "70.0", "35.0", "23.3", "17.5", "14.0", "11.7", "90.0", "100.0%",
    ]  # fmt: skip


def test_summary_has_a_block_for_a_further_scorer_and_is_else_the_same(
    evaluation: Evaluation, both: Evaluation
) -> None:
    options = {"minutes": 1.0, "bootstrap_samples": 300}
    alone = summary(evaluation, "sft", ["rl/0", "rl/1"], **options)
    result = summary(both, "sft", ["rl/0", "rl/1"], **options)
    metrics = result.pop("metrics")
    assert result == alone
    assert list(metrics) == ["epdms"]
    block = metrics["epdms"]
    assert block["sft"] == {"all": 50.0, "challenging": 50.0}
    assert block["rl/0"] == {"all": 45.0, "challenging": 35.0}
    # Seeds averaged per scene: 50, 50, 30, 40 against 50 throughout.
    assert block["gain"]["epdms"] == -7.5
    assert block["gain"]["challenging"]["epdms"] == -15.0
    low, high = block["gain"]["ci95"]
    assert -20.0 <= low < -7.5 < high <= 0.0
    assert block["ec"]["sft"] == {"all": 75.0, "challenging": 50.0}
    assert block["ec"]["human"] == {"all": None, "challenging": None}
    # EC of the seeds, averaged per scene: 0, 50, 50, 0 against 100, 100, 100, 0.
    assert block["ec"]["gain"]["ec"] == -50.0
    assert block["scorer"] == "epdms (test)"


def test_summary_keys_of_a_pdms_run(evaluation: Evaluation) -> None:
    result = summary(evaluation, "sft", ["rl/0"], 1.0, bootstrap_samples=50)
    assert list(result) == [
        "sft", "rl", "gain", "win_rate", "tie_rate", "minutes", "seeds", "challenging", "components", "baselines",
        "valid", "scenes", "clusters", "scorer",
    ]  # fmt: skip
    assert list(result["challenging"]) == ["sft", "rl", "gain", "win_rate", "tie_rate", "scenes"]
    assert result["seeds"][0].keys() == {"name", "pdms", "gain", "challenging"}


def test_columns_of_epdms_and_who_lacks_ec(both: Evaluation) -> None:
    (other,) = both.secondary
    assert shown_components(other) == ["epdms", "nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec"]
    assert without_ec(other) == ["human"]
    assert without_ec(both) == []
    nobody = replace(other, planners={"human": other.planners["human"]})
    assert without_ec(nobody) == []


def test_analysis_of_a_further_scorer_stands_beside_the_first(both: Evaluation) -> None:
    table = analyse(both, [RL], HOW)
    (other,) = table["secondary"]
    assert (table["headline"], other["headline"]) == ("pdms", "epdms")
    assert other["comparisons"][0]["all"]["epdms"]["mean"] == pytest.approx(-7.5)
    assert other["comparisons"][0]["kinds"]["<b>bend"]["mean"] == pytest.approx(-15.0)
    assert other["per_scene"]["epdms"]["sft"] == [50.0] * 4
    assert other["policies"]["sft"]["kinds"] == {"cut_in": 50.0, "<b>bend": 50.0}


def test_page_shows_both_scorers_and_says_whose_numbers_they_are(
    both: Evaluation, scenes: list[Scene], tmp_path: Path
) -> None:
    html = write_report(both, tmp_path, scenes=scenes, comparisons=[RL], pictures=1, bootstrap=HOW).read_text("utf-8")
    page = Page(html)
    text = " ".join("".join(page.text).split())
    assert page.open == []
    assert "EPDMS points [" in text
    assert "EC points [" in text
    assert "scored by pdms (test) and epdms (test)" in text
    # Tables of both subsets and of differences; the situations and the pictures are the first scorer's alone.
    assert (text.count("Scored by pdms (test)."), text.count("Scored by epdms (test).")) == (5, 3)
    assert text.count("human: no plan of the previous frame, so EPDMS leaves EC out") == 3
    for label in ("TLC", "LK", "HC", "EC", "EPDMS"):
        assert f">{label}</th>" in html


def test_run_by_epdms_alone_speaks_of_epdms(both: Evaluation, scenes: list[Scene], tmp_path: Path) -> None:
    (other,) = both.secondary
    html = write_report(other, tmp_path, scenes=scenes, comparisons=[RL], bootstrap=HOW).read_text("utf-8")
    # PDMS stays where it is explained: in the definition of challenging scenes and of DDC.
    assert len(re.findall(r"(?<!E)PDMS", re.sub("by PDMS, or by EPDMS where|in PDMS, a factor", "", html))) == 0
    assert differing_scenes(other, "rl/0", "sft", 4) == [0, 2, 3]
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["headline"] == "epdms"


def test_terminal_table_ends_with_the_further_scores(both: Evaluation) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(print_table(both))
    text = console.export_text()
    line = next(line for line in text.splitlines() if "rl/0" in line)
    # Up to the share scored as without a further scorer; then EPDMS and EC. Nothing is cut at 80 columns.
    assert re.findall(r"[\d.]+%?", line)[1:] == [
        "70.0", "70.0", "35.0", "23.3", "17.5", "14.0", "11.7", "90.0", "100.0%", "45.0", "25.0",
    ]  # fmt: skip
    assert "EPDMS by epdms (test)" in text
    assert "…" not in text


def alert(step: int, message: str = "12 % <of> plans") -> str:
    return json.dumps({"phase": "rl-seed0", "step": step, "name": "reversal", "message": message}) + "\n"


def test_alerts_of_training_are_on_the_page(evaluation: Evaluation, scenes: list[Scene], tmp_path: Path) -> None:
    (tmp_path / "alerts.jsonl").write_text("".join(alert(step) for step in range(1, 43)), encoding="utf-8")
    html = write_report(evaluation, tmp_path, scenes=scenes, comparisons=[RL], bootstrap=HOW).read_text("utf-8")
    assert html.count("12 % &lt;of&gt; plans") == 40
    assert "2 more are in alerts.jsonl" in html
    assert Page(html).open == []
    table = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [entry["step"] for entry in table["alerts"]] == list(range(1, 43))


def test_page_tells_no_alert_from_not_watched(evaluation: Evaluation, scenes: list[Scene], tmp_path: Path) -> None:
    options = {"scenes": scenes, "comparisons": [RL], "bootstrap": HOW}
    assert "Warnings" not in write_report(evaluation, tmp_path, **options).read_text("utf-8")
    (tmp_path / "alerts.jsonl").touch()
    assert "there were none" in write_report(evaluation, tmp_path, **options).read_text("utf-8")


def test_monitors_stand_in_red_beyond_the_limits(evaluation: Evaluation, scenes: list[Scene], tmp_path: Path) -> None:
    monitors = {
        "monitor/final_reversal": 0.123,
        "monitor/standstill": 0.02,
        "monitor/curvature_ratio": 2.31,
        "monitor/lateral_jerk_ratio": 0.31,
        "monitor/longitudinal_jerk_ratio": 1.7,
    }
    seen = with_planner(evaluation, "watched", replace(evaluation.result("sft"), monitors=monitors))
    html = write_report(seen, tmp_path, scenes=scenes, comparisons=[], bootstrap=HOW).read_text("utf-8")
    for red in ("12.3 %", "2.31", "0.31"):
        assert f'<td class="loss">{red}</td>' in html
    for plain in ("2.0 %", "1.70", "–"):
        assert f"<td>{plain}</td>" in html
    table = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert table["policies"]["watched"]["monitors"] == monitors


def test_failures_are_counted_by_kind_on_the_page(evaluation: Evaluation, scenes: list[Scene], tmp_path: Path) -> None:
    broken = replace(
        evaluation.result("sft"), failures={"s1": "too slow"}, failure_kinds={"timeout": 7, "not_finite": 2}
    )
    failed = with_planner(evaluation, "broken", broken)
    html = write_report(failed, tmp_path, scenes=scenes, comparisons=[], bootstrap=HOW).read_text("utf-8")
    assert "<th>not finite</th><th>timeout</th>" in html
    assert "<td>broken</td><td>2</td><td>7</td>" in html
    assert "broken, s1: too slow" in html
    clean = write_report(evaluation, tmp_path, scenes=scenes, comparisons=[], bootstrap=HOW).read_text("utf-8")
    assert "Plans that could not be scored" not in clean


def test_distances_leave_out_scenes_without_a_human() -> None:
    plans = np.zeros((2, 8, 3))
    plans[:, :, 0] = np.arange(1, 9)
    human = np.stack([np.full((8, 3), np.nan), np.zeros((8, 3))])
    result = plan_statistics(plans, human)
    assert (result["ade_m"], result["fde_m"], result["mean_speed_mps"]) == (4.5, 8.0, 2.0)
