"""Which scenes are visited: uniform is the scene order, informative follows what scenes teach and forgets none."""

from __future__ import annotations

import math
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from rlhf_drive.errors import CheckpointError, ConfigError
from rlhf_drive.training import draws
from rlhf_drive.training.schedule import scene_order
from rlhf_drive.training.visiting import (
    FLOOR,
    SceneVisits,
    VisitState,
    choose_informative,
    choose_uniform,
    longest_wait,
)


def simulate(visits: SceneVisits, probability: np.ndarray, steps: range, number: int) -> list[list[int]]:
    """Scene s differs with ``probability[s]`` at each visit, whatever was visited before."""
    history = []
    for step in steps:
        chosen = visits.choose(step, number)
        draws = np.random.Generator(np.random.Philox(key=[99, step])).random(len(probability))
        visits.saw(step, chosen, [bool(draws[s] < probability[s]) for s in chosen])
        history.append(chosen)
    return history


@pytest.mark.parametrize(("count", "number"), [(10, 4), (7, 3), (3, 8), (1, 2), (38, 16)])
def test_uniform_is_the_scene_order(count: int, number: int) -> None:
    visits = SceneVisits("uniform", count, seed=5)
    for step in range(12):
        assert visits.choose(step, number) == scene_order(5, step, count, number)
        visits.saw(step, list(range(count)), [step % 2 == 0] * count)  # what came of it does not matter


@pytest.mark.parametrize("mode", ["uniform", "informative"])
def test_further_scenes_are_fresh_and_keyed(mode: str) -> None:
    def chosen(seed: int, step: int, taken: list[int], number: int = 4) -> list[int]:
        visits = SceneVisits(mode, 20, seed)
        visits.saw(0, list(range(20)), [True] * 20)
        return visits.choose(step, number, set(taken))

    base = [3, 1, 4, 15, 9]
    found = chosen(0, 7, base)
    assert len(set(found)) == 4
    assert not set(found) & set(base)
    assert chosen(0, 7, base[::-1]) == found
    assert all(other != found for other in (chosen(1, 7, base), chosen(0, 8, base)))
    assert found == chosen(0, 7, base, 1) + chosen(0, 7, [*base, found[0]], 3)  # however the draw is cut
    assert sorted(chosen(0, 7, list(range(18)))) == [18, 19]  # no more are left
    assert chosen(0, 7, list(range(20))) == []
    # All the rest is as likely: 400 draws of 4 of 15, expected 106.7 each, standard deviation 8.8.
    counts = Counter(s for step in range(400) for s in chosen(0, step, base))
    assert set(counts) == set(range(20)) - set(base)
    assert all(abs(c - 400 * 4 / 15) < 4 * math.sqrt(400 * 4 / 15 * 11 / 15) for c in counts.values())


@pytest.mark.parametrize(("count", "number"), [(23, 4), (10, 10), (40, 7)])
def test_every_scene_is_seen_before_one_comes_twice(count: int, number: int) -> None:
    visits = SceneVisits("informative", count, seed=2)
    history = simulate(visits, np.zeros(count), range(math.ceil(count / number)), number)
    flat = [s for chosen in history for s in chosen]
    assert sorted(flat[:count]) == list(range(count))
    assert flat[:count] == scene_order(2, 0, count, count)  # as the uniform order has it
    assert all(len(set(chosen)) == number for chosen in history)


def test_unseen_scenes_also_come_first_as_replacements() -> None:
    visits = SceneVisits("informative", 12, seed=0)
    batch = visits.choose(0, 4)
    more = visits.choose(0, 3, set(batch))
    assert batch + more == scene_order(0, 0, 12, 12)[:7]
    visits.saw(0, batch + more, [True] * 7)
    assert visits.choose(1, 5) == scene_order(0, 0, 12, 12)[7:]


@pytest.mark.parametrize("seed", range(40))
def test_no_scene_comes_twice_in_a_step_whatever_is_remembered(seed: int) -> None:
    random = np.random.default_rng(seed)
    state = VisitState(random.random(12), random.integers(0, 2, 12), np.zeros(12, np.int64))
    unseen = set(np.flatnonzero(state.visits == 0).tolist())
    for step in range(8):
        number = int(random.integers(1, 13))
        chosen = choose_informative(state, seed, step, number)
        assert len(set(chosen)) == len(chosen) == number
        assert set(chosen[: len(unseen)]) == unseen or set(chosen) <= unseen


def test_estimate_by_hand() -> None:
    # 1, then x + 0.3 (outcome - x): 1, 0.7, 0.49, 0.343 + 0.3 = 0.643; a scene not visited stays at 1.
    state = VisitState.fresh(2)
    for step, differed in enumerate([True, False, False, True]):
        state = state.recorded(step, [0], [differed])
    assert state.estimate.tolist() == pytest.approx([0.643, 1.0], abs=1e-12)
    assert (state.visits.tolist(), state.last.tolist()) == ([4, 0], [3, -1])


def test_frequencies_are_the_expected_ones() -> None:
    """One scene a step and fixed estimates: a quarter of the steps go in turn, the others by ``estimate / sum``."""
    estimate = np.array([1.0, 0.5, 0.25, 0.25, 0.01, 0.0])
    count, steps = len(estimate), 24_000
    state = VisitState(estimate, np.ones(count, np.int64), np.zeros(count, np.int64))
    counts = Counter(choose_informative(state, 3, step, 1)[0] for step in range(steps))
    expected = FLOOR / count + (1 - FLOOR) * estimate / estimate.sum()
    for scene in range(count):
        weighted = (1 - FLOOR) * estimate[scene] / estimate.sum()
        deviation = math.sqrt(steps * weighted * (1 - weighted)) + 1
        assert abs(counts[scene] - steps * expected[scene]) < 4 * deviation, scene


def test_several_a_step_are_drawn_without_replacement() -> None:
    """Pairs by weights 4, 2, 1, 1 without the turn: P(a, b) = w_a/8 w_b/(8 - w_a) + w_b/8 w_a/(8 - w_b)."""
    state = VisitState(np.array([1.0, 0.5, 0.25, 0.25, 1.0]), np.ones(5, np.int64), np.zeros(5, np.int64))
    weight = np.array([4.0, 2.0, 1.0, 1.0])
    steps = 12_000
    counts = Counter(tuple(sorted(choose_informative(state, 0, step, 2, {4}))) for step in range(steps))
    for a in range(4):
        for b in range(a + 1, 4):
            p = weight[a] / 8 * weight[b] / (8 - weight[a]) + weight[b] / 8 * weight[a] / (8 - weight[b])
            assert abs(counts[(a, b)] - steps * p) < 4 * math.sqrt(steps * p * (1 - p)), (a, b)
    assert sum(counts.values()) == steps


def test_informative_scenes_come_more_often() -> None:
    """40 scenes, 8 a step, a quarter of which always differ, a quarter half of the time, a half never."""
    probability = np.repeat([1.0, 0.5, 0.0], [10, 10, 20])
    visits = SceneVisits("informative", 40, seed=1)
    steps = range(600)
    counts = Counter(s for chosen in simulate(visits, probability, steps, 8)[100:] for s in chosen)
    share = [sum(counts[s] for s in kind) / (500 * 8) for kind in (range(10), range(10, 20), range(20, 40))]
    # Never: of the turn half. Always and half of the time: the rest of it, and the other visits about as 1 to 0.5.
    assert share[2] == pytest.approx(FLOOR / 2, abs=0.02)
    assert share[0] == pytest.approx(FLOOR / 4 + (1 - FLOOR) * 2 / 3, abs=0.06)
    assert share[1] == pytest.approx(FLOOR / 4 + (1 - FLOOR) / 3, abs=0.06)
    uniform = np.mean(probability)
    differing = share[0] + 0.5 * share[1]
    assert uniform == pytest.approx(0.375)
    assert differing > 1.8 * uniform  # informative groups a step


def test_what_changes_is_noticed() -> None:
    """Scenes that stop to teach make room for those that begin to."""
    visits = SceneVisits("informative", 20, seed=0)
    first = np.repeat([1.0, 0.0], 10)
    simulate(visits, first, range(60), 5)
    late = simulate(visits, 1.0 - first, range(60, 160), 5)[40:]
    counts = Counter(s for chosen in late for s in chosen)
    assert sum(counts[s] for s in range(10, 20)) > 4 * sum(counts[s] for s in range(10))


@pytest.mark.parametrize(("count", "number"), [(20, 4), (33, 5), (9, 1), (16, 16), (5, 8), (50, 3)])
@pytest.mark.parametrize("kind", ["nothing", "one", "all"])
def test_no_scene_starves(count: int, number: int, kind: str) -> None:
    probability = {"nothing": np.zeros(count), "one": np.eye(count)[0], "all": np.ones(count)}[kind]
    bound = longest_wait(count, number)
    steps = 4 * bound
    history = simulate(SceneVisits("informative", count, seed=7), probability, range(steps), number)
    assert all(len(chosen) == number for chosen in history)
    longest = 0
    for scene in range(count):
        at = [-1, *(step for step, chosen in enumerate(history) if scene in chosen), steps]
        longest = max(longest, *np.diff(at).tolist())
    assert longest <= bound
    # ceil(20 / 4) + ceil(39 / (4 * 0.25)) + 1
    assert longest_wait(20, 4) == 5 + 39 + 1


def test_metrics_by_hand() -> None:
    visits = SceneVisits("uniform", 4, seed=0)
    assert visits.metrics(0) == {"visits/unseen_frac": 1.0}
    visits.saw(0, [2, 3], [True, False])
    visits.saw(5, [3], [False])
    # scene 2 stays at 1; scene 3: 0.7, then 0.49
    expected = {"visits/unseen_frac": 0.5, "visits/estimate": (1.0 + 0.49) / 2, "visits/longest_wait": 5.0}
    assert visits.metrics(5) == pytest.approx(expected, abs=1e-12)


def test_bad_use_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rl.scene_visits = 'informativ' does not exist. Did you mean 'informative'"):
        SceneVisits("informativ", 3, 0)
    state = SceneVisits("informative", 3, 0).state()
    with pytest.raises(CheckpointError, match="visits of 3 scenes, but 4 are trained on"):
        SceneVisits("informative", 4, 0).restore(state)


def keyed(seed: int, step: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, purpose]))


def plain_further(seed: int, step: int, count: int, number: int, taken: set[int]) -> list[int]:
    """Every scene has its place in one permutation."""
    return [s for s in keyed(seed, step, 1).permutation(count).tolist() if s not in taken][:number]


def plain_informative(state: VisitState, seed: int, step: int, number: int, taken: set[int]) -> list[int]:
    """Every scene is looked at, and all keys are sorted."""
    count = len(state.visits)
    if not taken and number > count:
        return [*range(count), *plain_informative(state, seed, step, number - count, taken)]
    order = scene_order(seed, 0, count, count)
    chosen = [s for s in order if state.visits[s] == 0 and s not in taken][:number]
    if len(chosen) < number and not taken:
        positions = range(math.floor(step * number * FLOOR), math.floor((step + 1) * number * FLOOR))
        turn = dict.fromkeys(scene_order(seed, position, count, 1)[0] for position in positions)
        chosen += [s for s in turn if s not in chosen][: number - len(chosen)]
    keys = np.log1p(-keyed(seed, step, 2).random(count)) / np.maximum(state.estimate, 1e-6)
    rest = [s for s in np.argsort(-keys, kind="stable").tolist() if s not in taken and s not in chosen]
    return chosen + rest[: number - len(chosen)]


@pytest.mark.parametrize("seed", range(30))
def test_choices_are_those_of_looking_at_every_scene(seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 60))
    seen = float(random.choice([0.0, 0.5, 1.0]))
    estimate = random.random(count).round(int(random.integers(0, 3)))  # rounded: with ties
    state = VisitState(estimate, (random.random(count) < seen).astype(np.int64), np.zeros(count, np.int64))
    for step in range(6):
        number = int(random.integers(1, 20))
        taken = set(random.choice(count, int(random.integers(0, count)), replace=False).tolist())
        for some in (set[int](), taken):
            assert choose_informative(state, seed, step, number, some) == plain_informative(
                state, seed, step, number, some
            )
        if taken:
            assert choose_uniform(seed, step, count, number, taken) == plain_further(seed, step, count, number, taken)


def test_what_is_known_to_be_visited_is_not_looked_at_again() -> None:
    """The head of the first pass that `SceneVisits` passes over changes no choice, also after holes and a restart."""
    visits = SceneVisits("informative", 40, seed=3)
    random = np.random.default_rng(0)
    for step in range(30):
        chosen = visits.choose(step, 3)
        state = visits.state()
        memory = VisitState(*(state[f"visits.{name}"].numpy() for name in ("estimate", "visits", "last")))
        assert chosen == plain_informative(memory, 3, step, 3, set())
        other = random.integers(0, 40, 2).tolist()  # visited out of order
        visits.saw(step, [*chosen, *other], [True, False, True, False, True])
        if step == 7:
            resumed = SceneVisits("informative", 40, seed=3)
            resumed.restore(visits.state())
            visits = resumed


def test_large_numbers_of_scenes_follow_the_same_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn one by one: pairs by weights 4, 2, 1, 1 as above, and every other scene as likely as the next."""
    monkeypatch.setattr(draws, "LARGE", 4)
    monkeypatch.setattr(draws, "BLOCK", 16)
    estimate, weight = np.array([1.0, 0.5, 0.25, 0.25, 1.0]), np.array([4.0, 2.0, 1.0, 1.0])
    steps = 12_000
    counts = Counter(tuple(sorted(draws.weighted(0, step, estimate, 2, {4}))) for step in range(steps))
    for a in range(4):
        for b in range(a + 1, 4):
            p = weight[a] / 8 * weight[b] / (8 - weight[a]) + weight[b] / 8 * weight[a] / (8 - weight[b])
            assert abs(counts[(a, b)] - steps * p) < 4 * math.sqrt(steps * p * (1 - p)), (a, b)
    assert sum(counts.values()) == steps
    singles = Counter(s for step in range(4000) for s in draws.further(0, step, 20, 3, {7, 8}))
    assert set(singles) == set(range(20)) - {7, 8}
    # 4000 draws of 3 of 18: 666.7 each, standard deviation sqrt(4000 * 1/6 * 5/6) = 23.6
    assert all(abs(n - 666.7) < 4 * 23.6 for n in singles.values())


def test_large_draws_continue_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "LARGE", 10)
    estimate = np.random.default_rng(0).random(500)
    for draw in (
        lambda number, taken: draws.further(1, 2, 500, number, taken),
        lambda number, taken: draws.weighted(1, 2, estimate, number, taken),
    ):
        whole = draw(12, {3, 4})
        assert len(set(whole)) == 12
        assert not {3, 4} & set(whole)
        assert whole == draw(5, {3, 4}) + draw(7, {3, 4, *whole[:5]})


def test_of_many_scenes_that_never_differ_enough_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "LARGE", 10)
    monkeypatch.setattr(draws, "BLOCK", 8)
    monkeypatch.setattr(draws, "BLOCKS", 2)
    estimate = np.zeros(50)
    estimate[17] = 1.0
    chosen = draws.weighted(0, 0, estimate, 30, set(range(10)))
    assert len(set(chosen)) == 30
    assert 17 in chosen
    assert min(chosen) >= 10
    assert sorted(draws.weighted(0, 0, estimate, 99, {5})) == [s for s in range(50) if s != 5]


def test_steps_chosen_ahead_do_not_choose_the_same_scenes() -> None:
    """Two steps are under way before the first one's outcome is known; where too few are left they may meet."""
    visits = SceneVisits("informative", 12, seed=0)
    order = scene_order(0, 0, 12, 12)
    assert [visits.choose(step, 4) for step in range(3)] == [order[:4], order[4:8], order[8:]]
    visits.saw(0, order[:4], [True] * 4)
    assert set(visits.choose(3, 4)) == set(order[:4])
    assert len(visits.choose(4, 4)) == 4  # all twelve are away
    for step in (1, 2, 3, 4):
        visits.saw(step, [], [])
    assert visits.choose(5, 8) == copied(visits).choose(5, 8)  # nothing is remembered of what was away


def remembered(visits: SceneVisits) -> dict[str, list[float]]:
    """What a checkpoint keeps, as lists."""
    return {name: tensor.tolist() for name, tensor in visits.state().items()}


def copied(visits: SceneVisits) -> SceneVisits:
    """One with the same memory."""
    other = SceneVisits(visits.mode, visits.count, visits.seed)
    other.restore(visits.state())
    return other


def test_threads_may_choose_while_another_notes() -> None:
    """Steps of 5 of 1000 scenes, chosen by four threads at once: each step has its own scenes, none is lost."""
    visits, chosen = SceneVisits("informative", 1000, seed=0), dict[int, list[int]]()

    def work(first: int) -> None:
        for step in range(first, 200, 4):
            chosen[step] = visits.choose(step, 5)
            visits.saw(step, chosen[step], [True] * 5)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(s for scenes in chosen.values() for s in scenes) == list(range(1000))
    assert remembered(visits)["visits.visits"] == [1] * 1000


def test_resumed_from_tensors_it_goes_on_to_the_bit() -> None:
    probability = np.linspace(0, 1, 17)
    whole, first = SceneVisits("informative", 17, seed=4), SceneVisits("informative", 17, seed=4)
    expected = simulate(whole, probability, range(40), 5)
    simulate(first, probability, range(23), 5)
    tensors = first.state() | {"ema.weight": torch.zeros(3)}
    simulate(first, probability, range(23, 30), 5)  # what was given away does not change any more
    resumed = SceneVisits("informative", 17, seed=4)
    resumed.restore(tensors)
    assert simulate(resumed, probability, range(23, 40), 5) == expected[23:]
    assert remembered(resumed) == remembered(whole)
    assert resumed.metrics(39) == whole.metrics(39)
    assert {name: tensor.dtype for name, tensor in whole.state().items()} == {
        "visits.estimate": torch.float64, "visits.visits": torch.int64, "visits.last": torch.int64
    }  # fmt: skip
    untouched = SceneVisits("informative", 17, seed=4)
    untouched.restore({"ema.weight": torch.zeros(3)})
    assert remembered(untouched) == remembered(SceneVisits("informative", 17, seed=4))
    assert simulate(SceneVisits("informative", 17, seed=5), probability, range(23, 40), 5) != expected[23:]
    with pytest.raises(CheckpointError, match="visits of 17 scenes, but 4 are trained on"):
        SceneVisits("informative", 4, 0).restore(tensors)
