"""NAVSIM logs: what is seen, what the human did, and both halves joined by token."""

from __future__ import annotations

import os
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.navsim_files import STAND, log_frames, metric_cache, quaternion

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import AgentType, Command, Observation, Scene, to_ego_frame, to_world_frame
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.importers.navsim import NavsimLogs, import_navsim
from rlhf_drive.scenes.importers.navsim_logs import (
    human_poses_at,
    observation_at,
    past_states_at,
    read_navsim_log,
)
from rlhf_drive.scenes.importers.navsim_map import MapView
from rlhf_drive.scenes.importers.navsim_observation import SIGHT_M
from rlhf_drive.scenes.importers.recorded import Refused

T0 = 1_630_000_000_123_456
TIMES = [T0 + 500_000 * (k - 3) for k in range(12)]


def drive(scene: Scene) -> np.ndarray:
    """``[12, 11]`` the logged past of a scene and the human's drive, as NAVSIM would log them."""
    states = np.zeros((12, 11))
    states[:4, :7] = scene.reference.past_states[:, :7]
    states[4:, :3] = to_world_frame(scene.reference.human_poses, scene.reference.ego_init[:3])
    return states


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A generated scene with several agents, some of which come late."""
    return next(s for s in generate_scenes(20, seed=0, kinds=["cut_in"]) if len(s.observation.agents) >= 3)


def written(path: Path, frames: list[dict[str, Any]], protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(frames, protocol))
    return path


def frames_of(scene: Scene, **options: Any) -> list[dict[str, Any]]:
    return log_frames(scene.observation, drive(scene), TIMES, [f"token{k}" for k in range(12)], **options)


def folded() -> list[Any]:
    """A list of lists of lists …, few in a pickle, 10^12 numbers as an array or text."""
    value: list[Any] = [0.0] * 10
    for _ in range(11):
        value = [value] * 10
    return value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_log_gives_back_the_observation_it_was_made_of(tmp_path: Path, scene: Scene, protocol: int) -> None:
    frames = read_navsim_log(written(tmp_path / "log.pkl", frames_of(scene), protocol))
    want, lines = scene.observation, scene.observation
    view = MapView(
        tuple(np.split(lines.map_xy.astype(float), lines.map_offsets[1:-1])),
        lines.map_type,
        lines.map_on_route,
        lines.map_red,
        lines.route_xy.astype(float),
        Command.STRAIGHT,
    )
    got = observation_at(frames, 3, view)
    near = np.hypot(*want.agents[:, -1, :2].T) <= SIGHT_M
    np.testing.assert_allclose(got.agents[..., :2], want.agents[near, :, :2], atol=2e-5)
    turn = np.angle(np.exp(1j * (got.agents[..., 2] - want.agents[near, :, 2])))
    np.testing.assert_allclose(turn * got.agents_valid, 0.0, atol=1e-5)
    moving = (want.agents_type[near] != AgentType.STATIC)[:, None, None]
    np.testing.assert_allclose(got.agents[..., 3:], want.agents[near, :, 3:] * moving, atol=1e-5)
    for name in ("agents_valid", "agents_size", "agents_type"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name)[near], err_msg=name)
    for name in ("map_xy", "map_offsets", "map_type", "map_on_route", "map_red", "route_xy"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    assert got.command == want.command
    assert dict(got.cameras) == {"CAM_F0": "log/CAM_F0/3.jpg"}
    past = drive(scene)[:4]
    np.testing.assert_allclose(got.ego_history[:, :3], to_ego_frame(past[:, :3], past[-1, :3]), atol=1e-6)
    np.testing.assert_allclose(got.ego_history[:, 3:7], past[:, 3:7], atol=1e-6)
    rate = np.diff(np.unwrap(past[:, 2])) / 0.5
    np.testing.assert_allclose(got.ego_history[:, 7], [rate[0], *rate], atol=1e-6)
    assert not np.shares_memory(got.agents, want.agents)


def test_history_and_future_of_a_log(tmp_path: Path, scene: Scene) -> None:
    content = frames_of(scene)
    content[1]["ego_dynamic_state"] = [0.1, 0.2, 0.3, 0.4]
    frames = read_navsim_log(written(tmp_path / "log.pkl", content))
    np.testing.assert_allclose(human_poses_at(frames, 3), scene.reference.human_poses, atol=1e-9)
    times, states = past_states_at(frames, 3)
    assert times.tolist() == TIMES[:4]
    want = drive(scene)[:4].copy()
    want[1, 3:7] = 0.1, 0.2, 0.3, 0.4
    want[:, 3:7] = want[:, 3:7].astype(np.float32)  # NAVSIM keeps velocities and accelerations in float32
    np.testing.assert_allclose(states, want, rtol=0, atol=1e-9)


def test_yaw_is_the_one_navsim_takes(tmp_path: Path, scene: Scene) -> None:
    """NAVSIM's quaternion library takes yaw off first; on a slope the usual formula gives another angle."""
    content = frames_of(scene)
    for frame in content:
        frame["ego2global_rotation"] = quaternion(0.7, 0.1, -0.2)
    frames = read_navsim_log(written(tmp_path / "log.pkl", content))
    assert frames[0].pose[2] == pytest.approx(0.7, abs=1e-12)
    w, x, y, z = quaternion(0.7, 0.1, -0.2)
    assert abs(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)) - 0.7) > 0.01
    content[0]["ego2global_rotation"] = [3.0 * part for part in quaternion(-1.2)]
    assert read_navsim_log(written(tmp_path / "log.pkl", content))[0].pose[2] == pytest.approx(-1.2, abs=1e-12)


@pytest.mark.parametrize(
    ("places", "command"),
    [
        ([1, 0, 0, 0], Command.LEFT),
        ([0, 1, 0, 0], Command.STRAIGHT),
        ([0, 0, 1, 0], Command.RIGHT),
        ([0, 0, 0, 1], None),
        ([0, 0, 0, 0], None),
        ([0, 0, 1], Command.RIGHT),
    ],
)
def test_driving_command(tmp_path: Path, scene: Scene, places: list[int], command: Command | None) -> None:
    content = frames_of(scene)
    content[3]["driving_command"] = np.array(places)
    frames = read_navsim_log(written(tmp_path / "log.pkl", content))
    assert frames[3].command == command
    view = MapView((), np.zeros(0, np.int8), np.zeros(0, bool), np.zeros(0, bool), np.zeros((0, 2)), Command.LEFT)
    assert observation_at(frames, 3, view).command == (Command.LEFT if command is None else command)


def test_names_become_types_and_static_objects_stand(tmp_path: Path, scene: Scene) -> None:
    content = frames_of(scene)
    names = ["vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object"]
    boxes = np.zeros((7, 7), dtype=np.float32)
    boxes[:, 0], boxes[:, 3], boxes[:, 4] = np.arange(7) * 5.0, 2.0, 1.0
    content[3]["anns"] = {
        "gt_boxes": boxes,
        "gt_names": names,
        "gt_velocity_3d": np.tile(np.float32([1.0, 0.0, 0.0]), (7, 1)),
        "instance_tokens": names,
        "track_tokens": names,
    }
    got = observation_at(read_navsim_log(written(tmp_path / "log.pkl", content)), 3)
    assert got.agents_type.tolist() == [0, 1, 2, 3, 3, 3, 3]
    np.testing.assert_allclose(got.agents[:, -1, 3], [1, 1, 1, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(got.agents[:, -1, 0], np.arange(7) * 5.0, atol=1e-5)
    assert got.agents_valid[:, :3].sum() == 0
    assert (len(got.map_type), len(got.route_xy)) == (0, 0)


def test_frames_that_are_missing(tmp_path: Path, scene: Scene) -> None:
    content = frames_of(scene)
    frames = read_navsim_log(written(tmp_path / "log.pkl", content))
    with pytest.raises(DataError, match=r"token2 of log log needs frames -1 to 2; the log has 0 to 11"):
        observation_at(frames, 2)
    with pytest.raises(DataError, match=r"token4 of log log needs frames 4 to 12"):
        human_poses_at(frames, 4)
    gap = read_navsim_log(written(tmp_path / "log.pkl", content[:5] + content[6:]))
    assert observation_at(gap, 3).speed_mps == observation_at(frames, 3).speed_mps
    with pytest.raises(DataError, match=r"token3 of log log has a neighbour 1 s apart"):
        human_poses_at(gap[:-1] + frames[-2:], 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.pop("ego_dynamic_state"), r"frame 3 lacks 'ego_dynamic_state'\. Is it a NAVSIM log"),
        (lambda f: f["anns"].pop("gt_boxes"), "frame 3 lacks 'gt_boxes'"),
        (lambda f: f.update(anns=[]), "anns is no mapping"),
        (
            lambda f: f["anns"].update(gt_names=["lorry"] * len(f["anns"]["gt_names"])),
            "gt_names has 'lorry'; known: veh",
        ),
        (lambda f: f["anns"].update(track_tokens=["a"] * len(f["anns"]["gt_names"])), "a track token twice"),
        (lambda f: f["anns"].update(gt_boxes=np.zeros((1, 7))), "lists of different lengths"),
        (
            lambda f: f.update(ego2global_translation=[0.0, np.nan, 0.0]),
            "ego2global_translation holds a value that is not",
        ),
        (lambda f: f.update(ego2global_translation=["a", "b", "c"]), "ego2global_translation holds no numbers"),
        (lambda f: f.update(ego2global_rotation=[0.0, 0.0, 0.0, 0.0]), "is no rotation"),
        (lambda f: f.update(ego_dynamic_state=[1.0, 0.0]), r"ego_dynamic_state has shape \[2\]"),
        (lambda f: f.update(driving_command=[1]), "driving_command has 1 places"),
        (lambda f: f.update(timestamp="now"), "a str where a number belongs"),
        (lambda f: f.update(token=5), "token is no text"),
        (lambda f: f.update(cams=[1]), "cams is no mapping"),
        (lambda f: f.update(traffic_lights=[(1,)]), "traffic_lights are no pairs"),
        (lambda f: f.update(traffic_lights=[(folded(), True)]), "a list where a name belongs"),
        (lambda f: f.update(ego2global_translation=folded()), "ego2global_translation holds no numbers"),
        (lambda f: f["anns"].update(gt_boxes=[folded()]), "gt_boxes holds no rows of 7 numbers"),
        (lambda f: f["anns"].update(gt_names=folded()), "a list where a name belongs"),
        (lambda f: f.update(timestamp=10**30), "a int where a number belongs"),
    ],
)
def test_frames_that_are_wrong(tmp_path: Path, scene: Scene, change: Any, reason: str) -> None:
    content = frames_of(scene)
    change(content[3])
    with pytest.raises(DataError, match=reason) as caught:
        read_navsim_log(written(tmp_path / "log.pkl", content))
    assert str(caught.value).startswith(f"{tmp_path / 'log.pkl'}: ")


def test_logs_that_are_no_logs_or_hostile(tmp_path: Path, scene: Scene) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    content = frames_of(scene)
    content[7]["can_bus"] = Payload()
    with pytest.raises(DataError, match=r"log\.pkl: refused: it asks for posix\.system"):
        read_navsim_log(written(tmp_path / "log.pkl", content))
    assert not (tmp_path / "canary").exists()
    for value in ({"a": 1}, [], [1]):
        (tmp_path / "log.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match="is no NAVSIM log, which is a list of frames"):
            read_navsim_log(tmp_path / "log.pkl")
    data = pickle.dumps(frames_of(scene))
    for size in np.linspace(0, len(data) - 1, 40).astype(int):
        (tmp_path / "log.pkl").write_bytes(data[:size])
        with pytest.raises(DataError, match=r"log\.pkl: (cut off or damaged|refused)"):
            read_navsim_log(tmp_path / "log.pkl")


def both(folder: Path, scene: Scene, version: str, *, log: str = "log", **options: Any) -> tuple[Path, Path]:
    """A metric cache of the generated scene and the log it is from."""
    ref = replace(
        scene.reference,
        t0_us=T0,
        past_times_us=np.array(TIMES[:4]),
        past_states=drive(scene)[:4],
        pdm_reference_v1=np.tile(scene.reference.ego_init[:3], (41, 1)),
        pdm_reference_v2=np.tile(scene.reference.ego_init[:3], (41, 1)),
    )
    cache = metric_cache(ref, version, log=log, token="token3")
    STAND.dump(folder / "cache" / log / "unknown" / "token3" / "metric_cache.pkl", cache)
    written(folder / "logs" / "mini" / f"{log}.pkl", frames_of(scene, log=log, **options))
    return folder / "cache", folder / "logs"


@pytest.mark.parametrize("version", ["v1.1", "v2.2"])
def test_caches_and_logs_are_joined_by_token(tmp_path: Path, scene: Scene, version: str) -> None:
    caches, logs = both(tmp_path, scene, version)
    (joined,) = import_navsim(caches, logs)
    (alone,) = import_navsim(caches)
    assert isinstance(joined, Scene)
    assert isinstance(alone, Scene)
    assert (joined.token, joined.kind, joined.cluster) == ("token3", "navsim", "log")
    seen = observation_at(read_navsim_log(logs / "mini" / "log.pkl"), 3)
    for name in ("ego_history", "agents", "agents_valid", "agents_size", "agents_type", "command", "cameras"):
        np.testing.assert_equal(getattr(joined.observation, name), getattr(seen, name))
    for name in ("map_xy", "map_offsets", "map_type", "map_on_route", "route_xy"):
        np.testing.assert_array_equal(getattr(joined.observation, name), getattr(alone.observation, name))
    assert joined.observation.agents_valid.sum() > joined.observation.agents_valid[:, -1].sum()
    assert dict(alone.observation.cameras) == {}
    np.testing.assert_allclose(joined.reference.human_poses, scene.reference.human_poses, atol=1e-9)
    assert joined.reference.past_times_us.tolist() == TIMES[:4]
    np.testing.assert_allclose(joined.reference.past_states, drive(scene)[:4], atol=1e-6)
    np.testing.assert_array_equal(joined.reference.prev_ego_init, joined.reference.past_states[2])
    assert joined.reference.prev_t0_us == TIMES[2]
    for field in fields(joined.reference):
        if field.name not in ("human_poses", "past_times_us", "past_states", "prev_ego_init", "prev_t0_us"):
            np.testing.assert_array_equal(getattr(joined.reference, field.name), getattr(alone.reference, field.name))


def test_what_a_v2_cache_says_of_the_past_is_kept(tmp_path: Path, scene: Scene) -> None:
    """The scorer's own figures win over those of the log, bit by bit."""
    caches, logs = both(tmp_path, scene, "v2.2")
    (joined,), (alone,) = import_navsim(caches, logs), import_navsim(caches)
    assert isinstance(joined, Scene)
    assert isinstance(alone, Scene)
    np.testing.assert_array_equal(joined.reference.human_poses, alone.reference.human_poses)
    np.testing.assert_array_equal(joined.reference.past_states, alone.reference.past_states)


def test_red_lights_of_a_log_reach_caches_that_know_of_none(tmp_path: Path) -> None:
    made = next(
        s
        for s in generate_scenes(20, seed=0, kinds=["red_light"])
        if ((s.reference.map_layer == 1) & s.reference.map_on_route).any()
    )
    ids = [str(100 + p) for p in np.flatnonzero((made.reference.map_layer == 1) & made.reference.map_on_route)]
    caches, logs = both(tmp_path, made, "v1.1", red=ids)
    (joined,), (alone,) = import_navsim(caches, logs), import_navsim(caches)
    assert isinstance(joined, Scene)
    assert isinstance(alone, Scene)
    assert not alone.observation.map_red.any()
    red = joined.observation.map_red
    assert red.any()
    assert joined.observation.map_on_route[red].all()


def test_logs_are_found_by_name_else_by_token(tmp_path: Path, scene: Scene) -> None:
    caches, logs = both(tmp_path, scene, "v2.2")
    (logs / "mini" / "log.pkl").rename(logs / "renamed.pkl")
    written(logs / "other.pkl", [frame | {"token": f"x{k}"} for k, frame in enumerate(frames_of(scene))])
    (logs / "broken.pkl").write_bytes(b"")
    (joined,) = import_navsim(caches, logs)
    assert isinstance(joined, Scene)
    assert NavsimLogs(logs).find("nobody", "x5")[1] == 5
    with pytest.raises(DataError, match=r"any of the 3 logs in .* has no frame of this token"):
        NavsimLogs(logs).find("nobody", "absent")
    with pytest.raises(DataError, match=r"the log .*other\.pkl has no frame of this token"):
        NavsimLogs(logs).find("other", "token3")


def test_only_a_few_logs_stay_in_memory(tmp_path: Path, scene: Scene) -> None:
    for n in range(7):
        written(tmp_path / f"log{n}.pkl", frames_of(scene, log=f"log{n}"))
    logs = NavsimLogs(tmp_path)
    first = logs.find("log0", "token3")[0]
    assert logs.find("log0", "token5")[0] is first
    for n in range(7):
        assert logs.find(f"log{n}", "token3")[0][3].log == f"log{n}"
    assert [path.stem for path in logs._latest] == ["log3", "log4", "log5", "log6"]
    assert logs.find("log0", "token3")[0] is not first


def test_caches_and_logs_of_different_data(tmp_path: Path, scene: Scene) -> None:
    caches, logs = both(tmp_path, scene, "v2.2")
    content = frames_of(scene)
    content[3]["timestamp"] += 100_000
    written(logs / "mini" / "log.pkl", content)
    (refused,) = import_navsim(caches, logs)
    assert isinstance(refused, Refused)
    assert "lies 0.1 s and" in refused.reason
    content[3]["timestamp"] -= 100_000
    content[3]["ego2global_translation"][0] += 3.0
    written(logs / "mini" / "log.pkl", content)
    (refused,) = import_navsim(caches, logs)
    assert isinstance(refused, Refused)
    assert "0 s and 3 m from that of the metric cache" in refused.reason


def test_logs_alone_cannot_be_scored(tmp_path: Path, scene: Scene) -> None:
    _, logs = both(tmp_path, scene, "v2.2")
    with pytest.raises(DataError, match=r"logs alone cannot be scored.*Give the folder of NAVSIM's metric caching"):
        import_navsim(None, logs)
    with pytest.raises(DataError, match=r"holds no metric cache.*Logs alone cannot be scored"):
        import_navsim(logs / "mini")
    with pytest.raises(DataError, match="holds no NAVSIM log"):
        import_navsim(tmp_path / "cache", tmp_path / "absent")
    (logs / "more").mkdir()
    written(logs / "more" / "log.pkl", frames_of(scene))
    with pytest.raises(DataError, match="Log 'log' is there twice"):
        import_navsim(tmp_path / "cache", logs)


def test_observation_never_holds_what_comes_later(tmp_path: Path, scene: Scene) -> None:
    """The same log with another future gives the same observation."""
    content = frames_of(scene)
    got = observation_at(read_navsim_log(written(tmp_path / "a.pkl", content)), 3)
    for frame in content[4:]:
        frame["ego2global_translation"] = np.array([1e5, 1e5, 0.0])
        frame["anns"] = content[0]["anns"]
    other = observation_at(read_navsim_log(written(tmp_path / "b.pkl", content)), 3)
    for field in fields(Observation):
        np.testing.assert_equal(getattr(got, field.name), getattr(other, field.name))
