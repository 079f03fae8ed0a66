"""What the world is: scenes, their store, the procedural generator and the importers.

Letters used in names and docstrings throughout the project: ``S`` scenes, ``G`` samples per scene
(`num_generations`), ``N = S*G`` rollouts, scene-major (row n belongs to scene ``n // G``), ``T`` future poses (8 at
2 Hz), ``L`` action tokens (16), ``V`` vocabulary, ``K`` decode steps, ``A`` agents, ``C`` reward components.
Frame: rear axle at t=0, x forward, y left, heading counter-clockwise; metres, seconds, radians.
"""

from rlhf_drive.scenes.model import (
    HISTORY_TIMES_S,
    REFERENCE_STEPS,
    AgentType,
    Command,
    MapElement,
    MapLayer,
    Observation,
    Scene,
    SceneReference,
)
from rlhf_drive.scenes.trajectories import (
    NUM_POSES,
    POSE_DT_S,
    Trajectories,
    to_ego_frame,
    to_world_frame,
    wrap_angle,
)

__all__ = [
    "HISTORY_TIMES_S",
    "NUM_POSES",
    "POSE_DT_S",
    "REFERENCE_STEPS",
    "AgentType",
    "Command",
    "MapElement",
    "MapLayer",
    "Observation",
    "Scene",
    "SceneReference",
    "Trajectories",
    "to_ego_frame",
    "to_world_frame",
    "wrap_angle",
]
