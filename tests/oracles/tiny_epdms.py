"""The tiny scenes with what EPDMS needs besides: the reference of v2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oracles.tiny_scene import make_reference, straight_plan
from rewards.prepare_epdms import PreparedEpdms, prepare_epdms
from rlhf_drive.scenes import SceneReference

COLUMNS = ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec", "epdms")
PLAN = straight_plan(10.0)[None]
"""``[1, 8, 3]`` straight on at the speed that the ego has."""


def reference(**options: Any) -> SceneReference:
    """Options of :func:`oracles.tiny_scene.make_reference`."""
    made = make_reference(**options)
    return replace(made, pdm_reference_v2=made.pdm_reference_v1)


def prepared(**options: Any) -> PreparedEpdms:
    """Options of :func:`oracles.tiny_scene.make_reference`."""
    return prepare_epdms(reference(**options))
