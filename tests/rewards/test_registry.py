"""Reward functions by name: what counts as one, its options, and where it may lie."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards import (
    EPDMS_COMPONENTS,
    PDMS_COMPONENTS,
    REWARDS,
    RewardInputs,
    RewardSpec,
    build_reward,
    resolve_reward,
    reward,
)
from rewards.builtin import ALIASES, COMPONENT_TEXTS
from rewards.registry import describe_options, offered_rewards
from rlhf_drive.errors import ConfigError, PluginError, UnknownNameError
from rlhf_drive.scenes import Trajectories

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def _registered_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REWARDS, "_entries", dict(REWARDS._entries))


def inputs(**pdms: float) -> RewardInputs:
    return RewardInputs([], Trajectories(np.zeros((1, 8, 3)), np.zeros(1)), {k: np.array([v]) for k, v in pdms.items()})


def scaled(inputs: RewardInputs, *, factor: float, times: int = 1, flip: bool = False, mode: str = "mean") -> Array:
    """A reward with an option of each kind."""
    return inputs.components["ep"] * factor**times * (-1 if flip else 1) * (2 if mode == "sum" else 1)


def test_decorated_function_is_found_and_stays_a_function() -> None:
    assert reward("scaled")(scaled) is scaled
    bound = resolve_reward("scaled").bind({"factor": 3, "times": 2, "flip": True, "mode": "sum"})
    assert bound(inputs(ep=0.5)).tolist() == [-9.0]  # 0.5 * 3**2 * -1 * 2


def test_defaults_are_the_functions_own() -> None:
    reward("scaled")(scaled)
    assert resolve_reward("scaled").bind({"factor": 0.5})(inputs(ep=0.5)).tolist() == [0.25]


def test_integer_for_a_float_option_arrives_as_float() -> None:
    seen = []

    @reward("probe")
    def probe(inputs: RewardInputs, *, factor: float = 1.0) -> Array:
        seen.append(factor)
        return np.ones(1)

    resolve_reward("probe").bind({"factor": 3})(inputs())
    assert (seen, type(seen[0])) == ([3.0], float)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"factor": 1.0, "tims": 2},
            r"terms\[2\]\.options: reward 'scaled' has no option 'tims'\. Did you mean 'times'",
        ),
        ({}, r"terms\[2\]\.options\.factor \(float\) is missing"),
        ({"factor": "2"}, r"options\.factor must be float; got '2'"),
        ({"factor": True}, r"options\.factor must be float; got True"),
        ({"factor": float("nan")}, r"options\.factor must be float; got nan"),
        ({"factor": 1.0, "times": 2.0}, r"options\.times must be int; got 2\.0"),
        ({"factor": 1.0, "times": True}, r"options\.times must be int; got True"),
        ({"factor": 1.0, "flip": 1}, r"options\.flip must be bool; got 1"),
        ({"factor": 1.0, "mode": None}, r"options\.mode must be str; got None"),
    ],
)
def test_wrong_option_is_named(options: dict[str, object], match: str) -> None:
    reward("scaled")(scaled)
    with pytest.raises(ConfigError, match=match):
        resolve_reward("scaled").bind(options, where="reward.terms[2]")


def test_all_wrong_options_are_named_at_once() -> None:
    reward("scaled")(scaled)
    with pytest.raises(ConfigError) as caught:
        resolve_reward("scaled").bind({"tims": 1, "mode": 2})
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "reward.options:",
        "reward.options.factor",
        "reward.options.mode",
    ]


def positional_option(inputs: RewardInputs, factor: float = 1.0) -> Array: ...
def no_inputs(*, factor: float = 1.0) -> Array: ...
def any_options(inputs: RewardInputs, **options: float) -> Array: ...
def list_option(inputs: RewardInputs, *, bins: list[int]) -> Array: ...
def untyped_option(inputs: RewardInputs, *, factor) -> Array: ...  # type: ignore[no-untyped-def]
def wrong_default(inputs: RewardInputs, *, times: int = 0.5) -> Array: ...  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (positional_option, "parameter 'factor' must be keyword-only"),
        (no_inputs, "must take the reward inputs as its first argument"),
        (any_options, "parameter 'options' must be keyword-only"),
        (list_option, "must be annotated as one of int, float, bool, str"),
        (untyped_option, "must be annotated as one of int, float, bool, str"),
        (wrong_default, "default of option 'times' is not int"),
    ],
)
def test_function_of_another_form_is_refused(function: Callable[..., Array], match: str) -> None:
    with pytest.raises(PluginError, match=match):
        reward("odd")(function)
    assert "odd" not in REWARDS


def test_type_of_an_option_without_annotation_is_its_defaults() -> None:
    def plain(inputs, *, times=2):  # type: ignore[no-untyped-def]
        return np.full(1, times)

    reward("plain")(plain)
    with pytest.raises(ConfigError, match="times must be int"):
        resolve_reward("plain").bind({"times": 2.5})


def test_unknown_name_offers_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown reward 'ego_progres' in .*\. Did you mean 'ego_progress'"):
        resolve_reward("ego_progres", where="reward.terms[0].name")


def test_name_of_another_function_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"'pdms' is taken"):
        reward("pdms")(scaled)


def test_function_defined_again_replaces_itself() -> None:
    def define(value: float) -> None:
        @reward("again")
        def again(inputs: RewardInputs) -> Array:
            return np.full(1, value)

    define(1.0)
    define(2.0)
    assert resolve_reward("again").bind({})(inputs()).tolist() == [2.0]


SOURCE = """
import numpy as np
from rewards import reward

@reward("from_file")
def decorated(inputs, *, value: float = 1.0):
    return np.full(1, value)

def undecorated(inputs, *, value: float = 1.0):
    return np.full(1, -value)

CONSTANT = 3
"""


def test_functions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    decorated, undecorated = (resolve_reward(f"{path}:{name}") for name in ("decorated", "undecorated"))
    assert (decorated.name, undecorated.name) == ("from_file", "undecorated")
    assert decorated.bind({"value": 4})(inputs()).tolist() == [4.0]
    assert undecorated.bind({"value": 4})(inputs()).tolist() == [-4.0]
    assert resolve_reward("from_file") is decorated
    with pytest.raises(PluginError, match="not a function"):
        resolve_reward(f"{path}:CONSTANT")
    with pytest.raises(PluginError, match="Did you mean 'undecorated'"):
        resolve_reward(f"{path}:undecoratd")


def test_edited_file_is_loaded_anew(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    resolve_reward(f"{path}:decorated")
    path.write_text(SOURCE.replace("np.full(1, value)", "np.full(1, value + 100)"))
    assert resolve_reward(f"{path}:decorated").bind({})(inputs()).tolist() == [101.0]
    assert resolve_reward("from_file").bind({})(inputs()).tolist() == [101.0]


def test_function_of_an_installed_module() -> None:
    assert resolve_reward("rewards.builtin:wam_flow") is resolve_reward("wam_flow")


MEANING = {
    "no_collision": "nc",
    "drivable_area": "dac",
    "driving_direction": "ddc",
    "traffic_lights": "tlc",
    "ego_progress": "ep",
    "time_to_collision": "ttc",
    "comfort": "c",
    "lane_keeping": "lk",
    "history_comfort": "hc",
    "extended_comfort": "ec",
}
EVERY = {n: i / 16 for i, n in enumerate([*MEANING.values(), "pdms", "epdms"])}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_builtin_is_the_component(name: str) -> None:
    assert resolve_reward(name).bind({})(inputs(**EVERY)).tolist() == [EVERY[name]]
    assert resolve_reward(name).needs == (name,)
    assert resolve_reward(name).two_frame == (name == "ec")


def test_every_component_has_a_reward() -> None:
    assert set(EVERY) == {*PDMS_COMPONENTS, *EPDMS_COMPONENTS} == set(COMPONENT_TEXTS)
    assert all(resolve_reward(name).function.__doc__ == text for name, text in COMPONENT_TEXTS.items())


def test_readable_names_mean_the_component_they_say() -> None:
    assert ALIASES == MEANING
    for alias, name in MEANING.items():
        assert resolve_reward(alias).bind({})(inputs(**EVERY)).tolist() == [EVERY[name]]
        assert resolve_reward(alias).name == name


def test_wam_flow_by_hand() -> None:
    values = {"nc": 0.5, "dac": 1.0, "ep": 0.8, "ttc": 1.0, "c": 0.0}
    # 0.5 * 1 * (5*0.8 + 5*1 + 2*0) / 12 = 0.375
    assert resolve_reward("wam_flow").bind({})(inputs(**values)).tolist() == [0.375]


def test_two_frame_epdms_has_no_value_without_ec() -> None:
    two = resolve_reward("epdms_two_frame")
    assert two.two_frame
    assert two.bind({})(inputs(epdms=0.75, ec=0.0)).tolist() == [0.75]
    assert np.isnan(two.bind({})(inputs(epdms=0.75, ec=float("nan")))).tolist() == [True]


# Rewards that installed packages offer as entry points.

PACKAGE = """
import numpy as np
from rewards import reward

@reward("acme_decorated")
def decorated(inputs, *, value: float = 1.0):
    return np.full(1, value)

def plain(inputs, *, value: float = 2.0):
    return np.full(1, value)

def positional(inputs, value):
    return np.full(1, value)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``install(package, source, name="module:function", …)``: an installed package that offers rewards."""

    def installed(package: str, source: str, **rewards: str) -> None:
        site = tmp_path / package
        info = site / f"{package}-1.5.dist-info"
        info.mkdir(parents=True)
        (site / f"{package}_code.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        lines = [f"{name} = {target}" for name, target in rewards.items()]
        (info / "entry_points.txt").write_text("\n".join(["[rlhf_drive.rewards]", *lines, ""]))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, f"{package}_code", raising=False)

    return installed


def test_entry_points_are_offered_without_importing_them(install: Callable[..., None]) -> None:
    install("acme", "raise SystemExit('imported')", acme_smooth="acme_code:plain")
    assert offered_rewards()["acme_smooth"] == "acme_code:plain"
    assert "acme_smooth" not in REWARDS
    assert "acme_code" not in sys.modules


def test_reward_of_an_installed_package_is_found_by_name(install: Callable[..., None]) -> None:
    install("acme", PACKAGE, acme_plain="acme_code:plain [fast, extra]", acme_decorated="acme_code:decorated")
    plain, decorated = resolve_reward("acme_plain"), resolve_reward("acme_decorated")
    assert (plain.name, decorated.name) == ("acme_plain", "acme_decorated")
    assert plain.bind({"value": 7})(inputs()).tolist() == [7.0]
    assert decorated.bind({})(inputs()).tolist() == [1.0]
    built = build_reward([RewardSpec("acme_plain", 1.0, {"value": 3.0}), RewardSpec("pdms")])
    assert built.names[-1] == "acme_plain"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("acme_code:plian", "has no function 'plian'"),
        ("acme_code:positional", "parameter 'value' must be keyword-only"),
        ("acme_code", "names no function"),
        ("acme code!", "names no function"),
        ("acme_cod:plain", "there is no module 'acme_cod'"),
        ("acme_code:np", "is a module, not a function"),
    ],
)
def test_entry_point_that_fails_names_its_package(install: Callable[..., None], target: str, reason: str) -> None:
    install("acme", PACKAGE, acme_smooth=target)
    with pytest.raises(PluginError) as caught:
        resolve_reward("acme_smooth", where="reward.terms[1].name")
    assert str(caught.value).startswith("reward.terms[1].name: reward 'acme_smooth' of package acme 1.5: ")
    assert reason in str(caught.value)


def test_package_that_fails_while_it_loads_is_named(install: Callable[..., None]) -> None:
    install("acme", "import no_such_thing", acme_smooth="acme_code:plain")
    with pytest.raises(
        PluginError, match=r"package acme 1\.5: .* failed while loading: ModuleNotFoundError.*no_such_th"
    ):
        resolve_reward("acme_smooth")


def test_name_that_two_packages_offer_is_refused(install: Callable[..., None]) -> None:
    install("acme", PACKAGE, smooth="acme_code:plain", same="shared_code:plain")
    install("zeta", PACKAGE, smooth="zeta_code:plain", same="shared_code:plain")
    match = r"'smooth' is offered by package acme 1\.5 \(acme_code:plain\) and package zeta 1\.5 \(zeta_code:plain\)"
    with pytest.raises(PluginError, match=match):
        resolve_reward("smooth")
    with pytest.raises(PluginError, match="there is no module 'shared_code'"):  # one target: no conflict
        resolve_reward("same")


def test_package_cannot_replace_a_reward_that_is_there(install: Callable[..., None]) -> None:
    install("acme", PACKAGE, pdms="acme_code:plain")
    assert resolve_reward("pdms") is REWARDS.get("pdms")


def test_offered_names_are_among_the_suggestions(install: Callable[..., None]) -> None:
    install("acme", PACKAGE, acme_plain="acme_code:plain")
    with pytest.raises(UnknownNameError, match=r"Unknown reward 'acme_plan' in reward\. Did you mean 'acme_plain'\?"):
        resolve_reward("acme_plan")


def test_async_function_is_a_reward() -> None:
    @reward("later")
    async def later(inputs: RewardInputs, *, value: float = 1.0) -> Array:
        return np.full(1, value)

    assert asyncio.run(resolve_reward("later").bind({"value": 3})(inputs())).tolist() == [3.0]


def test_function_without_a_readable_signature_is_refused() -> None:
    with pytest.raises(PluginError, match=r"Scorer 'iter' has no signature that can be read"):
        describe_options("Scorer 'iter'", iter, skip=0)
    with pytest.raises(PluginError, match=r"Reward 'iter' has no signature that can be read"):
        reward("iter")(iter)


def test_words_of_yaml_arrive_as_text() -> None:
    @reward("modal")
    def modal(inputs: RewardInputs, *, mode: str = "on", flag: bool = False) -> Array:
        return np.array([{"on": 1.0, "off": 0.0}[mode] + 10.0 * flag])

    bind = resolve_reward("modal").bind
    assert [bind({"mode": value})(inputs()).tolist() for value in (True, False, "off")] == [[1.0], [0.0], [0.0]]
    assert bind({"flag": True})(inputs()).tolist() == [11.0]


def test_what_the_decorator_says_is_kept() -> None:
    reward("asking", needs=["lk", "ec"], two_frame=True, auxiliary=True)(scaled)
    entry = resolve_reward("asking")
    assert (entry.needs, entry.two_frame, entry.auxiliary) == (("lk", "ec"), True, True)
    assert resolve_reward("pdms").auxiliary is False
