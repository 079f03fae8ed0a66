"""The importer of recordings on a small made-up street: every rule, what may be seen, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes import Command, MapElement, MapLayer, Observation, Scene
from rlhf_drive.scenes.importers.recorded import Refused, import_recording, import_recordings, recording_paths
from rlhf_drive.scenes.importers.recorded_map import hole_free_pieces

STEPS, START, LATER = 91, 20, 40
TIME = 0.1 * np.arange(STEPS)

# Two lanes east (0-2-4 and 1-3-5), a cross street (6), a bicycle lane (7) and a lane beyond it (8), a left turn (9).
ARC = np.linspace(-np.pi / 2, 0.0, 16)
CENTERS: list[Any] = [
    [[0, 0], [120, 0]],
    [[0, 3.5], [120, 3.5]],
    [[120, 0], [150, 0]],
    [[120, 3.5], [150, 3.5]],
    [[150, 0], [320, 0]],
    [[150, 3.5], [320, 3.5]],
    [[135, -40], [135, 40]],
    [[0, -2.5], [120, -2.5]],
    [[0, -5.0], [120, -5.0]],
    np.stack([120 + 15 * np.cos(ARC), 15 + 15 * np.sin(ARC)], axis=1),
]
HALF_WIDTHS = [1.75] * 7 + [0.75, 1.75, 1.75]
LINKS = [[0, 2], [1, 3], [2, 4], [3, 5], [0, 9]]


def _pack(arrays: dict[str, Any], key: str, lines: list[Any]) -> None:
    lines = [np.asarray(line, dtype=np.float32).reshape(-1, 2) for line in lines]
    arrays[f"{key}_xy"] = np.concatenate([np.zeros((0, 2), np.float32), *lines])
    arrays[f"{key}_off"] = np.cumsum([0] + [len(line) for line in lines]).astype(np.int32)


def _beside(line: Any, distance: float) -> NDArray[np.float64]:
    return np.asarray(shapely.get_coordinates(shapely.offset_curve(shapely.LineString(line), distance)))


def _agents() -> dict[str, Any]:
    """A car with gaps, one that leaves its place at 4 s, one that never does, a walker 90 m off, a late box."""
    x = np.stack(
        [40 + 8 * TIME, np.full(STEPS, 90.0), np.full(STEPS, 95.0), np.full(STEPS, 172.0), np.full(STEPS, 99.0)]
    )
    y = np.stack(
        [np.full(STEPS, 3.5), np.full(STEPS, -5.0), np.full(STEPS, 7.0), np.full(STEPS, 3.0), np.full(STEPS, 8.0)]
    )
    x[1] += np.where(TIME > 4.0, 2.0 * (TIME - 4.0), 0.0) + 0.1 * np.cos(40 * TIME)
    x[2] += 0.1 * np.cos(40 * TIME)
    valid = np.ones((5, STEPS), dtype=bool)
    valid[0, 11:16] = valid[0, 30:56] = False
    valid[4, : START + 5] = False
    vx = np.zeros((5, STEPS))
    vx[0], vx[1] = 8.0, np.where(TIME > 4.0, 2.0, 0.1)
    columns = {"x": x, "y": y, "heading": np.zeros((5, STEPS)), "vx": vx, "vy": np.zeros((5, STEPS))}
    found: dict[str, Any] = {f"agents_{k}": np.where(valid, v, 0).astype(np.float32) for k, v in columns.items()}
    found["agents_valid"], found["agents_type"] = valid, np.array([0, 0, 0, 1, 3], np.uint8)
    found["agents_size"] = np.array([[4.5, 1.9]] * 3 + [[0.6, 0.6], [1.0, 1.0]], np.float32)
    return found


def _arrays() -> dict[str, Any]:
    speed = 10.0 + 0.5 * TIME
    heading = 0.01 * (TIME - 2.0)
    x = 60.0 + 10.0 * TIME + 0.25 * TIME**2
    ego = np.stack([x, 0 * x, heading, speed * np.cos(heading), speed * np.sin(heading)], axis=1)
    arrays: dict[str, Any] = {"t": TIME, "ego": ego, **_agents()}
    _pack(arrays, "lane", CENTERS)
    _pack(arrays, "lane_left", [_beside(c, w) for c, w in zip(CENTERS, HALF_WIDTHS, strict=True)])
    _pack(arrays, "lane_right", [_beside(c, -w) for c, w in zip(CENTERS, HALF_WIDTHS, strict=True)])
    arrays["lane_type"] = np.array([0] * 7 + [2, 0, 0], np.uint8)
    arrays["lane_speed_limit"] = np.array([13.0] + [np.nan] * 9, np.float32)
    arrays["lane_in_intersection"] = np.full(10, -1, np.int8)
    arrays["lane_succ"] = np.array(LINKS, np.int32)
    island = [[200, -8], [210, -8], [210, -6], [200, -6]]
    _pack(arrays, "drivable", [[[-5, -9], [330, -9], [330, 9], [-5, 9]], island])
    arrays["drivable_poly"], arrays["drivable_hole"] = np.array([0, 0]), np.array([0, 1], np.uint8)
    _pack(arrays, "edge", [[[0, 9], [330, 9]]])
    _pack(arrays, "crosswalk", [[[118, -4], [119, -4], [119, 5], [118, 5], [118, -4]]])
    arrays["tl_lane"] = np.array([2], np.int32)
    arrays["tl_state"] = np.where(np.arange(STEPS) <= START + 10, 1, 3)[None].astype(np.uint8)
    arrays["route_lane"], arrays["route_lane_n_logged"] = np.array([0, 2, 4], np.int32), np.int32(2)
    arrays["route_xy"] = ego[:, :2]
    return arrays


def _write(folder: Path, name: str = "street", info: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a recording with some arrays replaced (None removes one); returns its JSON."""
    arrays = {key: value for key, value in {**_arrays(), **changes}.items() if value is not None}
    starts = {"recommended": [START], "moving": [START, LATER], "valid": [START, 25, LATER]}
    about = {"dataset": "WOMD", "dt": 0.1, "leak_cluster": 7, **{f"{k}_start_indices": v for k, v in starts.items()}}
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    (folder / f"{name}.json").write_text(json.dumps({**about, **(info or {})}))
    return folder / f"{name}.json"


def _scene(path: Path, **options: Any) -> Scene:
    (item,) = import_recording(path, "recommended", **options)
    assert isinstance(item, Scene), item
    return item


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return _scene(_write(tmp_path_factory.mktemp("recording")))


def _layer(scene: Scene, layer: MapLayer) -> list[shapely.Polygon]:
    reference = scene.reference
    rings = np.split(reference.map_xy, reference.map_offsets[1:-1])
    return [shapely.Polygon(ring) for ring, kind in zip(rings, reference.map_layer, strict=True) if kind == layer]


def _lane_at(scene: Scene, x: float, y: float) -> tuple[shapely.Polygon, bool]:
    reference = scene.reference
    rings = [shapely.Polygon(ring) for ring in np.split(reference.map_xy, reference.map_offsets[1:-1])]
    lanes = np.isin(reference.map_layer, [MapLayer.LANE, MapLayer.LANE_CONNECTOR])
    (found,) = [i for i, ring in enumerate(rings) if lanes[i] and ring.contains(shapely.Point(x, y))]
    return rings[found], bool(reference.map_on_route[found])


def test_names_times_and_empty_references(scene: Scene) -> None:
    assert (scene.token, scene.kind, scene.cluster) == ("street__020", "real_womd", "recorded-7")
    assert not scene.challenging
    assert (scene.reference.t0_us, scene.reference.prev_t0_us) == (102_000_000, 101_500_000)
    assert scene.reference.past_times_us.tolist() == [100_500_000, 101_000_000, 101_500_000, 102_000_000]
    assert scene.reference.pdm_reference_v1.shape == scene.reference.pdm_reference_v2.shape == (0, 3)


def test_ego_state_of_a_car_that_speeds_up_and_turns(scene: Scene, tmp_path: Path) -> None:
    # At 2 s: x = 60 + 20 + 1, heading 0, v = 11, a = 0.5, yaw rate 0.01; rear axle 1.461 m behind the box centre.
    steering = np.arctan(0.01 * 3.089 / 11.0)
    expected = [81 - 1.461, 0, 0, 11, 0, 0.5, 0.11, steering, 0, 0.01, 0]
    np.testing.assert_allclose(scene.reference.ego_init, expected, atol=2e-6)
    straight = _scene(_write(tmp_path), steering=False).reference
    np.testing.assert_allclose(straight.ego_init, [*expected[:7], 0, 0, 0, 0], atol=2e-6)
    np.testing.assert_allclose(scene.reference.past_states[0, 3], 10.25, atol=1e-5)
    # 0.5 s later the centre is at 60 + 25 + 0.25 * 6.25 and the heading 0.005.
    rear = 60 + 25 + 0.25 * 6.25 - 1.461 * np.cos(0.005) - (81 - 1.461)
    np.testing.assert_allclose(scene.reference.human_poses[0], [rear, -1.461 * np.sin(0.005), 0.005], atol=1e-5)


def test_agents_with_gaps_parked_ones_and_far_ones(scene: Scene) -> None:
    reference = scene.reference
    assert reference.agent_type.tolist() == [0, 0, 0, 1, 3]
    # Missing for 2.6 s, samples 30 … 55: present before and after, absent between.
    assert reference.agent_valid[0].tolist() == [True] * 10 + [False] * 26 + [True] * 15
    np.testing.assert_allclose(reference.agent_pose[0, 0, :2], [56, 3.5], atol=1e-5)
    # Parked over the whole recording: held at its median; the one that leaves later is not.
    assert np.ptp(reference.agent_pose[2, :, 0]) == 0
    assert not reference.agent_velocity[2].any()
    assert np.ptp(reference.agent_pose[1, :, 0]) > 5
    assert reference.agent_valid[4].tolist() == [False] * 5 + [True] * 46


def test_short_gap_is_interpolated(tmp_path: Path) -> None:
    arrays = _agents()
    arrays["agents_valid"][0] = True
    arrays["agents_valid"][0, START + 1 : START + 10] = False
    seen = arrays["agents_valid"][0]
    arrays["agents_x"][0] = np.where(seen, 40 + 8 * TIME, 0)
    reference = _scene(_write(tmp_path, **arrays)).reference
    assert reference.agent_valid[0].all()
    np.testing.assert_allclose(reference.agent_pose[0, :, 0], 40 + 8 * TIME[START : START + 51], atol=1e-4)


def test_lane_grows_only_into_space_that_no_other_lane_covers(scene: Scene) -> None:
    lane, on_route = _lane_at(scene, 60, 0)
    assert on_route
    assert lane.contains(shapely.Point(60, -3.2))
    assert not lane.contains(shapely.Point(60, -3.3))
    assert not lane.contains(shapely.Point(60, 1.8))
    # The signal's lane keeps its shape.
    assert _lane_at(scene, 148, 0)[0].symmetric_difference(shapely.box(120, -1.75, 150, 1.75)).area < 1e-6


def test_short_lanes_that_cross_another_are_connectors(scene: Scene) -> None:
    # Lanes 2 and 3 cross the cross street; the turn crosses lane 3.
    assert len(_layer(scene, MapLayer.LANE_CONNECTOR)) == 3
    (area,) = _layer(scene, MapLayer.INTERSECTION)
    assert area.covers(shapely.box(120.01, -1.74, 149.99, 5.24))
    assert area.difference(shapely.box(120, -1.75, 150, 5.25)).area == pytest.approx(38, abs=5)
    assert not area.contains(shapely.Point(135, 30))


def test_neighbours_join_the_route_but_not_across_a_bicycle_lane(scene: Scene) -> None:
    assert _lane_at(scene, 60, 3.5)[1]
    assert _lane_at(scene, 250, 3.5)[1]
    assert not _lane_at(scene, 60, -5.5)[1]
    assert not _lane_at(scene, 135, -30)[1]


def test_drivable_area_is_grown_cut_and_clipped(scene: Scene) -> None:
    pieces = _layer(scene, MapLayer.DRIVABLE_AREA)
    place = scene.reference.ego_init[:2]
    far = max(np.hypot(*(np.array(piece.exterior.coords) - place).T).max() for piece in pieces)
    assert far == pytest.approx(190.0, abs=1e-6)
    assert all(not piece.contains(shapely.Point(205, -7)) for piece in pieces)
    whole = shapely.union_all(pieces)
    assert whole.contains(shapely.Point(60, 9.29))
    assert not whole.contains(shapely.Point(60, 9.31))


def test_hole_free_pieces_keep_the_area() -> None:
    island = shapely.box(2, 2, 3, 3)
    polygon = shapely.Polygon(
        shapely.box(0, 0, 20, 5).exterior.coords, [island.exterior.coords, shapely.box(9, 1, 11, 4).exterior.coords]
    )
    pieces = hole_free_pieces(polygon)
    assert not any(piece.interiors for piece in pieces)
    assert sum(piece.area for piece in pieces) == pytest.approx(100 - 1 - 6)
    assert {10.0, 2.5} <= {x for piece in pieces for x in piece.bounds[::2]}


def test_centreline_reaches_400_m_ahead(scene: Scene) -> None:
    line = scene.reference.centerline
    np.testing.assert_array_equal(line[:4, 0], [0, 120, 150, 320])
    assert not line[:, 1:].any()
    # From 320 on in steps of 5 m, until 405 m or more lie ahead of the rear axle at 79.539.
    assert line[-1, 0] == 485.0
    assert scene.reference.speed_limit == 13.0


def test_speed_limit_is_never_below_the_speed(tmp_path: Path) -> None:
    slow, unknown = np.full(10, 8.0, np.float32), np.full(10, np.nan, np.float32)
    assert _scene(_write(tmp_path, "slow", lane_speed_limit=slow)).reference.speed_limit == pytest.approx(11.0)
    assert _scene(_write(tmp_path, "unknown", lane_speed_limit=unknown)).reference.speed_limit == 15.0


def test_red_light_governs_its_lane_while_red(scene: Scene) -> None:
    reference = scene.reference
    assert reference.red_active.tolist() == [[True] * 11 + [False] * 40]
    assert reference.red_on_route.tolist() == [True]
    assert shapely.Polygon(reference.red_xy).area == pytest.approx(30 * 3.5)


def test_observation_shows_the_street_as_it_is_now(scene: Scene) -> None:
    seen = scene.observation
    np.testing.assert_allclose(seen.ego_history[-1], [0, 0, 0, 11, 0, 0.5, 0.11, 0.01], atol=1e-4)
    np.testing.assert_allclose(seen.ego_history[0, 3], 10.25, atol=1e-4)
    # Walker at 92 m and the box that is not there yet are missing; the car that will leave stands still.
    assert seen.agents_type.tolist() == [0, 0, 0]
    np.testing.assert_allclose(seen.agents[0, -1], [56 - 79.539, 3.5, 0, 8, 0], atol=1e-4)
    assert seen.agents_valid.all()
    assert np.ptp(seen.agents[1, :, 0]) == 0
    assert not seen.agents[1, :, 3:].any()
    red = [seen.map_xy[seen.map_offsets[m]] for m in np.flatnonzero(seen.map_red)]
    np.testing.assert_allclose(red, [[120 - 79.539, 0]], atol=1e-4)
    assert seen.map_speed_limit.max() == 13.0
    kinds = set(seen.map_type.tolist())
    assert kinds == {int(kind) for kind in MapElement}
    assert np.hypot(*seen.map_xy.T).max() <= 80.0
    np.testing.assert_allclose(seen.route_xy[[0, -1]], [[0, 0], [100, 0]], atol=1e-4)
    assert seen.command == Command.STRAIGHT


def test_agent_lost_now_is_not_seen_though_it_comes_back(tmp_path: Path) -> None:
    arrays = _agents()
    arrays["agents_valid"][0] = True
    arrays["agents_valid"][0, START - 1 : START + 3] = False
    scene = _scene(_write(tmp_path, **arrays))
    assert len(scene.observation.agents) == 2
    assert scene.reference.agent_valid[0].all()


def test_command_follows_the_route_not_the_path_driven(tmp_path: Path) -> None:
    ego = _arrays()["ego"]
    ego[:, 0] += 25.0
    left = _scene(_write(tmp_path, ego=ego, route_lane=np.array([0, 9], np.int32))).observation
    assert left.command == Command.LEFT
    assert left.route_xy[-1, 1] > 60.0


def test_observation_holds_nothing_of_the_future(scene: Scene, tmp_path: Path) -> None:
    rng, changed = np.random.default_rng(3), _arrays()
    after = slice(START + 1, None)
    for key in ("agents_x", "agents_y", "agents_heading", "agents_vx", "agents_vy"):
        changed[key] = changed[key] + 0.0
        changed[key][:, after] = rng.normal(scale=30.0, size=changed[key][:, after].shape)
    changed["agents_valid"][:, after] = rng.random(changed["agents_valid"][:, after].shape) < 0.7
    changed["ego"][after, :2] += rng.normal(scale=3.0, size=(STEPS - START - 1, 2))
    changed["ego"][after, 2:] += rng.normal(scale=1.0, size=(STEPS - START - 1, 3))
    changed["tl_state"][:, after] = 3
    changed["route_xy"] = rng.normal(size=(60, 2))
    other = _scene(_write(tmp_path, **changed))
    for name in Observation.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(other.observation, name), getattr(scene.observation, name), err_msg=name)
    assert np.abs(other.reference.human_poses - scene.reference.human_poses).max() > 1.0
    assert other.reference.ego_init[5] != scene.reference.ego_init[5]


def test_starts_are_those_asked_for(tmp_path: Path) -> None:
    _write(tmp_path)
    wanted = {"recommended": [20], "moving": [20, 40], "all": [20, 25, 40]}
    for starts, indices in wanted.items():
        tokens = [item.token for item in import_recordings(tmp_path, starts=starts)]  # type: ignore[arg-type]
        assert tokens == [f"street__{i:03d}" for i in indices]


def test_workers_change_nothing(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        _write(tmp_path, name)
    _write(tmp_path, "broken", ego=None)
    one, two = (list(import_recordings(tmp_path, starts="moving", workers=n)) for n in (1, 2))
    assert [item.token for item in one] == ["a__020", "a__040", "b__020", "b__040", "broken", "c__020", "c__040"]
    assert [item.token for item in two] == [item.token for item in one]
    assert isinstance(two[0], Scene)
    assert isinstance(one[0], Scene)
    np.testing.assert_array_equal(two[0].reference.map_xy, one[0].reference.map_xy)


def _bowtie() -> dict[str, Any]:
    """Boundaries of lane 1 swapped halfway, so that its ring crosses itself."""
    arrays: dict[str, Any] = {}
    lines: list[list[Any]] = [[_beside(c, s * w) for c, w in zip(CENTERS, HALF_WIDTHS, strict=True)] for s in (1, -1)]
    lines[0][1], lines[1][1] = np.array([[0, 5.25], [120, 1.75]]), np.array([[0, 1.75], [120, 5.25]])
    for key, chosen in zip(("lane_left", "lane_right"), lines, strict=True):
        _pack(arrays, key, chosen)
    return arrays


def test_ring_that_crosses_itself_becomes_a_band_about_the_centreline(tmp_path: Path) -> None:
    lane, _ = _lane_at(_scene(_write(tmp_path, **_bowtie())), 110, 4.5)
    assert lane.contains(shapely.LineString([[1, 3.5], [119, 3.5]]))


def _single_points() -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    _pack(arrays, "lane", [[c[0]] if n == 1 else c for n, c in enumerate(CENTERS)])
    return arrays


def _nowhere(key: str) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    _pack(arrays, key, [])
    return {**arrays, "drivable_poly": np.zeros(0, int), "drivable_hole": np.zeros(0, int)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ego": None}, "lacks the key 'ego'"),
        ({"lane_type": np.full(10, 3, np.uint8)}, "map is empty: no lane"),
        (_nowhere("drivable"), "map is empty: no drivable area"),
        (_single_points(), "lane 1 is degenerate"),
        ({"lane_xy": np.full_like(_arrays()["lane_xy"], np.nan)}, "lane_xy holds a value that is not finite"),
        ({"agents_valid": np.ones(7, bool)}, "agents_valid has shape"),
        ({"route_lane": np.array([55])}, "cannot be used"),
        ({"lane_succ": np.array([[0, 99]])}, "names a lane outside"),
        ({"agents_type": np.zeros(1, np.int8)}, "agents_type must hold"),
        ({"agents_type": np.full_like(_arrays()["agents_type"], 9)}, "of the numbers 0, 1, 2, 3"),
        ({"edge_xy": 1e6 * _arrays()["edge_xy"]}, "edge_xy spans"),
        ({"info": {"dt": 0.5}}, "samples must be 0.1 s apart"),
        ({"info": {"dataset": "elsewhere"}}, "'elsewhere' is unknown"),
        ({"lane_off": np.array([0, 5])}, "lane_off must rise"),
        ({"agents_size": np.array([{"a": 1}], dtype=object)}, "not a complete NPZ archive of plain arrays"),
    ],
)
def test_unusable_recordings_are_refused_with_the_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    (item,) = import_recording(_write(tmp_path, **changes), "recommended")
    assert isinstance(item, Refused)
    assert item.token == "street"
    assert reason in item.reason


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_archive_is_refused_and_the_rest_imported(tmp_path: Path, share: float) -> None:
    _write(tmp_path, "good")
    cut = _write(tmp_path, "cut").with_suffix(".npz")
    content = cut.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    bad, good = import_recordings(tmp_path, starts="recommended")
    assert isinstance(bad, Refused)
    assert bad.token == "cut"
    assert "cut.npz" in bad.reason
    assert isinstance(good, Scene)
    assert good.token == "good__020"


def test_ego_that_is_not_finite_refuses_only_the_starts_that_need_it(tmp_path: Path) -> None:
    ego = _arrays()["ego"]
    ego[START + 60, 0] = np.nan
    items = import_recording(_write(tmp_path, ego=ego), "moving")
    assert [type(item) for item in items] == [Scene, Refused]
    assert items[1] == Refused("street__040", "the ego track holds a value that is not finite")


def test_ego_far_from_its_route_and_starts_too_early_are_refused(tmp_path: Path) -> None:
    ego = _arrays()["ego"]
    ego[:, 1] += 60.0
    (item,) = import_recording(_write(tmp_path, ego=ego), "recommended")
    assert isinstance(item, Refused)
    assert "no lane of the route lies within 10 m" in item.reason
    (early,) = import_recording(_write(tmp_path, info={"recommended_start_indices": [5]}), "recommended")
    assert isinstance(early, Refused)
    assert early.token == "street__005"
    assert "needs samples -13" in early.reason


def test_folder_lists_recordings_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no recordings"):
        recording_paths(tmp_path)
    _write(tmp_path, "whole")
    (tmp_path / "usable_starts.json").write_text(json.dumps({"starts": {}}))
    _write(tmp_path, "half").with_suffix(".npz").unlink()
    _write(tmp_path, "nameless").unlink()
    assert [path.stem for path in recording_paths(tmp_path)] == ["half", "nameless", "whole"]
    half, nameless, whole = import_recordings(tmp_path, starts="recommended")
    assert isinstance(half, Refused)
    assert half.reason == "half.npz is missing"
    assert isinstance(nameless, Refused)
    assert "nameless.json is not readable" in nameless.reason
    assert isinstance(whole, Scene)
