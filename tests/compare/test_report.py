from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlhf_drive.compare.analysis import Bootstrap, Comparison, analyse, plan_statistics, shown_components
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
