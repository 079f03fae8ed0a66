"""A reward that a server computes: start one, score plans through it, stop it.

Run it from anywhere::

    python examples/remote_reward.py

docs/rewards.md has the protocol. A recipe names the server so::

    reward:
      terms:
        - {name: pdms, weight: 0.8, options: {}}
        - {name: remote, weight: 0.2, options: {url: "http://127.0.0.1:8000/score", batch_size: 128}}
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from rewards import LocalRewardService, RewardSpec, Scores, build_reward
from rewards.pdm_closed import attach_references
from rlhf_drive.scenes import Trajectories
from rlhf_drive.scenes.generator import generate_scenes


def clearance(request: dict[str, Any]) -> dict[str, Any]:
    """The server's work: how far each plan stays from where the others are now, 10 m and more being 1."""
    rewards: list[float | None] = []
    reasons: list[str | None] = []
    for row in request["rows"]:
        others = [agent["state"][:2] for agent in request["scenes"][row["scene"]]["agents"]]
        path = np.array(row["poses"])[:, None, :2]
        if others:
            nearest = float(np.linalg.norm(path - np.array(others)[None], axis=2).min())
            rewards.append(min(1.0, nearest / 10.0))
        else:
            rewards.append(None)  # null: not scored, which is not a zero
        reasons.append(None if others else "nobody else is there")
    return {"version": 1, "rewards": rewards, "reasons": reasons}


class ScoringServer(BaseHTTPRequestHandler):
    """Answers POST requests by :func:`clearance`."""

    def do_POST(self) -> None:
        """One batch of plans."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps(clearance(request)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


def main(count: int = 4, seed: int = 0) -> Scores:
    """Score the human's plan and one at half its speed in each of `count` scenes, print and return the scores."""
    scenes = [attach_references(scene) for scene in generate_scenes(count, seed=seed)]
    plans = np.stack([scene.reference.human_poses * factor for scene in scenes for factor in (1.0, 0.5)])
    server = ThreadingHTTPServer(("127.0.0.1", 0), ScoringServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        options: dict[str, object] = {"url": f"http://127.0.0.1:{server.server_port}/score", "batch_size": 3}
        terms = [RewardSpec("pdms", weight=0.8), RewardSpec("remote", weight=0.2, options=options)]
        with LocalRewardService(build_reward(terms)) as service:
            scores = service.score(scenes, Trajectories(plans, np.arange(2 * count) // 2))
    finally:
        server.shutdown()
        server.server_close()
    print(f"{'scene':24}{'pdms':>8}{'remote':>8}{'total':>8}")
    for row in range(2 * count):
        values = (scores.component("pdms")[row], scores.component("remote")[row], scores.total[row])
        reason = str(scores.failures.get(row, ""))
        print(f"{scenes[row // 2].kind:24}{''.join(f'{value:8.3f}' for value in values)}  {reason}".rstrip())
    return scores


if __name__ == "__main__":
    main()
