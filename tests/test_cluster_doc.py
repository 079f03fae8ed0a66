"""What docs/cluster.md and the Slurm examples name exists: recipe keys, options, files; and the scripts parse."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from typer.main import get_command

from rlhf_drive.cli import app
from rlhf_drive.config import load_recipe
from rlhf_drive.training.build import sft_settings

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "cluster.md").read_text("utf-8")
SCRIPTS = [ROOT / "examples" / name for name in ("slurm.sh", "slurm_ray.sh")]


def launcher_options() -> set[str]:
    """Options of torchrun."""
    return {name for action in get_args_parser()._actions for name in action.option_strings}


def train_options() -> set[str]:
    """Options of `rlhf-drive train`."""
    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    return {name for parameter in train.params for name in parameter.opts}


def test_the_page_names_keys_and_files_that_exist() -> None:
    recipe = dataclasses.asdict(load_recipe("quickstart", []))
    sections = "|".join(section for section, keys in recipe.items() if isinstance(keys, dict))
    named = re.findall(rf"`({sections})\.(\w+)", DOC)
    assert len(named) >= 10
    assert [f"{section}.{key}" for section, key in named if key not in recipe[section]] == []
    linked = re.findall(r"\]\(([^)#]+)", DOC) + re.findall(r"`(tests/[\w/.]+)`", DOC)
    assert [path for path in linked if not (ROOT / "docs" / path).exists() and not (ROOT / path).exists()] == []


def test_the_page_names_options_that_exist() -> None:
    for command in re.findall(r"`(torchrun [^`]+)`", DOC) + re.findall(r"^(torchrun .+)$", DOC, re.MULTILINE):
        launcher, _, ours = command.partition(" -m rlhf_drive.cli ")
        assert ours.startswith("train "), command
        assert set(re.findall(r"--[\w-]+", launcher)) <= launcher_options(), command
        assert set(re.findall(r"--[\w-]+", ours)) <= train_options(), command
    ray = re.findall(r"`rlhf-drive train ([^`]+)`", DOC)
    assert set(re.findall(r"--[\w-]+", " ".join(ray))) == {"--ray", "--processes", "--gpus-per-process"}
    assert {"--ray", "--processes", "--gpus-per-process", "--cpus-per-process"} <= train_options()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_parse_and_call_what_exists(script: Path) -> None:
    text = script.read_text("utf-8")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    launcher = re.search(r"torchrun (?=--|\\)(.*?)-m rlhf_drive\.cli", text, re.DOTALL)
    assert launcher is not None
    assert set(re.findall(r"--[\w-]+", launcher[1])) <= launcher_options()
    usage = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert (usage.returncode, usage.stderr.split(" ")[0]) == (2, "usage:")


def given_in(script: Path, folder: Path) -> list[str]:
    """Recipe and overrides of the command in a script's head, with a folder of recordings that exists."""
    usage = re.search(rf"#   sbatch examples/{script.name} (.*?)\n#\n", script.read_text("utf-8"), re.DOTALL)
    assert usage is not None
    return usage[1].replace("\\\n#", "").replace("/data/recordings", str(folder)).split()


def test_a_step_has_work_for_all_processes_of_the_script(tmp_path: Path) -> None:
    name, *own = given_in(SCRIPTS[0], tmp_path)
    settings = sft_settings(load_recipe(name, own))
    settings.check_processes(2 * 8)
    assert len(settings.micro_batches()) % 16 == 0


def test_the_ray_script_sets_keys_that_fit_together(tmp_path: Path) -> None:
    text = SCRIPTS[1].read_text("utf-8")
    given = re.search(r"train \"\$@\"(.*?)\n    \)", text, re.DOTALL)
    assert given is not None
    values = {"$OUTPUT_DIR": "/x", "$SLURM_JOB_ID": "7", "$((others * GPUS_PER_NODE))": "16", "$REWARD_WORKERS": "32"}
    overrides = given[1]
    for name, value in values.items():
        overrides = overrides.replace(name, value)
    name, *own = given_in(SCRIPTS[1], tmp_path)
    recipe = load_recipe(name, [*own, *overrides.replace('"', "").split()])
    assert (recipe.rollout.engine, recipe.rollout.workers, recipe.rollout.gpus_per_worker) == ("ray", 16, 1.0)
    assert (recipe.reward.engine, recipe.reward.workers, recipe.ray.address) == ("ray", 32, "auto")
    assert recipe.name == "slurm-7"
