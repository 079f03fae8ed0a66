"""Predictions: cases worked out by hand, and what must rise or fall with what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_drive.config import load_recipe
from rlhf_drive.errors import ConfigError, UnknownNameError
from rlhf_drive.estimate import Layout, Machine, Rate, Workload, from_sheet, layout_of, network_of, predict, step_of
from rlhf_drive.estimate.measure import fit
from rlhf_drive.estimate.predict import parameters_of
from rlhf_drive.estimate.sweep import sweep
from rlhf_drive.estimate.traffic import PIECES, costs_of

RECIPE = load_recipe("quickstart")
ONE = Layout(trainers=1, samplers=0, scorers=1, sharded=False, bfloat16=False)


def _machine(**changes: object) -> Machine:
    """One second a state, nothing else takes time but what is given."""
    rates = dict.fromkeys((*PIECES, "features", "plans"), Rate(0.0, 0.0))
    given = Machine("by hand", True, rates, Rate(0.0, 0.0), 0.0, Rate(0.0, 0.0), Rate(0.0, 0.0), disk=1e30)
    return replace(given, **{**changes, "rates": rates | changes.get("rates", {})})  # type: ignore[arg-type, operator]


def _work(**changes: object) -> Workload:
    """2 scenes of 4 plans in 8 steps, one micro-batch each, one update, no reference."""
    step = replace(
        step_of(RECIPE), scenes=2, group=4, chunk=1, micro_scenes=1, iterations=1, reference=False, monitor_every=0
    )
    return Workload(network_of(RECIPE), replace(step, **changes), scenes=1, max_steps=10**9)  # type: ignore[arg-type]


def _sheet(work: Workload, name: str = "H100") -> Machine:
    params = parameters_of(work.net, work.step)
    return from_sheet(name, costs_of(work.net, params, rows_per_scene=float(work.step.group)), bfloat16=False)


def test_sampling_takes_every_pass_of_every_chunk() -> None:
    # 2 chunks of 1 scene, each 8 passes of 4 states, 0.1 s a call and 1 s a state: 2 * 8 * (0.1 + 4) s.
    found = predict(_work(), _machine(rates={"decode": Rate(0.1, 1.0)}), ONE)
    assert found.parts["sampling"] == pytest.approx(65.6)
    assert found.step_s == pytest.approx(65.6)


def test_an_update_takes_forward_and_backward_passes_of_every_micro_batch() -> None:
    # 2 micro-batches of 4 plans x 8 states; 3 updates: forward 3 * 2 * 32 * 1 s, backward twice that.
    rates = {"decode_forward": Rate(0.0, 1.0), "decode_backward": Rate(0.0, 2.0), "optimizer": Rate(0.5, 0.0)}
    found = predict(_work(iterations=3), _machine(rates=rates), ONE)
    assert found.parts["likelihood"] == pytest.approx(192.0)
    assert found.parts["update"] == pytest.approx(384.0 + 3 * 0.5)


def test_entropies_are_computed_in_the_first_update_alone_unless_they_are_in_the_loss() -> None:
    # A micro-batch scores 4 plans x 16 positions.
    rates = {"entropy_forward": Rate(0.0, 1.0), "logp_forward": Rate(0.0, 0.01)}
    found = predict(_work(iterations=2), _machine(rates=rates), ONE)
    assert found.parts["likelihood"] == pytest.approx(2 * 64 * 1.01)
    found = predict(_work(iterations=2, entropy=True), _machine(rates=rates), ONE)
    assert found.parts["likelihood"] == pytest.approx(2 * 2 * 64)


def test_checkpointed_layers_are_computed_again() -> None:
    rates = {"decode_forward": Rate(0.0, 1.0)}
    plain, again = (predict(_work(checkpointing=c), _machine(rates=rates), ONE) for c in (False, True))
    assert plain.parts["update"] == 0.0
    assert again.parts["update"] == again.parts["likelihood"] == pytest.approx(64.0)


def test_scores_are_waited_for_where_scoring_is_slower_than_sampling() -> None:
    # 4 chunks of 4 plans; sampling a chunk takes 8 * 4 * 0.125 = 4 s, scoring it 4 * 2 = 8 s on one worker.
    machine = _machine(rates={"decode": Rate(0.0, 0.125)}, score=Rate(0.0, 2.0))
    found = predict(_work(scenes=4), machine, ONE)
    assert (found.parts["sampling"], found.parts["scoring"]) == (16.0, 8.0 + 3 * 4.0)
    # Sampled till 4, 8, 12, 16; scored till 12, 20, 28, 36.
    assert found.step_s == 36.0
    # With four workers scoring takes 2 s: only the last chunk's is waited for.
    found = predict(_work(scenes=4), machine, replace(ONE, scorers=4))
    assert found.parts["scoring"] == 2.0
    assert found.scoring_busy_s == 32.0


def test_what_is_flat_is_sampled_but_not_learned_from() -> None:
    rates = {"decode": Rate(0.0, 1.0), "decode_forward": Rate(0.0, 1.0)}
    all_differ, half, none = (
        predict(replace(_work(), flat=flat), _machine(rates=rates), ONE) for flat in (0.0, 0.5, 1.0)
    )
    assert all_differ.parts["sampling"] == half.parts["sampling"] == none.parts["sampling"]
    assert half.parts["likelihood"] == all_differ.parts["likelihood"] / 2
    assert none.parts["likelihood"] == none.parts["update"] == 0.0


def test_asynchronous_steps_take_as_long_as_the_slower_side() -> None:
    rates = {"decode": Rate(0.0, 1.0), "decode_forward": Rate(0.0, 2.0)}
    machine, layout = _machine(rates=rates), replace(ONE, samplers=1)
    together, apart = (predict(_work(staleness=m), machine, layout) for m in (0, 1))
    assert together.step_s == pytest.approx(together.sample_side_s + together.train_side_s)
    assert apart.step_s == pytest.approx(apart.train_side_s) == pytest.approx(128.0)
    assert apart.idle["trainers"] == 0.0
    assert apart.idle["samplers"] == pytest.approx(0.5, abs=0.01)


def test_more_processes_than_micro_batches_do_not_help() -> None:
    rates = {"decode_forward": Rate(0.0, 1.0)}
    found = {n: predict(_work(scenes=8), _machine(rates=rates), replace(ONE, trainers=n)) for n in (1, 4, 8, 64)}
    forward = {n: prediction.parts["likelihood"] for n, prediction in found.items()}
    assert forward == {1: 256.0, 4: 64.0, 8: 32.0, 64: 32.0}
    assert found[64].bottleneck == "too few micro-batches"
    assert "raise rollout.scenes_per_step to 64" in found[64].advice


def test_gradients_go_around_a_ring() -> None:
    work, machine = _work(), _machine(link=1e6, message_s=0.0)
    trained = parameters_of(work.net, work.step).trained
    found = predict(work, machine, replace(ONE, trainers=2))
    assert found.parts["exchange"] == pytest.approx(2 * 0.5 * 4 * trained / 1e6)


def test_divided_weights_take_less_memory_and_more_exchange() -> None:
    work = _work(scenes=64)
    machine = _sheet(work)
    whole, divided = (predict(work, machine, replace(ONE, trainers=8, sharded=s)) for s in (False, True))
    assert divided.trainer.moments == pytest.approx(whole.trainer.moments / 8)
    assert divided.trainer.gradients == pytest.approx(whole.trainer.gradients / 8)
    assert divided.parts["exchange"] > whole.parts["exchange"]


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [("scenes", 32, 64), ("group", 4, 8), ("iterations", 1, 2), ("decode_steps", 4, 8), ("reference", False, True)],
)
def test_more_work_takes_longer(key: str, low: object, high: object) -> None:
    less, more = _work(**{key: low}), _work(**{key: high})
    assert predict(more, _sheet(more), ONE).step_s > predict(less, _sheet(less), ONE).step_s


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [
        *(("micro_scenes", 1, 4), ("ema", False, True), ("snapshot", False, True), ("reference", False, True)),
        *(("checkpointing", True, False), ("max_tokens", 64, 0), ("lora_rank", 4, 0)),
    ],
)
def test_memory_grows_with_what_is_held(key: str, low: object, high: object) -> None:
    less, more = (predict(_work(**{key: value}), _machine(), ONE).trainer.total for value in (low, high))
    assert more > less


def test_reward_workers_never_make_a_step_longer() -> None:
    work = _work(scenes=32)
    machine = replace(_sheet(work), score=Rate(0.01, 0.05))
    steps = [predict(work, machine, replace(ONE, scorers=n)).step_s for n in (1, 2, 8, 64)]
    assert steps == sorted(steps, reverse=True)
    found = predict(work, machine, ONE)
    assert found.bottleneck == "scoring"
    assert "reward workers" in found.advice


def test_adapters_alone_are_pushed() -> None:
    layout = replace(ONE, samplers=4)
    whole, adapters = (predict(_work(lora_rank=rank), _machine(), layout) for rank in (0, 4))
    assert whole.push_bytes == 4 * whole.params.total
    assert adapters.push_bytes == 4 * adapters.params.adapters < whole.push_bytes / 5


def test_the_moments_and_weights_of_a_process_are_counted_exactly() -> None:
    memory = predict(_work(), _machine(), ONE).trainer
    params = parameters_of(network_of(RECIPE), step_of(RECIPE))
    assert memory.weights == 4 * params.total
    assert memory.moments == 2 * memory.gradients == 8 * params.trained
    assert memory.reference == 0.0


def test_a_faster_device_is_predicted_to_be_faster() -> None:
    work = _work(scenes=32)
    seconds = [predict(work, _sheet(work, name), ONE).step_s for name in ("CPU", "A10", "A100", "H200")]
    assert seconds == sorted(seconds, reverse=True)


def test_a_sweep_says_where_a_fixed_step_stops_scaling() -> None:
    work = Workload(network_of(RECIPE), step_of(RECIPE), 10**6, 100)
    rows = sweep(RECIPE, work, _sheet(work))
    fixed, grown = rows[:4], rows[4:]
    assert [row.devices for row in fixed] == [row.devices for row in grown] == [1, 8, 64, 512]
    assert fixed[2].found.bottleneck == "too few micro-batches"
    assert fixed[3].found.scenes_per_s < fixed[1].found.scenes_per_s
    assert grown[3].found.gather_bytes == 512 * grown[0].found.gather_bytes


def test_two_sizes_give_a_rate_and_what_a_call_costs() -> None:
    assert fit({("a", 2.0): 5.0, ("a", 10.0): 9.0, ("b", 4.0): 8.0}) == {"a": Rate(4.0, 0.5), "b": Rate(0.0, 2.0)}
    # Noise must not make anything negative.
    assert fit({("a", 2.0): 5.0, ("a", 10.0): 4.0}) == {"a": Rate(4.0, 0.0)}
    assert fit({("a", 2.0): 1.0, ("a", 4.0): 4.0}) == {"a": Rate(0.0, 1.0)}


def test_workers_take_their_devices_first() -> None:
    recipe = load_recipe(
        "quickstart",
        ["rollout.engine=ray", "rollout.workers=4", "rollout.scenes_per_chunk=8", "rollout.gpus_per_worker=0.5"],
    )
    assert layout_of(recipe, gpus=8).trainers == 6
    with pytest.raises(ConfigError, match="none is left to train on"):
        layout_of(recipe, gpus=2)


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="H100"):
        _sheet(_work(), "H10")


def test_a_recipe_without_rl_is_refused() -> None:
    with pytest.raises(ConfigError, match="no RL step"):
        step_of(replace(RECIPE, rl=None))  # type: ignore[arg-type]
