"""Worker processes on Ray, whatever they do: joining a cluster, actors, a pool that replaces those that fail."""

from rlhf_drive.workers.actor import RayActor, WorkerInfo, WorkerLostError, import_ray
from rlhf_drive.workers.cluster import Connection, connect, wait_for_exit
from rlhf_drive.workers.loop import DispatchLoop
from rlhf_drive.workers.pool import Loss, Owner, Slot, Worker, WorkerPool

__all__ = [
    "Connection",
    "DispatchLoop",
    "Loss",
    "Owner",
    "RayActor",
    "Slot",
    "Worker",
    "WorkerInfo",
    "WorkerLostError",
    "WorkerPool",
    "connect",
    "import_ray",
    "wait_for_exit",
]
