"""The command: tables of 80 columns, and JSON."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from rlhf_drive.cli_estimate import estimate
from rlhf_drive.errors import ConfigError, UnknownNameError

APP = typer.Typer()
APP.command()(estimate)
WAM = (
    *("policy.d_model=1024", "policy.num_heads=16", "policy.decoder_layers=24", "policy.num_experts=64"),
    *("policy.expert_dim=1024", "parallel.strategy=fsdp2", "parallel.precision=bfloat16"),
)


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(APP, [*arguments, "--no-measure"], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ("quickstart",),
            ("quickstart", "--gpu", "H100", "--sweep"),
            ("quickstart", *WAM, "--gpu", "H200", "--sweep"),
        ),
        (
            "quickstart",
            *WAM,
            "--gpu",
            "H100",
            "--gpus",
            "64",
            "--workers",
            "16",
            "rollout.engine=ray",
            "rollout.gpus_per_worker=1",
        ),
    ],
)
def test_tables_fit_into_80_columns(arguments: tuple[str, ...]) -> None:
    lines = _run(*arguments).splitlines()
    assert len(lines) > 8
    assert max(map(len, lines)) <= 80


def test_json_holds_what_the_table_says() -> None:
    found = json.loads(_run("quickstart", "--gpu", "A100", "--gpus", "8", "--scenes", "1000000", "--json"))
    prediction = found["prediction"]
    assert found["layout"]["trainers"] == 8
    assert prediction["scenes_per_s"] == pytest.approx(32 / prediction["step_s"])
    assert prediction["params"]["trained"] < prediction["params"]["encoder"] + prediction["params"]["decoder"] + 10**6
    assert found["workload"]["scenes"] == 10**6


def test_a_policy_that_does_not_fit_is_told_so() -> None:
    table = _run("quickstart", *WAM[:-2], "--gpu", "L40S")
    assert "warning: a training process needs" in table
    assert "fsdp2" in table


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Unknown GPU"):
        _run("quickstart", "--gpu", "H1000")
    with pytest.raises(ConfigError, match="max_stepz"):
        _run("quickstart", "rl.max_stepz=3")
