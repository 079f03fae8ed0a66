"""What reading a large store costs: memory, seconds to open, microseconds a scene, beside all scenes held in a list.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/bench_streaming.py [--scenes 100000] [--small 20000]
        [--made 200] [--steps 200] [--folder /tmp]

A few scenes are generated and written; their record batches are repeated under new tokens and clusters until the store
is as large as asked for, about 53 kB a scene, and everything is removed at the end. The smaller store is made of the
first files of the larger one. Each measurement is a process of its own: it opens the store, then takes random scenes,
32 a step, and makes their network inputs, with a cache of 16 MiB, small enough to be full before the end. `memory` is
the growth of anonymous memory, which no file backs, from before opening; pages of mapped files are the kernel's to drop
and do not count. `cold` is measured after asking the kernel to drop the files' pages.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCH, SHARD = 32, 512
FEATURE_BYTES = 16 * 2**20
READS = 1000
KB, MB, GB = 2**10, 2**20, 2**30


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KB
    raise RuntimeError("this kernel does not report RssAnon")


def build(folder: Path, made: int, count: int) -> None:
    """A store of `count` scenes, which repeats those of a small one."""
    import pyarrow as pa

    from rlhf_drive.scenes.generator import generate_scenes
    from rlhf_drive.scenes.manifest import Manifest, Shard, file_sha256
    from rlhf_drive.scenes.store import write_scenes

    scenes = list(generate_scenes(made, seed=0))
    template = folder.with_name(f"{folder.name}-made")
    write_scenes(template, scenes, split_of={s.token: "train" for s in scenes}, info={}, shard_size=10**9)
    with (template / "scenes-00000.arrow").open("rb") as file:
        table = pa.ipc.open_stream(file).read_all()
    folder.mkdir(parents=True)
    shards = []
    for first in range(0, count, SHARD):
        rows = np.arange(first, min(first + SHARD, count))
        path = folder / f"scenes-{len(shards):05d}.arrow"
        with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            for start in range(0, len(rows), BATCH):
                writer.write_table(_renamed(table, rows[start : start + BATCH], count), max_chunksize=BATCH)
        shards.append(Shard(path.name, len(rows), path.stat().st_size, file_sha256(path)))
    Manifest({"train": count - count // 10, "heldout": count // 10}, tuple(shards), {}).write(folder)
    shutil.rmtree(template)


def _renamed(table: Any, rows: np.ndarray, count: int) -> Any:
    """Scenes `rows` of the large store: a row of the small one each, with a token and a cluster of its own."""
    import pyarrow as pa

    part = table.take(pa.array(rows % len(table))).combine_chunks()
    split = ["heldout" if row >= count - count // 10 else "train" for row in rows]
    for name, values in (
        ("token", [f"scene-{row:09d}" for row in rows]), ("cluster", [f"log-{row // 40:07d}" for row in rows]),
        ("split", split),
    ):  # fmt: skip
        part = part.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(values))
    return part


def first_part(folder: Path, smaller: Path, count: int) -> None:
    """A store of the first files of another one, which takes no room of its own."""
    content = json.loads((folder / "scenes.json").read_text())
    shards = content["shards"][: count // SHARD]
    smaller.mkdir()
    for shard in shards:
        os.link(folder / shard["file"], smaller / shard["file"])
    total = sum(shard["count"] for shard in shards)
    content |= {"shards": shards, "count": total, "splits": {"train": total, "heldout": 0}}
    (smaller / "scenes.json").write_text(json.dumps(content))


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the files' pages; it does where no process maps them."""
    for path in folder.glob("*.arrow"):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(number)


def work(folder: Path, way: str, steps: int) -> dict[str, float]:
    """One process's measurements; `way` is `split` or `list`."""
    import torch

    from rlhf_drive.config import load_recipe
    from rlhf_drive.policies.feature_cache import FeatureCache
    from rlhf_drive.scenes.store import SceneStore
    from rlhf_drive.training.build import build_policy
    from rlhf_drive.training.schedule import scene_order

    policy = build_policy(load_recipe("quickstart"), torch.device("cpu"))
    features = FeatureCache(FEATURE_BYTES)
    features.batch(policy, [SceneStore.open(folder, verify=False)[0]])  # what is imported on the way is not at issue
    gc.collect()
    started, before = time.perf_counter(), anonymous()
    store = SceneStore.open(folder)
    found = {"scenes": float(len(store)), "open_s": time.perf_counter() - started}
    scenes: Sequence[Any] = store.split("train")
    if way == "list":
        scenes = [store[i] for i in store.indices("train")]
    found["start_s"] = time.perf_counter() - started
    found["opened_mb"] = (anonymous() - before) / MB
    for step in range(steps):
        features.batch(policy, [scenes[i] for i in scene_order(0, step, len(scenes), BATCH)])
        if step == steps // 2:
            half = anonymous()
    found["memory_mb"], found["late_growth_mb"] = (anonymous() - before) / MB, (anonymous() - half) / MB
    found["features_mb"] = features.nbytes / MB
    return found


def reads(folder: Path) -> dict[str, float]:
    """Microseconds per scene, read at random: pages on disk, in memory, scene kept; and by going over them in order.

    Of this thread, except for `cold`, which also waits for the disk.
    """
    from rlhf_drive.scenes.store import SceneStore

    store = SceneStore.open(folder)
    split = store.split("train")
    drop_pages(folder)
    index = np.random.default_rng(0).choice(len(split), READS, replace=False).tolist()
    found = {}
    for name, chosen in (("cold", index), ("warm", index), ("kept", [index[-1]] * READS), ("order", range(READS))):
        if name == "warm":
            split = store.split("train")
        clock = time.perf_counter if name == "cold" else time.thread_time
        started = clock()
        for i in chosen:
            scene = split[i]
            scene.reference.agent_pose.sum() + scene.reference.map_xy.sum()  # touches the pages
        found[f"{name}_us"] = 1e6 * (clock() - started) / READS
    started = time.thread_time()
    len(set(split.clusters))
    found["clusters_us"] = 1e6 * (time.thread_time() - started) / len(split)
    return found


def choices(count: int, steps: int) -> dict[str, float]:
    """Milliseconds per step for choosing 32 scenes of `count` and 8 more, in both modes, and memory."""
    from rlhf_drive.training.visiting import SceneVisits

    found, before = {}, anonymous()
    for mode in ("uniform", "informative"):
        for seen in (False, True):
            visits = SceneVisits(mode, count, 0)
            if seen:
                for first in range(0, count, 1000):
                    visits.saw(0, range(first, min(first + 1000, count)), [False] * min(1000, count - first))
            visits.choose(0, 32)
            started = time.thread_time()
            for step in range(steps):
                chosen = visits.choose(step, 32)
                chosen += visits.choose(step, 8, set(chosen))
                visits.saw(step, chosen, [True] * len(chosen))
            found[f"{mode}_{'later' if seen else 'first_pass'}_ms"] = 1e3 * (time.thread_time() - started) / steps
    found["memory_mb"] = (anonymous() - before) / MB
    return found


def in_process(*arguments: str) -> dict[str, float]:
    """A measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(name: str, found: dict[str, float]) -> None:
    print(f"{name:28}" + "  ".join(f"{key} {value:,.4g}" for key, value in found.items()), flush=True)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Build, measure, print."""
    large, small, steps = folder / "large", folder / "small", str(options.steps)
    started = time.perf_counter()
    build(large, options.made, options.scenes)
    first_part(large, small, options.small)
    size = sum(path.stat().st_size for path in large.iterdir())
    print(f"{options.scenes:,} scenes, {size / GB:.2f} GB, made in {time.perf_counter() - started:.0f} s")
    for store in (large, small):  # as if it had been made a while ago: what was verified is noted
        for path in store.glob("*.arrow"):
            os.utime(path, (1e9, 1e9))
    first = in_process("work", str(large), "split", "1")
    show("large, first start", first)
    time.sleep(max(0.0, 61.0 - (time.perf_counter() - started)))
    in_process("work", str(large), "split", "1")
    in_process("work", str(small), "split", "1")
    runs = {}
    for store, way in ((large, "split"), (small, "split"), (small, "list")):
        runs[store, way] = in_process("work", str(store), way, steps)
        show(f"{store.name}, {way}", runs[store, way])
    new, base, old = runs.values()
    show("reads, large", found := in_process("reads", str(large)))
    show("choosing of a million", in_process("choices", "1000000", "300"))
    times = new["scenes"] / base["scenes"]
    million = {key: (new[key] - base[key]) / (new["scenes"] - base["scenes"]) * 1e6 for key in ("opened_mb", "open_s")}
    listed = {key: old[key] / old["scenes"] * 1e6 for key in ("opened_mb", "start_s")}
    ratios = {
        "memory after opening, list / split": old["opened_mb"] / base["opened_mb"],
        "memory after the steps, list / split": old["memory_mb"] / base["memory_mb"],
        f"memory after the steps, {times:.1f} times the scenes": new["memory_mb"] / base["memory_mb"],
        "seconds to open, verifying / verified": first["open_s"] / new["open_s"],
        "seconds to the first scene, list / split": old["start_s"] / base["start_s"],
        "read, cold / warm": found["cold_us"] / found["warm_us"],
        "read, warm / kept": found["warm_us"] / found["kept_us"],
    }
    for name, value in ratios.items():
        print(f"  {name:45}{value:8.2f}")
    print(f"a million scenes: split {million['opened_mb']:.0f} MB, {million['open_s']:.1f} s; "
          f"list {listed['opened_mb'] / KB:.1f} GB, {listed['start_s']:.0f} s")  # fmt: skip


def main() -> None:
    """Run the benchmark, or one of its processes."""
    if sys.argv[1:2] == ["work"]:
        print(json.dumps(work(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
    elif sys.argv[1:2] == ["reads"]:
        print(json.dumps(reads(Path(sys.argv[2]))))
    elif sys.argv[1:2] == ["choices"]:
        print(json.dumps(choices(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, value in (("scenes", 100_000), ("small", 20_000), ("made", 200), ("steps", 200)):
            parser.add_argument(f"--{name}", type=int, default=value)
        parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
        options = parser.parse_args()
        with tempfile.TemporaryDirectory(prefix="bench-streaming-", dir=options.folder) as name:
            measure(Path(name), options)


if __name__ == "__main__":
    main()
