"""Weighted terms: the mean, the columns, and everything that can be wrong in a recipe's list."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards import (
    EPDMS_COMPONENTS,
    PDMS_COMPONENTS,
    REWARDS,
    RewardInputs,
    RewardSpec,
    ScorerInfo,
    build_reward,
    reward,
)
from rlhf_drive.errors import ConfigError
from rlhf_drive.scenes import Trajectories

SOURCE = """
import numpy as np

def gentle(inputs, *, limit: float = 2.0):
    return np.full(len(inputs.trajectories), limit)

def ep(inputs):
    return np.zeros(len(inputs.trajectories))
"""


@pytest.fixture
def user_file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return str(tmp_path / "mine.py")


def test_total_is_the_weighted_mean() -> None:
    reward = build_reward([RewardSpec("pdms", 3.0), RewardSpec("comfort", 1)])
    total = reward.total({"pdms": np.array([0.8, 0.0]), "c": np.array([0.0, 1.0])})
    assert total.tolist() == pytest.approx([0.6, 0.25], abs=1e-15)  # (3*0.8 + 0)/4, (0 + 1)/4


def test_scaling_all_weights_changes_nothing() -> None:
    columns = {"pdms": np.array([0.3, 0.9]), "ep": np.array([0.7, 0.1])}
    small, large = (build_reward([RewardSpec("pdms", w), RewardSpec("ep", 2 * w)]).total(columns) for w in (0.25, 64.0))
    np.testing.assert_array_equal(small, large)  # powers of two: exact


def test_one_term_is_returned_to_the_bit() -> None:
    values = np.random.default_rng(0).random(100)
    np.testing.assert_array_equal(build_reward([RewardSpec("pdms")]).total({"pdms": values}), values)


def test_term_of_weight_zero_is_reported_only(user_file: str) -> None:
    reward = build_reward([RewardSpec("pdms", 1.0), RewardSpec(f"{user_file}:gentle", 0.0)])
    assert reward.names == (*PDMS_COMPONENTS, "gentle")
    assert reward.total({"pdms": np.array([0.5]), "gentle": np.array([9.0])}).tolist() == [0.5]


def test_columns_are_the_components_then_user_terms_in_order(user_file: str) -> None:
    specs = [RewardSpec(f"{user_file}:gentle", 1.0, {"limit": v}) for v in (1.0, 5.0, 7.0)]
    reward = build_reward([specs[0], RewardSpec("ego_progress"), *specs[1:]])
    assert reward.names == (*PDMS_COMPONENTS, "gentle", "gentle_2", "gentle_3")
    assert [term.name for term in reward.terms] == ["gentle", "ep", "gentle_2", "gentle_3"]


def test_everything_wrong_is_listed_in_one_error(user_file: str) -> None:
    specs = [
        RewardSpec("pdsm"),
        RewardSpec("pdms", -1.0),
        RewardSpec(f"{user_file}:gentle", 1.0, {"limt": 2.0}),
        RewardSpec(f"{user_file}:missing"),
        RewardSpec("comfort", float("inf"), {"limit": 2.0}),
    ]
    with pytest.raises(ConfigError) as caught:
        build_reward(specs)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("Unknown reward 'pdsm' in reward.terms[0].name. Did you mean 'pdms'?")
    assert lines[1] == "reward.terms[1].weight must be a number of at least 0; got -1.0."
    assert lines[2].startswith("reward.terms[2].options: reward 'gentle' has no option 'limt'. Did you mean 'limit'?")
    assert "has no function 'missing' (from reward.terms[3].name)" in lines[3]
    assert lines[4] == "reward.terms[4].weight must be a number of at least 0; got inf."
    assert lines[5].startswith("reward.terms[4].options: reward 'c' has no option 'limit'")


@pytest.mark.parametrize("weight", [True, "1", None, float("nan")])
def test_weight_that_is_no_number(weight: object) -> None:
    with pytest.raises(ConfigError, match=r"terms\[0\]\.weight must be a number"):
        build_reward([RewardSpec("pdms", weight)])  # type: ignore[arg-type]


@pytest.mark.parametrize("specs", [[], [RewardSpec("pdms", 0.0), RewardSpec("ep", 0)]])
def test_some_weight_must_be_above_zero(specs: list[RewardSpec]) -> None:
    with pytest.raises(ConfigError, match="at least one term with a weight above 0"):
        build_reward(specs)


def test_component_is_a_term_once() -> None:
    with pytest.raises(ConfigError, match=r"terms\[1\]\.name: 'comfort' is among the terms already"):
        build_reward([RewardSpec("c"), RewardSpec("comfort")])


def test_user_function_called_like_a_component_is_refused(user_file: str) -> None:
    with pytest.raises(ConfigError, match="called like the component 'ep'"):
        build_reward([RewardSpec(f"{user_file}:ep")])


# Gates, scorers and rewards that may only accompany others.

SCORER = """
import numpy as np
from rewards.carriers import ScorerInfo
from rewards.scorer import Scorer

def mine(*, strict: bool = False, columns: str = "ep grip mine"):
    def score(prepared, poses, previous):
        return {name: poses[:, -1, 0] for name in columns.split()}
    info = ScorerInfo("mine", "strict" if strict else "lax")
    return Scorer(info, tuple(columns.split()), lambda token, reference: None, score, frozenset({"ep"}))

def grip(inputs):
    return np.zeros(len(inputs.trajectories))

def broken():
    raise RuntimeError("no licence")

def nothing():
    return 3

def positional(strict=False):
    return None
"""


@pytest.fixture
def scorer_file(tmp_path: Path) -> str:
    (tmp_path / "scorers.py").write_text(SCORER)
    return str(tmp_path / "scorers.py")


@pytest.fixture(autouse=True)
def _judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward `judge` that may only accompany others, for the length of a test."""
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))

    @reward("judge", auxiliary=True)
    def judge(inputs: RewardInputs, *, strict: bool = False) -> NDArray[np.float64]:
        return np.ones(len(inputs.trajectories))


def column(*values: float) -> NDArray[np.float64]:
    return np.array(values)


def test_gates_multiply_the_weighted_mean() -> None:
    terms = [RewardSpec("ep", 5.0), RewardSpec("ttc", 5.0), RewardSpec("c", 2.0)]
    built = build_reward(terms, gates=[RewardSpec("nc"), RewardSpec("drivable_area")])
    assert [gate.name for gate in built.gates] == ["nc", "dac"]
    total = built.total(
        {
            "nc": column(1, 0.5, 0),
            "dac": column(1, 1, 1),
            "ep": column(0.8, 0.8, 0.8),
            "ttc": column(1, 1, 1),
            "c": column(0, 1, 1),
        }
    )
    # (5*0.8 + 5 + 0)/12 = 0.75; 0.5 * (5*0.8 + 5 + 2)/12 = 11/24; 0
    assert total.tolist() == pytest.approx([0.75, 11 / 24, 0.0], abs=1e-15)


def test_gate_of_zero_does_not_hide_what_could_not_be_computed() -> None:
    built = build_reward([RewardSpec("ep"), RewardSpec("c", 0.0)], gates=[RewardSpec("nc"), RewardSpec("dac")])
    values = {
        "nc": column(0, 0, np.nan, 1),
        "dac": column(0, 0, 0, 1),
        "ep": column(np.nan, 1, 1, 1),
        "c": column(1, np.nan, 1, 1),
    }
    np.testing.assert_array_equal(built.total(values), [np.nan, np.nan, np.nan, 1.0])


def test_what_is_gate_and_term_has_one_column(user_file: str) -> None:
    gentle = RewardSpec(f"{user_file}:gentle", 1.0, {"limit": 3.0})
    other = RewardSpec(f"{user_file}:gentle", 1.0, {"limit": 4.0})
    built = build_reward([RewardSpec("ep", 3.0), gentle, other], gates=[gentle, RewardSpec("ep")])
    assert [term.name for term in built.gates] == ["gentle", "ep"]
    assert [term.name for term in built.terms] == ["ep", "gentle", "gentle_2"]
    assert [term.weight for term in built.terms] == [3.0, 1.0, 1.0]
    assert built.names == (*PDMS_COMPONENTS, "gentle", "gentle_2")
    assert [term.name for term in built.user_terms] == ["gentle", "gentle_2"]
    total = built.total({"ep": column(0.5), "gentle": column(2.0), "gentle_2": column(4.0)})
    assert total.tolist() == [2.0 * 0.5 * (1.5 + 2.0 + 4.0) / 5.0]


@pytest.mark.parametrize("key", ["gates", "terms"])
def test_same_function_with_the_same_options_is_named_once(user_file: str, key: str) -> None:
    twice = [
        RewardSpec(f"{user_file}:gentle", 1.0, {"limit": 2}),
        RewardSpec(f"{user_file}:gentle", 1.0, {"limit": 2.0}),
    ]
    terms, gates = ([RewardSpec("pdms"), *twice], []) if key == "terms" else ([RewardSpec("pdms")], twice)
    with pytest.raises(
        ConfigError, match=rf"reward\.{key}\[\d\]\.name: .* is among the {key} already with the same opt"
    ):
        build_reward(terms, gates=gates)


def test_numbered_names_avoid_names_that_are_there(tmp_path: Path) -> None:
    body = "\n    return np.ones(len(inputs.trajectories))\n"
    source = f"import numpy as np\ndef a(inputs, *, k: int = 0):{body}def a_2(inputs):{body}def ep_2(inputs):{body}"
    (tmp_path / "names.py").write_text(source)
    at = f"{tmp_path / 'names.py'}:"
    specs = [RewardSpec(f"{at}a_2"), *(RewardSpec(f"{at}a", 1.0, {"k": k}) for k in range(3)), RewardSpec(f"{at}ep_2")]
    assert [term.name for term in build_reward(specs).terms] == ["a_2", "a", "a_3", "a_4", "ep_2"]


def test_numbered_names_avoid_columns_of_the_scorer(user_file: str, scorer_file: str) -> None:
    built = build_reward(
        [RewardSpec(f"{user_file}:gentle", 1.0, {"limit": v}) for v in (1.0, 2.0)],
        scorer=f"{scorer_file}:mine",
        scorer_options={"columns": "ep gentle_2"},
    )
    assert built.names == ("ep", "gentle_2", "gentle", "gentle_3")


def test_gate_has_no_weight() -> None:
    with pytest.raises(ConfigError, match=r"reward\.gates\[0\]\.weight: a gate has no weight; got 0\.5\. Leave it out"):
        build_reward([RewardSpec("pdms")], gates=[RewardSpec("nc", 0.5)])


def test_errors_of_scorer_gates_and_terms_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        build_reward([RewardSpec("pmds")], gates=[RewardSpec("n_c")], scorer="epmds", where="stage.reward")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("Unknown scorer 'epmds' in stage.reward.scorer. Did you mean 'epdms'?")
    assert lines[1].startswith("Unknown reward 'n_c' in stage.reward.gates[0].name. Did you mean 'nc'?")
    assert lines[2].startswith("Unknown reward 'pmds' in stage.reward.terms[0].name. Did you mean 'pdms'?")


def test_component_that_the_scorer_lacks_is_refused() -> None:
    match = r"terms\[1\]\.name: reward 'lk' needs lk, which scorer 'pdms' does not yield \(it yields nc, dac, ep"
    with pytest.raises(ConfigError, match=match):
        build_reward([RewardSpec("pdms"), RewardSpec("lk")])
    assert build_reward([RewardSpec("lk")], scorer="epdms").names == EPDMS_COMPONENTS
    with pytest.raises(ConfigError, match="'wam_flow' needs c, which scorer 'epdms'"):
        build_reward([RewardSpec("wam_flow")], scorer="epdms")


@pytest.mark.parametrize("name", ["ec", "extended_comfort", "epdms_two_frame"])
@pytest.mark.parametrize("key", ["gates", "terms"])
def test_two_frame_rewards_are_known(name: str, key: str) -> None:
    specs = {"gates": [RewardSpec("nc")], "terms": [RewardSpec("epdms")]}
    assert not build_reward(specs["terms"], gates=specs["gates"], scorer="epdms").two_frame
    specs[key].append(RewardSpec(name))
    assert build_reward(specs["terms"], gates=specs["gates"], scorer="epdms").two_frame


@pytest.mark.parametrize(
    ("terms", "gates"),
    [
        ([RewardSpec("judge")], []),
        ([RewardSpec("judge"), RewardSpec("pdms", 0.0)], []),
        ([RewardSpec("pdms", 0.0), RewardSpec("judge", 0.1), RewardSpec("ep", 0)], []),
        ([RewardSpec("judge")], [RewardSpec("nc"), RewardSpec("dac")]),
        ([RewardSpec("judge"), RewardSpec("judge", 1.0, {"strict": True})], []),
    ],
)
def test_judge_alone_is_refused(terms: list[RewardSpec], gates: list[RewardSpec]) -> None:
    with pytest.raises(ConfigError, match=r"reward\.terms: 'judge' may only accompany another reward"):
        build_reward(terms, gates=gates)


def test_judge_beside_another_reward_is_fine() -> None:
    assert build_reward([RewardSpec("judge", 5.0), RewardSpec("pdms", 0.1)]).names[-1] == "judge"
    assert build_reward([RewardSpec("pdms")], gates=[RewardSpec("judge")]).gates[0].name == "judge"
    with pytest.raises(ConfigError, match="at least one term with a weight above 0"):
        build_reward([RewardSpec("judge", 0.0)])


def test_scorer_of_a_file_and_its_columns_as_terms(scorer_file: str) -> None:
    built = build_reward(
        [RewardSpec("grip"), RewardSpec("mine", 3.0)],
        gates=[RewardSpec("ego_progress"), RewardSpec("grip")],
        scorer=f"{scorer_file}:mine",
        scorer_options={"strict": True},
    )
    assert built.scorer.info == ScorerInfo("mine", "strict")
    assert built.names == ("ep", "grip", "mine")
    assert built.user_terms == ()
    assert built.total({"ep": column(0.5), "grip": column(0.4), "mine": column(0.8)}).tolist() == pytest.approx(
        [0.5 * 0.4 * (0.4 + 2.4) / 4]
    )
    inputs = RewardInputs([], Trajectories(np.zeros((1, 8, 3)), np.zeros(1)), {"grip": column(0.4)})
    assert built.terms[0].function(inputs).tolist() == [0.4]


@pytest.mark.parametrize(
    ("scorer", "options", "match"),
    [
        (":minee", {}, r"has no function 'minee' \(from reward\.scorer\)\. Did you mean 'mine'"),
        (
            ":mine",
            {"strct": True},
            r"reward\.scorer_options: scorer '.*:mine' has no option 'strct'\. Did you mean 'str",
        ),
        (":mine", {"strict": 3}, r"reward\.scorer_options\.strict must be bool; got 3"),
        (":broken", {}, r"reward\.scorer: '.*:broken' failed: RuntimeError: no licence"),
        (":nothing", {}, r"returned int, not a rewards\.scorer\.Scorer"),
        (":positional", {}, r"parameter 'strict' must be keyword-only"),
        (":mine", {"columns": "ep ep"}, "Name each column once"),
        (":mine", {"columns": "nc"}, "and optional ones among them"),
        (":mine", {"columns": ""}, r"yields the columns \(none\)"),
    ],
)
def test_scorer_that_cannot_be_used(scorer_file: str, scorer: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_reward([RewardSpec("ep")], scorer=f"{scorer_file}{scorer}", scorer_options=options)


def test_user_function_called_like_a_column_of_the_scorer_is_refused(scorer_file: str) -> None:
    with pytest.raises(ConfigError, match="called like the component 'grip'"):
        build_reward([RewardSpec(f"{scorer_file}:grip")], scorer=f"{scorer_file}:mine")
    assert build_reward([RewardSpec(f"{scorer_file}:grip")]).names == (*PDMS_COMPONENTS, "grip")


def test_truth_values_of_yaml_are_the_words_on_and_off() -> None:
    filters = {
        value: build_reward(
            [RewardSpec("epdms")], scorer="epdms", scorer_options={"human_filter": value}
        ).scorer.info.human_filter
        for value in (True, False, "pre_2025_09_29")
    }
    assert filters == {True: "on", False: "off", "pre_2025_09_29": "pre_2025_09_29"}
    with pytest.raises(ConfigError, match=r"Unknown human_filter 'of'\. Did you mean 'off'"):
        build_reward([RewardSpec("epdms")], scorer="epdms", scorer_options={"human_filter": "of"})


def test_config_builds_the_same_reward_elsewhere(
    user_file: str, scorer_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = build_reward(
        [RewardSpec("mine.py:gentle", 2.0, MappingProxyType({"limit": 3.0})), RewardSpec("ep")],
        gates=[RewardSpec("grip")],
        scorer="scorers.py:mine",
        scorer_options=MappingProxyType({"strict": True}),
    )
    monkeypatch.chdir("/")
    config = pickle.loads(pickle.dumps(built.config))
    assert config == built.config
    assert config.terms[0].name == f"{user_file}:gentle"
    again = config.build()
    assert (again.names, again.scorer.info) == (built.names, built.scorer.info)
    assert [(t.name, t.weight) for t in again.terms] == [("gentle", 2.0), ("ep", 1.0)]
    assert [t.name for t in again.gates] == ["grip"]


def test_files_among_the_options_get_full_paths_too(
    user_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @reward("takes_text")
    def takes_text(inputs: RewardInputs, *, function: str = "", other: str = "") -> NDArray[np.float64]:
        return np.ones(len(inputs.trajectories))

    monkeypatch.chdir(tmp_path)
    spec = RewardSpec("takes_text", 1.0, {"function": "mine.py:gentle", "other": "no.py:such"})
    assert build_reward([spec]).config.terms[0].options == {"function": f"{user_file}:gentle", "other": "no.py:such"}
