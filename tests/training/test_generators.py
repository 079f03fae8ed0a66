"""Every generator that a user's function may draw from goes on where it was."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from rlhf_drive.training.generators import generator_states, kept_generators, restore_generators, seed_generators


def draws() -> list[float]:
    """Several numbers of each kind: normal ones leave half a pair behind in NumPy and in Python."""
    found = [float(torch.rand(())), float(torch.randn(())), random.random(), random.gauss(0, 1)]
    return [*found, float(np.random.rand()), float(np.random.standard_normal())]  # noqa: NPY002


def test_all_go_on_where_they_were_after_a_way_through_a_file() -> None:
    with kept_generators():
        seed_generators(7)
        draws()
        file = io.BytesIO()
        torch.save(generator_states(), file)
        expected = [draws() for _ in range(3)]
        seed_generators(8)
        assert draws() != expected[0]
        file.seek(0)
        restore_generators(torch.load(file, weights_only=True))  # no code of anybody's is run
        assert [draws() for _ in range(3)] == expected


def test_a_seed_gives_the_same_numbers_and_another_one_others() -> None:
    with kept_generators():
        found = []
        for seed in (3, 4, 3, 2**32 + 3):
            seed_generators(seed)
            found.append(draws())
    assert found[0] == found[2]
    assert all(a != b for a, b in zip(found[0], found[1], strict=True))
    assert found[3][:4] != found[0][:4]  # NumPy takes 32 bits, the others take all


def test_kept_generators_leave_no_trace() -> None:
    with kept_generators():
        seed_generators(5)
        expected = draws()
        seed_generators(5)

        @kept_generators()
        def drawing() -> None:
            seed_generators(6)
            draws()

        drawing()
        assert draws() == expected


def test_what_a_state_lacks_stays() -> None:
    with kept_generators():
        seed_generators(5)
        older = {"torch": generator_states()["torch"]}
        expected = draws()
        seed_generators(5)
        torch.rand(3)
        restore_generators(older)
        assert draws() == expected
