"""Metric caches of both versions against the golden scenes they were made of, and every way a cache can be wrong."""

from __future__ import annotations

import itertools
import json
import lzma
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from oracles.navsim_files import STAND, metric_cache, road_user, tracks

from rewards.epdms import score_epdms
from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rewards.prepare_epdms import prepare_epdms
from rlhf_drive.errors import DataError
from rlhf_drive.scenes import MapElement, MapLayer, Observation, Scene, SceneReference, to_ego_frame
from rlhf_drive.scenes.importers.navsim import import_navsim
from rlhf_drive.scenes.importers.navsim_cache import NavsimCache, read_navsim_cache
from rlhf_drive.scenes.importers.navsim_files import navsim_cache_files
from rlhf_drive.scenes.importers.recorded import Refused
from rlhf_drive.scenes.importers.vectors import VectorScene, read_vector
from rlhf_drive.scenes.store import SceneStore, write_scenes

VERSIONS = ("v1.1", "v2.2")
TOKENS = (
    "pub_curve_101",
    "pub_intersection_left_turn_102",
    "pub_oncoming_narrow_103",
    "pub_straight_multilane_100",
)


def folder_of(navsim: Path, version: str) -> Path:
    return navsim / "metric_caches" / version.replace(".", "_")


def golden(navsim: Path, token: str) -> tuple[VectorScene, dict[str, object]]:
    path = navsim / "golden" / f"{token}.scene.json"
    return read_vector(path), json.loads(path.read_text())


def cache_of(navsim: Path, version: str, token: str) -> NavsimCache:
    return read_navsim_cache(folder_of(navsim, version) / "log" / "unknown" / token / "metric_cache.pkl")


def written(folder: Path, ref: SceneReference, version: str, token: str = "token", **options: object) -> Path:
    path = folder / "log" / "unknown" / token / "metric_cache.pkl"
    return STAND.dump(path, metric_cache(ref, version, token=token, **options))


def check_reference(cache: NavsimCache, ref: SceneReference, agent_tokens: list[str]) -> None:
    """Everything that a cache of its version holds equals `ref` to rounding."""
    mine, steps = cache.reference, 51 if cache.version == "v1.1" else 41
    assert mine.t0_us == ref.t0_us
    assert np.isnan(mine.speed_limit)
    for name in ("ego_init", "centerline", "map_xy"):
        np.testing.assert_allclose(getattr(mine, name), getattr(ref, name), rtol=0, atol=2e-9, err_msg=name)
    for name in ("map_offsets", "map_layer", "map_on_route"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(ref, name), err_msg=name)
    kept = np.flatnonzero(ref.agent_valid[:, :steps].any(axis=1))
    assert sorted(cache.agent_tokens) == sorted(agent_tokens[a] for a in kept)
    rows = np.array([cache.agent_tokens.index(agent_tokens[a]) for a in kept], dtype=np.int64)
    valid = ref.agent_valid[kept].copy()
    valid[:, steps:] = False
    np.testing.assert_array_equal(mine.agent_valid[rows], valid)
    turn = np.abs(np.angle(np.exp(1j * (mine.agent_pose[rows] - ref.agent_pose[kept])[..., 2])))
    assert np.max(turn[valid], initial=0.0) < 1e-8
    gap = np.abs(mine.agent_pose[rows] - ref.agent_pose[kept])[..., :2]
    assert np.max(gap[valid], initial=0.0) < 2e-9
    np.testing.assert_allclose(mine.agent_size[rows], ref.agent_size[kept], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(mine.agent_type[rows], ref.agent_type[kept])
    moving = ref.agent_type[kept] != 3
    first = (np.arange(len(kept)), valid.argmax(axis=1))
    speed = np.abs(mine.agent_velocity[rows][first] - ref.agent_velocity[kept][first])[moving]
    assert np.max(speed, initial=0.0) < 1e-9
    assert np.all(mine.agent_velocity[rows][first][~moving] == 0.0)
    planned = {"v1.1": ("pdm_reference_v1", "pdm_reference_v2"), "v2.2": ("pdm_reference_v2", "pdm_reference_v1")}
    same, empty = planned[cache.version]
    np.testing.assert_allclose(getattr(mine, same), getattr(ref, same), rtol=0, atol=2e-9)
    assert getattr(mine, empty).shape == (0, 3)


def check_past_and_human(mine: SceneReference, ref: SceneReference) -> None:
    np.testing.assert_array_equal(mine.past_times_us, ref.past_times_us)
    np.testing.assert_allclose(mine.past_states, ref.past_states, rtol=0, atol=2e-9)
    np.testing.assert_allclose(mine.prev_ego_init, ref.past_states[2], rtol=0, atol=2e-9)
    assert mine.prev_t0_us == ref.past_times_us[2]
    np.testing.assert_array_equal(mine.human_poses, ref.human_poses)


def check_lights(mine: SceneReference, ref: SceneReference) -> None:
    """Lights on the route that are red within the 41 steps, whatever their order."""

    def lit(some: SceneReference) -> set[tuple[bytes, bytes]]:
        shapes = np.split(some.red_xy, some.red_offsets[1:-1]) if len(some.red_on_route) else []
        rows = zip(shapes, some.red_active[:, :41], some.red_on_route, strict=True)
        return {(xy.tobytes(), active.tobytes()) for xy, active, on_route in rows if on_route and active.any()}

    assert lit(mine) == lit(ref)
    assert mine.red_on_route.all()
    assert not mine.red_active[:, 41:].any()


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("version", VERSIONS)
def test_sample_caches_equal_the_golden_scenes(navsim_golden: Path, version: str, token: str) -> None:
    cache = cache_of(navsim_golden, version, token)
    vector, info = golden(navsim_golden, token)
    assert (cache.version, cache.token, cache.synthetic) == (version, token, False)
    assert cache.log == (token if version == "v2.2" else "log")
    assert list(cache.map_tokens) == [element["token"] for element in info["map"]]
    check_reference(cache, vector.reference, [agent["token"] for agent in info["agents"]])
    check_lights(cache.reference, vector.reference if version == "v2.2" else without_lights(vector.reference))
    if version == "v2.2":
        check_past_and_human(cache.reference, vector.reference)
    else:
        shapes = [getattr(cache.reference, name).shape for name in ("past_states", "past_times_us", "human_poses")]
        assert shapes == [(0, 11), (0,), (0, 3)]
        assert (cache.reference.prev_ego_init.shape, cache.reference.prev_t0_us) == ((0,), 0)


def without_lights(ref: SceneReference) -> SceneReference:
    return replace(
        ref,
        red_xy=np.zeros((0, 2)),
        red_offsets=np.zeros(1, dtype=np.int64),
        red_on_route=np.zeros(0, dtype=bool),
        red_active=np.zeros((0, 51), dtype=bool),
    )


@pytest.mark.parametrize("token", TOKENS)
def test_sample_caches_give_the_golden_pdms(navsim_golden: Path, token: str) -> None:
    vector, _ = golden(navsim_golden, token)
    expected = np.load(navsim_golden / "golden" / f"{token}.golden.npz")["v1_pdms"]
    mine = score_pdms(prepare_scene(cache_of(navsim_golden, "v1.1", token).reference), vector.candidates)
    theirs = score_pdms(prepare_scene(vector.reference), vector.candidates)
    np.testing.assert_allclose(mine.pdms, expected, rtol=0, atol=1e-6)
    for name in ("nc", "dac", "ttc", "c", "ddc"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)
    np.testing.assert_allclose(mine.ep, theirs.ep, rtol=0, atol=1e-9)


@pytest.mark.parametrize("token", TOKENS)
def test_sample_caches_give_the_golden_epdms(navsim_golden: Path, token: str) -> None:
    vector, _ = golden(navsim_golden, token)
    expected = np.load(navsim_golden / "golden" / f"{token}.golden.npz")["v2_epdms"]
    reference = cache_of(navsim_golden, "v2.2", token).reference
    mine = score_epdms(prepare_epdms(reference), vector.candidates, vector.prev_candidates)
    theirs = score_epdms(prepare_epdms(vector.reference), vector.candidates, vector.prev_candidates)
    np.testing.assert_allclose(mine.epdms, expected, rtol=0, atol=1e-6)
    for name in ("nc", "dac", "ddc", "tlc", "ttc", "lk", "hc", "ec"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_golden_scene_survives_being_written_as_a_cache(
    navsim_golden: Path, tmp_path: Path, version: str
) -> None:
    """The other golden scenes, red lights, parked cars and late arrivals among them, by stand-in classes."""
    red = 0
    for path in sorted((navsim_golden / "golden").glob("*.scene.json")):
        ref, info = read_vector(path).reference, json.loads(path.read_text())
        names = [agent["token"] for agent in info["agents"]]
        cache = read_navsim_cache(written(tmp_path, ref, version, path.stem, agent_tokens=names))
        check_reference(cache, ref, names)
        if version == "v2.2":
            check_past_and_human(cache.reference, ref)
            check_lights(cache.reference, ref)
            red += len(cache.reference.red_on_route)
    assert red == (1 if version == "v2.2" else 0)  # as many as are on the route in all golden scenes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_older_protocols_and_names_of_numpy_1(navsim_golden: Path, tmp_path: Path, protocol: int) -> None:
    vector, _ = golden(navsim_golden, "pub_curve_101")
    path = tmp_path / "log" / "unknown" / "t" / "metric_cache.pkl"
    STAND.dump(path, metric_cache(vector.reference, "v2.2"), protocol)
    if protocol < 4:
        data = lzma.decompress(path.read_bytes())
        assert b"numpy._core" in data
        path.write_bytes(lzma.compress(data.replace(b"numpy._core", b"numpy.core")))
    cache = read_navsim_cache(path)
    check_reference(cache, vector.reference, [f"trk{a}" for a in range(len(vector.reference.agent_type))])
    check_past_and_human(cache.reference, vector.reference)


def some_reference(navsim_golden: Path) -> SceneReference:
    return golden(navsim_golden, "pub_curve_101")[0].reference


def test_synthetic_scenes_have_no_human(navsim_golden: Path, tmp_path: Path) -> None:
    ref = replace(some_reference(navsim_golden), human_poses=np.zeros((0, 3)))
    cache = read_navsim_cache(written(tmp_path, ref, "v2.2"))
    assert (cache.synthetic, cache.reference.human_poses.shape) == (True, (0, 3))


def test_what_appears_once_and_later_is_scored_but_not_seen(navsim_golden: Path, tmp_path: Path) -> None:
    """NAVSIM puts a track with a single annotation at every step; if that is 3 s ahead, no policy may see it now."""
    ref = some_reference(navsim_golden)
    later = {"trk0": ref.t0_us + 3_000_000}
    assert ref.agent_valid[[0, 2], 0].all()
    for version in VERSIONS:
        path = written(tmp_path / version, ref, version, first_us=later)
        cache = read_navsim_cache(path)
        assert "trk0" in cache.agent_tokens
        assert cache.reference.agent_valid[cache.agent_tokens.index("trk0"), 0]
        assert "trk0" not in cache.seen[-1].tokens
        assert "trk2" in cache.seen[-1].tokens


def test_v2_caches_keep_what_overlaps_the_ego_at_t0(navsim_golden: Path, tmp_path: Path) -> None:
    """Log replay drops it when it scores, so the cache's agents all arrive."""
    ref = some_reference(navsim_golden)
    pose = ref.agent_pose.copy()
    pose[0] = ref.ego_init[:3]
    cache = read_navsim_cache(written(tmp_path, replace(ref, agent_pose=pose), "v2.2"))
    np.testing.assert_allclose(cache.reference.agent_pose[0, :41, :2], pose[0, :41, :2], atol=1e-9)


def test_v2_caches_show_the_agents_before_t0(navsim_golden: Path, tmp_path: Path) -> None:
    ref = some_reference(navsim_golden)
    past = [tracks([road_user(ref, f"trk{a}", a, k, ref.t0_us) for a in (2, 3)]) for k in (3, 2, 1)]
    path = written(tmp_path, ref, "v2.2", past=past)
    (scene,) = import_navsim(path)
    assert isinstance(scene, Scene)
    observation = scene.observation
    assert observation.agents_valid.sum(axis=0).tolist() == [2, 2, 2, len(observation.agents)]
    rows = np.flatnonzero(observation.agents_valid[:, 0])
    for (row, a), (column, k) in itertools.product(zip(rows, (2, 3), strict=True), enumerate((3, 2, 1, 0))):
        want = to_ego_frame(ref.agent_pose[a, k], ref.ego_init[:3])
        np.testing.assert_allclose(observation.agents[row, column, :3], want, atol=2e-5)


def test_observation_of_a_cache_alone(navsim_golden: Path) -> None:
    """Hand-checked against the golden past: straight-ahead coordinates, speeds, and who is there now."""
    token = "pub_intersection_left_turn_102"
    ref = golden(navsim_golden, token)[0].reference
    for version in VERSIONS:
        (scene,) = import_navsim(folder_of(navsim_golden, version) / "log" / "unknown" / token / "metric_cache.pkl")
        assert isinstance(scene, Scene)
        seen = scene.observation
        vx, vy = ref.ego_init[3:5]
        if version == "v1.1":
            np.testing.assert_allclose(seen.ego_history[0], [-1.5 * vx, -1.5 * vy, 0, vx, vy, 0, 0, 0], atol=1e-5)
        else:
            np.testing.assert_allclose(
                seen.ego_history[:, :3], to_ego_frame(ref.past_states[:, :3], ref.ego_init[:3]), atol=1e-5
            )
            np.testing.assert_allclose(seen.ego_history[:, 3:7], ref.past_states[:, 3:7], atol=1e-6)
        np.testing.assert_allclose(seen.ego_history[-1, 3:7], ref.ego_init[3:7], atol=1e-6)
        here = to_ego_frame(ref.agent_pose[:, 0], ref.ego_init[:3])
        near = np.flatnonzero(np.hypot(here[:, 0], here[:, 1]) <= 80.0)
        np.testing.assert_allclose(seen.agents[:, -1, :3], here[near], atol=1e-5)
        assert seen.agents_valid.tolist() == [[False, False, False, True]] * len(near)
        assert seen.command == 0  # the centreline turns left
        assert np.hypot(*seen.route_xy[0]) < 0.2
        np.testing.assert_allclose(np.hypot(*np.diff(seen.route_xy, axis=0).T), 2.5, atol=0.06)
        assert (seen.map_type[seen.map_on_route] == MapElement.LANE_CONNECTOR_CENTER).sum() == 1
        assert not seen.map_red.any()
        assert np.hypot(*seen.map_xy.T).max() < 90.0
        assert (seen.map_speed_limit == 0).all()


def test_road_edges_have_road_on_one_side_only(navsim_golden: Path) -> None:
    """Against shapely's union of the drivable polygons: every edge point lies on its boundary, none inside."""
    for token in TOKENS:
        cache = cache_of(navsim_golden, "v2.2", token)
        (scene,) = import_navsim(folder_of(navsim_golden, "v2.2") / "log/unknown" / token / "metric_cache.pkl")
        assert isinstance(scene, Scene)
        ref, seen = cache.reference, scene.observation
        layers = (MapLayer.ROADBLOCK, MapLayer.INTERSECTION, MapLayer.DRIVABLE_AREA, MapLayer.CARPARK_AREA)
        shapes = np.split(ref.map_xy, ref.map_offsets[1:-1])
        union = shapely.union_all(
            [shapely.Polygon(xy) for xy, layer in zip(shapes, ref.map_layer, strict=True) if layer in layers],
            grid_size=1e-3,
        )
        rings = [seen.map_xy[a:b] for a, b in itertools.pairwise(seen.map_offsets)]
        edges = [xy for xy, kind in zip(rings, seen.map_type, strict=True) if kind == MapElement.ROAD_EDGE]
        middle = np.concatenate([(xy[1:] + xy[:-1]) / 2.0 for xy in edges]).astype(np.float64)
        cos, sin = np.cos(ref.ego_init[2]), np.sin(ref.ego_init[2])
        world = middle @ np.array([[cos, sin], [-sin, cos]]) + ref.ego_init[:2]
        assert len(world) > 50
        assert shapely.distance(union.boundary, shapely.points(world)).max() < 2e-3
        drawn = shapely.multipoints(world)
        near = union.boundary.intersection(shapely.Point(ref.ego_init[:2]).buffer(60.0)).segmentize(1.0)
        assert max(drawn.distance(shapely.Point(xy)) for xy in shapely.get_coordinates(near)) < 2.6


def test_red_light_on_the_route_is_seen_where_the_route_enters_it(navsim_golden: Path, tmp_path: Path) -> None:
    (path,) = (navsim_golden / "golden").glob("pub_red_light_*.scene.json")
    ref, info = read_vector(path).reference, json.loads(path.read_text())
    assert ref.red_on_route.tolist() == [light["on_route"] for light in info["red_lights"]]
    ids = [element["token"] for element in info["map"]]
    cache = metric_cache(ref, "v2.2", map_tokens=ids)
    tokens = [light["token"] for light in info["red_lights"]]
    for names, _ in cache.observation._occupancy_maps_tl:
        names[:] = [tokens[int(name.rpartition("_")[2]) - 900] for name in names]
    (scene,) = import_navsim(STAND.dump(tmp_path / "a" / "b" / "c" / "metric_cache.pkl", cache))
    assert isinstance(scene, Scene)
    seen = scene.observation
    assert ref.red_active[ref.red_on_route, 0].any()
    red = np.flatnonzero(seen.map_red)
    assert len(red) == 1
    assert seen.map_on_route[red[0]]
    start = seen.map_xy[seen.map_offsets[red[0]]].astype(np.float64)
    cos, sin = np.cos(ref.ego_init[2]), np.sin(ref.ego_init[2])
    world = np.array([[cos, -sin], [sin, cos]]) @ start + ref.ego_init[:2]
    shapes = np.split(ref.red_xy, ref.red_offsets[1:-1])
    connector = shapely.union_all([shapely.Polygon(shapes[r]) for r in np.flatnonzero(ref.red_on_route)])
    assert connector.boundary.distance(shapely.Point(world)) < 2.5
    assert seen.map_type[red[0]] == MapElement.LANE_CONNECTOR_CENTER


def test_holes_and_parts_of_polygons_keep_their_inside(navsim_golden: Path, tmp_path: Path) -> None:
    """A car park with an island and an intersection of two parts: the scorer's answer equals shapely's."""
    ref = some_reference(navsim_golden)
    x, y = ref.ego_init[:2]
    island = shapely.Polygon(
        shapely.box(x - 50, y - 50, x + 50, y + 50).exterior, [shapely.box(x - 30, y - 20, x + 30, y + 20).exterior]
    )
    parts = shapely.MultiPolygon([shapely.box(x, y, x + 8, y + 8), shapely.box(x + 20, y, x + 28, y + 8)])
    high = shapely.Polygon([(x, y, 5.0), (x + 30, y, 5.0), (x, y + 30, 5.0)])
    cache = metric_cache(ref, "v1.1")
    layer = STAND.SemanticMapLayer
    ids, layers, shapes, capacity = cache.drivable_area_map.args
    area = STAND.PDMDrivableMap(
        [*ids, "a", "b", "c", "stop"],
        [*layers, layer(15), layer(1), layer(17), layer(2)],
        [*shapes, island, parts, high, high],
        capacity,
    )
    cache.drivable_area_map = area
    mine = read_navsim_cache(STAND.dump(tmp_path / "a" / "b" / "t" / "metric_cache.pkl", cache))
    assert mine.map_tokens[-3:] == ("a", "b", "c")  # the scorer knows no stop lines
    from rlhf_drive.scenes.importers.navsim_map import in_ring

    points = np.random.default_rng(0).uniform(-60, 60, (4000, 2)) + np.array([x, y])
    rings = np.split(mine.reference.map_xy, mine.reference.map_offsets[1:-1])
    for ring, shape in zip(rings[-3:], (island, parts, high), strict=True):
        inside = shapely.contains(shape, shapely.points(points))
        assert inside.sum() > 5
        np.testing.assert_array_equal(in_ring(points, ring), inside)


def test_time_and_place_of_the_reference_are_the_official_ones(navsim_golden: Path, tmp_path: Path) -> None:
    """A planner's trajectory on its own clock, 30 ms late: the query is clipped to its first state, then linear."""
    ref = some_reference(navsim_golden)
    cache = metric_cache(ref, "v1.1")
    (states,) = cache.trajectory.args
    for state in states:
        state._time_point.values["time_us"] += 30_000
    mine = read_navsim_cache(STAND.dump(tmp_path / "a" / "b" / "t" / "metric_cache.pkl", cache))
    planned = ref.pdm_reference_v1
    np.testing.assert_allclose(mine.reference.pdm_reference_v1[0], planned[0], atol=1e-9)
    want = planned[3] + 0.7 * (planned[4] - planned[3])
    np.testing.assert_allclose(mine.reference.pdm_reference_v1[4], want, atol=2e-6)


def test_heading_of_the_reference_turns_the_short_way(navsim_golden: Path, tmp_path: Path) -> None:
    """From 3.1 to -3.1 rad through pi, half a step on."""
    ref = some_reference(navsim_golden)
    cache = metric_cache(ref, "v1.1")
    (states,) = cache.trajectory.args
    for k, state in enumerate(states):
        state._time_point.values["time_us"] += 50_000
        state._car_footprint.rear_axle.values["heading"] = np.float64(3.1 if k % 2 else -3.1)
    mine = read_navsim_cache(STAND.dump(tmp_path / "a" / "b" / "t" / "metric_cache.pkl", cache))
    heading = mine.reference.pdm_reference_v1[1:, 2]
    np.testing.assert_allclose(np.cos(heading), -1.0, atol=1e-9)


def test_a_road_block_called_like_a_route_lane_is_not_on_the_route(navsim_golden: Path, tmp_path: Path) -> None:
    ref = some_reference(navsim_golden)
    cache = metric_cache(ref, "v1.1", map_tokens=["7"] * len(ref.map_layer))
    mine = read_navsim_cache(STAND.dump(tmp_path / "a" / "b" / "t" / "metric_cache.pkl", cache)).reference
    lanes = np.isin(ref.map_layer, (MapLayer.LANE, MapLayer.LANE_CONNECTOR))
    assert 0 < lanes.sum() < len(lanes)
    np.testing.assert_array_equal(mine.map_on_route, lanes)


@pytest.mark.parametrize(("version", "other"), [VERSIONS, VERSIONS[::-1]])
def test_cache_of_the_other_version_is_named(navsim_golden: Path, version: str, other: str) -> None:
    path = folder_of(navsim_golden, version) / "log" / "unknown" / "pub_curve_101" / "metric_cache.pkl"
    with pytest.raises(DataError) as caught:
        read_navsim_cache(path, version=other)
    assert str(caught.value).startswith(
        f"{path}: is a metric cache of NAVSIM {version}, not {other}. Ask for {version}"
    )
    items = list(import_navsim(folder_of(navsim_golden, version), version=other))
    assert [type(item) for item in items] == [Refused] * 4
    with pytest.raises(DataError, match=r"NAVSIM 'v3' has no metric cache"):
        read_navsim_cache(path, version="v3")  # type: ignore[arg-type]


def test_truncated_caches(navsim_golden: Path, tmp_path: Path) -> None:
    """Cut in the lzma stream, and cut before it was compressed."""
    source = folder_of(navsim_golden, "v1.1") / "log" / "unknown" / "pub_curve_101" / "metric_cache.pkl"
    data, path = source.read_bytes(), tmp_path / "metric_cache.pkl"
    for size in np.linspace(0, len(data) - 1, 25).astype(int):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"metric_cache\.pkl: (truncated|damaged)"):
            read_navsim_cache(path)
    plain = lzma.decompress(data)
    for size in np.linspace(0, len(plain) - 1, 25).astype(int):
        path.write_bytes(lzma.compress(plain[:size], preset=0))
        with pytest.raises(DataError, match=r"metric_cache\.pkl: cut off or damaged at byte"):
            read_navsim_cache(path)


def test_hostile_and_foreign_files_among_good_ones_become_refusals(navsim_golden: Path, tmp_path: Path) -> None:
    shutil.copytree(folder_of(navsim_golden, "v1.1"), tmp_path / "cache")
    where = tmp_path / "cache" / "log" / "unknown"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    (where / TOKENS[0] / "metric_cache.pkl").write_bytes(lzma.compress(pickle.dumps({"a": Payload()})))
    (where / TOKENS[1] / "metric_cache.pkl").write_bytes(lzma.compress(pickle.dumps({"a": 1})))
    (where / TOKENS[2] / "metric_cache.pkl").write_bytes(b"PK\x03\x04 no cache")
    items = {item.token: item for item in import_navsim(tmp_path / "cache")}
    assert isinstance(items[TOKENS[3]], Scene)
    reasons = {token: item.reason for token, item in items.items() if isinstance(item, Refused)}
    assert "posix.system" in reasons[TOKENS[0]]
    assert "holds a dict, not a MetricCache" in reasons[TOKENS[1]]
    assert "not an lzma file" in reasons[TOKENS[2]]
    for token, reason in reasons.items():
        assert reason.startswith(str(where / token / "metric_cache.pkl"))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"centerline": None}, "a NoneType where a PDMPath belongs"),
        ({"observation": 5}, "its observation is no PDMObservation"),
        ({"route_lane_ids": 5}, "a int where an array belongs"),
        ({"drivable_area_map": STAND.PDMDrivableMap(["a"], [], [], 10)}, "ids, layers and outlines do not match"),
        ({"human_trajectory": STAND.Trajectory(poses=np.zeros((7, 3)))}, r"human poses of shape \[7, 3\]"),
        ({"past_human_trajectory": STAND.InterpolatedTrajectory([])}, "a trajectory of 0 states"),
        ({"ego_state": STAND.EgoState(_time_point=None)}, "its EgoState lacks _dynamic_car_state"),
        ({"current_tracked_objects": []}, "0 frames of current objects"),
        ({"scene_type": 0}, "a int where a SceneFrameType belongs"),
        ({"timepoint": STAND.TimePoint(time_us=10**30)}, "a int where a number belongs"),
        ({"route_lane_ids": [["1"]]}, "a list where a name belongs"),
        ({"route_lane_ids": np.array(1.0)}, "a PickledArray where an array belongs"),
        ({"human_trajectory": STAND.Trajectory(poses=[[0.0] * 3] * 8)}, "a list of human poses"),
        ({"ego_state": STAND.EgoState(_dynamic_car_state=1, _car_footprint=2)}, "'int' object has no attribute"),
    ],
)
def test_caches_that_are_not_as_navsim_writes_them(
    navsim_golden: Path, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    path = written(tmp_path, some_reference(navsim_golden), "v2.2", **changes)
    with pytest.raises(DataError, match=reason) as caught:
        read_navsim_cache(path)
    assert str(caught.value).startswith(f"{path}: is no metric cache of NAVSIM v2.2 that can be scored: ")


@pytest.mark.filterwarnings("ignore:invalid value encountered in linearrings")
def test_caches_with_numbers_that_are_none(navsim_golden: Path, tmp_path: Path) -> None:
    ref = some_reference(navsim_golden)
    state, center, xy = ref.ego_init.copy(), ref.centerline.copy(), ref.map_xy.copy()
    state[3], center[2, 0], xy[4, 1] = np.nan, np.inf, np.nan
    for bad in ({"ego_init": state}, {"centerline": center}):
        broken = metric_cache(ref, "v1.1")
        if "ego_init" in bad:
            broken.ego_state._dynamic_car_state._rear_axle_velocity_2d.values["_x"] = np.float64("nan")
        else:
            broken.centerline.args[0][2].values["x"] = np.float64("inf")
        with pytest.raises(DataError, match=r"(nan|inf) where a number belongs"):
            read_navsim_cache(STAND.dump(tmp_path / "metric_cache.pkl", broken))
    broken = metric_cache(ref, "v1.1")
    broken.drivable_area_map.args[2][0] = shapely.Polygon([(0, 0), (1, np.nan), (1, 1)])
    with pytest.raises(DataError, match="a polygon with a coordinate that is not finite"):
        read_navsim_cache(STAND.dump(tmp_path / "metric_cache.pkl", broken))
    broken = metric_cache(ref, "v1.1")
    broken.observation._occupancy_maps.pop()
    with pytest.raises(DataError, match="_occupancy_maps of 50 steps, where 51 belong"):
        read_navsim_cache(STAND.dump(tmp_path / "metric_cache.pkl", broken))
    broken = metric_cache(ref, "v1.1")
    broken.centerline.args[0][1:] = []
    with pytest.raises(DataError, match="centerline needs at least two"):
        read_navsim_cache(STAND.dump(tmp_path / "metric_cache.pkl", broken))


def test_scenes_without_agents_or_lights(navsim_golden: Path, tmp_path: Path) -> None:
    ref = some_reference(navsim_golden)
    none = np.zeros(0, dtype=np.int64)
    bare = replace(
        ref,
        **{
            f"agent_{name}": getattr(ref, f"agent_{name}")[none]
            for name in ("pose", "velocity", "valid", "size", "type")
        },
    )
    for version in VERSIONS:
        (scene,) = import_navsim(written(tmp_path / version, bare, version))
        assert isinstance(scene, Scene)
        assert scene.reference.agent_pose.shape == (0, 51, 3)
        assert scene.observation.agents.shape == (0, 4, 5)


def metadata(folder: Path, lines: list[str], name: str = "metadata_node_0.csv") -> None:
    (folder / "metadata").mkdir(exist_ok=True)
    (folder / "metadata" / name).write_text("\n".join(["file_name", *lines]) + "\n")


@pytest.fixture
def caches(navsim_golden: Path, tmp_path: Path) -> Path:
    """A copy of the v1.1 caches whose place in the file system nobody has written down yet."""
    shutil.copytree(folder_of(navsim_golden, "v1.1"), tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "metadata")
    return tmp_path / "moved"


def paths_of(caches: Path) -> dict[str, Path]:
    return {token: caches / "log" / "unknown" / token / "metric_cache.pkl" for token in TOKENS}


@pytest.mark.parametrize("how", ["absolute", "relative", "cwd", "stale", "windows", "two files", "none"])
def test_metadata_paths_lead_to_the_caches(caches: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    lines = {
        "absolute": [str(path) for path in paths_of(caches).values()],
        "relative": [f"log/unknown/{token}/metric_cache.pkl" for token in TOKENS],
        "cwd": [f"moved/log/unknown/{token}/metric_cache.pkl" for token in TOKENS],
        "stale": [f"/gone/exp/cache/log/unknown/{token}/metric_cache.pkl" for token in TOKENS],
        "windows": [f'"C:\\exp\\log\\unknown\\{token}\\metric_cache.pkl"' for token in TOKENS],
    }
    if how == "cwd":
        monkeypatch.chdir(caches.parent)
    if how in lines:
        metadata(caches, lines[how])
    elif how == "two files":
        metadata(caches, lines["absolute"][:2])
        metadata(caches, [*lines["stale"][2:], lines["relative"][0]], "metadata_node_1.csv")
    found = navsim_cache_files(caches)
    assert [token for token, _ in found] == list(TOKENS)
    assert {token: path.resolve() for token, path in found} == paths_of(caches)


def test_metadata_that_leads_nowhere(caches: Path) -> None:
    metadata(caches, ["/gone/log/unknown/absent/metric_cache.pkl", str(paths_of(caches)[TOKENS[0]])])
    with pytest.raises(DataError, match=r"1 of 2 metric caches that .* lists are missing.*the first is /gone/log"):
        navsim_cache_files(caches)
    metadata(caches, ["/gone/log/unknown/absent/features.gz"])
    with pytest.raises(DataError, match=r"lists '/gone/log/unknown/absent/features\.gz', which is no path"):
        navsim_cache_files(caches)


def test_two_caches_of_one_token(caches: Path) -> None:
    twin = caches / "other" / "unknown" / TOKENS[0] / "metric_cache.pkl"
    twin.parent.mkdir(parents=True)
    shutil.copy(paths_of(caches)[TOKENS[0]], twin)
    with pytest.raises(DataError, match=rf"Token '{TOKENS[0]}' has two metric caches"):
        navsim_cache_files(caches)
    metadata(caches, [f"/gone/log/unknown/{TOKENS[0]}/metric_cache.pkl"])
    with pytest.raises(DataError, match=rf"Token '{TOKENS[0]}' has two metric caches"):
        navsim_cache_files(caches)
    metadata(caches, [str(twin)])
    assert navsim_cache_files(caches) == [(TOKENS[0], twin)]
    metadata(caches, [f"other/unknown/{TOKENS[0]}/metric_cache.pkl"])
    assert navsim_cache_files(caches) == [(TOKENS[0], twin)]
    metadata(caches, [str(twin), str(paths_of(caches)[TOKENS[0]])])
    with pytest.raises(DataError, match=rf"Token '{TOKENS[0]}' is listed with two metric caches"):
        navsim_cache_files(caches)


def test_folders_without_caches(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        navsim_cache_files(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no metric cache"):
        navsim_cache_files(tmp_path)


def test_import_is_an_iterator_and_the_same_from_processes(navsim_golden: Path) -> None:
    folder = folder_of(navsim_golden, "v2.2")
    items = import_navsim(folder)
    first = next(items)
    alone = [first, *items]
    spread = list(import_navsim(folder, workers=2))
    assert [item.token for item in alone] == [token for token, _ in navsim_cache_files(folder)]
    for a, b in zip(alone, spread, strict=True):
        assert isinstance(a, Scene)
        assert isinstance(b, Scene)
        assert pickle.dumps(a) == pickle.dumps(b)
        assert (a.kind, a.challenging) == ("navsim", False)


def test_scenes_of_caches_survive_the_store(navsim_golden: Path, tmp_path: Path) -> None:
    scenes = [scene for scene in import_navsim(folder_of(navsim_golden, "v1.1")) if isinstance(scene, Scene)]
    write_scenes(tmp_path / "store", scenes, split_of={s.token: "train" for s in scenes}, info={})
    for a, b in zip(scenes, SceneStore.open(tmp_path / "store"), strict=True):
        assert isinstance(b.observation, Observation)
        np.testing.assert_array_equal(a.reference.agent_pose, b.reference.agent_pose)
        assert b.reference.human_poses.shape == (0, 3)
        assert b.reference.past_states.shape == (0, 11)
        assert b.reference.prev_ego_init.shape == (0,)
