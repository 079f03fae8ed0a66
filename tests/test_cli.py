"""The command line: what it prints, what it refuses, and that it starts fast."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_drive.cli import main
from rlhf_drive.cli_policies import find_policies
from rlhf_drive.config import Recipe, dump_recipe, load_recipe, read_recipe_text
from rlhf_drive.errors import ConfigError, TrainingError
from rlhf_drive.scenes.generator import generate_scenes
from rlhf_drive.scenes.store import write_scenes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` sets when it is absent, so that it is gone again after each test."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


class Result:
    """Exit code and output of one command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        self.code = stopped.value.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of six generated scenes of six kinds, two of them held out."""
    path = tmp_path_factory.mktemp("cli") / "store"
    scenes = [replace(scene, token=f"s{i}", cluster=f"s{i}") for i, scene in enumerate(generate_scenes(6, seed=1))]
    splits = {scene.token: "heldout" if i < 2 else "train" for i, scene in enumerate(scenes)}
    info = {"source": "generate", "refused": {"s6": "the map is empty"}}
    write_scenes(path, scenes, split_of=splits, info=info)
    return path


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Recipe, Path | None]]:
    """Stands for the training pipeline; collects what it is called with."""
    calls: list[tuple[Recipe, Path | None]] = []

    def run(recipe: Recipe, *, resume: Path | None = None) -> Path:
        calls.append((recipe, resume))
        if recipe.seed == 13:
            raise TrainingError("The loss is nan at step 3.")
        (tmp_path / "report.html").write_text("")
        return tmp_path

    module: Any = types.ModuleType("rlhf_drive.training.pipeline")
    module.run = run
    monkeypatch.setitem(sys.modules, "rlhf_drive.training.pipeline", module)
    return calls


def _checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "policy.json").write_text("{}")
    return folder


def test_help_and_validation_start_fast_and_load_no_torch() -> None:
    for arguments in (["--help"], ["validate", "quickstart"], ["rewards", "list"]):
        script = (
            f"import sys\nfrom rlhf_drive.cli import main\ntry:\n    main({arguments!r})\n"
            "finally:\n    print('torch' in sys.modules, 'numba' in sys.modules, file=sys.stderr)"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr.strip() == "False False"
        assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0


def test_recipes_are_listed_shown_and_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listed = Result(capsys, "recipes", "list").out.splitlines()
    assert [line.split()[0] for line in listed][:2] == ["compare", "quickstart"]
    assert len(listed) == 11
    assert Result(capsys, "recipes", "show", "rl").out == read_recipe_text("rl")
    target = tmp_path / "mine.yaml"
    assert Result(capsys, "recipes", "copy", "rl", str(target)).code == 0
    assert target.read_text() == read_recipe_text("rl")
    target.write_text("mine")
    again = Result(capsys, "recipes", "copy", "rl", str(target))
    assert (again.code, target.read_text()) == (2, "mine")
    assert "nothing is overwritten" in again.err
    assert Result(capsys, "recipes", "copy", "rl", str(tmp_path)).code == 0
    assert (tmp_path / "rl.yaml").read_text() == read_recipe_text("rl")


def test_a_wrong_recipe_is_one_message_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(
        capsys, "validate", "quickstart", "rl.max_step=3", "reward.terms[0].name=pdm", "scenes.kinds=[cutin]"
    )
    lines = result.err.splitlines()
    assert result.code == 2
    assert lines[0] == "Error: Recipe quickstart has 3 problems:"
    assert lines[1] == "  rl.max_step: unknown key. Did you mean 'rl.max_steps'?"
    assert "Unknown reward 'pdm' in reward.terms[0].name. Did you mean 'pdms'?" in lines[2]
    assert "scenes.kinds[0]: unknown situation kind 'cutin'. Did you mean 'cut_in'?" in lines[3]
    assert len(lines) == 4
    assert result.out == ""


def test_a_wrong_reward_option_and_file_are_found_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("def gentle(inputs, *, limit: float = 1.0):\n    return inputs.pdms['pdms']\n")
    term = f"reward.terms[0].name={plugin}:gentle"
    assert Result(capsys, "validate", "quickstart", term, "reward.terms[0].options.limit=2").code == 0
    wrong = Result(capsys, "validate", "quickstart", term, "reward.terms[0].options.limt=2")
    assert wrong.code == 2
    assert "Did you mean 'limit'?" in wrong.err
    absent = Result(capsys, "validate", "quickstart", f"reward.terms[0].name={tmp_path}/no.py:gentle")
    assert absent.code == 2
    assert f"there is no file {tmp_path}/no.py" in absent.err


def test_an_objective_of_ones_own_is_looked_at_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("def loss(inputs, denominators): ...\ndef above(inputs): ...\n")
    good = (f"rl.loss_type={plugin}:loss", f"rl.advantages={plugin}:above")
    assert Result(capsys, "validate", "quickstart", *good).code == 0
    wrong = Result(capsys, "validate", "quickstart", f"rl.loss_type={plugin}:above", f"rl.advantages={plugin}:abov")
    assert wrong.code == 2
    assert f"rl.loss_type = '{plugin}:above' takes (inputs), but is called with (inputs, denominators)" in wrong.err
    assert "rl.advantages" in wrong.err.splitlines()[2]
    absent = Result(capsys, "validate", "quickstart", f"rl.loss_type={tmp_path}/no.py:loss")
    assert (absent.code, "there is no file" in absent.err) == (2, True)


def test_adapters_without_their_package_are_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Result(capsys, "validate", "quickstart", "rl.lora_rank=4").code == 0
    monkeypatch.setattr("rlhf_drive.cli_check.find_spec", lambda name: None)
    assert "rl.lora_rank: LoRA needs the package peft" in Result(capsys, "validate", "quickstart", "rl.lora_rank=4").err


def test_validate_says_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(capsys, "validate", "quickstart", "output_dir=out", "name=mine")
    assert (result.code, result.out) == (0, "quickstart is valid: job pipeline, run folder out/mine\n")


def test_train_runs_the_recipe_with_overrides_and_says_where(
    capsys: pytest.CaptureFixture[str], pipeline: list[tuple[Recipe, Path | None]], tmp_path: Path
) -> None:
    result = Result(capsys, "train", "quickstart", "rl.max_steps=7", "seed=3")
    assert pipeline == [(load_recipe("quickstart", ["rl.max_steps=7", "seed=3"]), None)]
    assert result.out.splitlines()[-1] == f"Run folder: {tmp_path} (report: {tmp_path}/report.html)"


def test_resume_takes_the_recipe_of_the_run(
    capsys: pytest.CaptureFixture[str], pipeline: list[tuple[Recipe, Path | None]], tmp_path: Path
) -> None:
    recipe = load_recipe("quickstart", ["rl.max_steps=9"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert Result(capsys, "train", "--resume", str(tmp_path)).code == 0
    assert pipeline == [(recipe, tmp_path)]
    assert "Name a recipe" in Result(capsys, "train").err


def test_resume_takes_nothing_else(
    capsys: pytest.CaptureFixture[str], pipeline: list[tuple[Recipe, Path | None]], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart")))
    for more in ("rl.max_steps=8", "quickstart"):
        assert "takes no recipe and no overrides" in Result(capsys, "train", "--resume", str(tmp_path), more).err
    assert "there is no run folder" in Result(capsys, "train", "--resume", str(tmp_path / "nope")).err
    assert pipeline == []


def test_an_error_while_training_is_one_message(
    capsys: pytest.CaptureFixture[str], pipeline: list[tuple[Recipe, Path | None]]
) -> None:
    result = Result(capsys, "train", "quickstart", "seed=13")
    assert (result.code, result.err) == (2, "Error: The loss is nan at step 3.\n")


def test_compare_becomes_a_recipe_of_all_policies_of_the_runs(
    capsys: pytest.CaptureFixture[str], pipeline: list[tuple[Recipe, Path | None]], tmp_path: Path, store: Path
) -> None:
    run = tmp_path / "run.1"
    for stage in ("rl-seed1", "sft", "rl-seed0"):
        _checkpoint(run / stage / "policy")
    (run / "recipe.yaml").write_text("")
    out = tmp_path / "new" / "report"
    result = Result(
        capsys, "compare", str(run), "--scenes", str(store), "--out", str(out), "--set", "compare.samples=2"
    )
    assert result.code == 0
    recipe = pipeline[0][0]
    assert list(recipe.compare.policies.items()) == [
        (stage, str(run / stage / "policy")) for stage in ("sft", "rl-seed0", "rl-seed1")
    ]
    assert (recipe.job, recipe.compare.samples, recipe.scenes.store) == ("compare", 2, str(store))
    assert Path(recipe.output_dir) / recipe.name == out
    out.mkdir(parents=True)
    again = Result(capsys, "compare", str(run), "--scenes", str(store), "--out", str(out))
    assert again.code == 2
    assert "exists already" in again.err


def test_policies_are_named_after_their_run_or_as_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _checkpoint(tmp_path / name / "sft" / "policy")
        (tmp_path / name / "recipe.yaml").write_text("")
    single = _checkpoint(tmp_path / "single")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert list(find_policies([a, b])) == ["a-sft", "b-sft"]
    assert find_policies([f"old={b}", f"mine={single}"]) == {"old-sft": tmp_path / "b/sft/policy", "mine": single}
    assert list(find_policies([str(single)])) == ["single"]
    assert list(find_policies([str(tmp_path / "a/sft/policy")])) == ["sft"]
    with pytest.raises(ConfigError, match="Two policies are called 'single'"):
        find_policies([str(single), f"single={single}"])
    with pytest.raises(ConfigError, match="There is no folder"):
        find_policies([str(tmp_path / "absent")])
    with pytest.raises(ConfigError, match="holds no trained policy"):
        find_policies([str(tmp_path)])


def test_scenes_info_counts_by_kind_and_split(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    result = Result(capsys, "scenes", "info", str(store))
    rows = [line.split() for line in result.out.splitlines()]
    cells = {row[1]: [cell for cell in row[2:] if cell != "│"] for row in rows if len(row) > 5}
    assert cells["all"] == ["4", "2", "0"]
    assert cells["curve"] == ["0", "1", "0"]
    assert "refused: 1" in result.out
    assert "refused s6: the map is empty" in result.out


def test_scenes_show_draws_the_scene_that_is_named(
    capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path
) -> None:
    from PIL import Image

    out = tmp_path / "scene.png"
    by_token = Result(capsys, "scenes", "show", str(store), "--scene", "s3", "--out", str(out), "--size", "300")
    assert by_token.out == f"Scene s3: {out}\n"
    first = out.read_bytes()
    with Image.open(out) as picture:
        assert picture.size == (300, 300)
    Result(capsys, "scenes", "show", str(store), "--scene", "3", "--out", str(out), "--size", "300")
    assert out.read_bytes() == first
    Result(capsys, "scenes", "show", str(store), "--scene", "4", "--out", str(out), "--size", "300")
    assert out.read_bytes() != first
    assert (
        "holds 6, counted from 0" in Result(capsys, "scenes", "show", str(store), "--scene", "6", "--out", "x.png").err
    )
    unknown = Result(capsys, "scenes", "show", str(store), "--scene", "s33", "--out", "x.png")
    assert unknown.code == 2
    assert "Did you mean 's3'?" in unknown.err


def test_a_folder_that_is_no_store_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = Result(capsys, "scenes", "info", str(tmp_path))
    assert result.code == 2
    assert result.err.startswith(f"Error: {tmp_path}")


def test_scenes_generate_and_import_check_their_options_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    wrong = Result(capsys, "scenes", "generate", str(store), "--count", "0", "--kinds", "cut_in,merg")
    assert "scenes.count: must be at least 1" in wrong.err
    assert "Did you mean 'merge'?" in wrong.err
    absent = Result(capsys, "scenes", "import", str(tmp_path / "none"), str(store), "--heldout-fraction", "1")
    assert "scenes.heldout_fraction: must be greater than 0 and less than 1" in absent.err
    assert (wrong.code, absent.code, store.exists()) == (2, 2, False)


def test_scenes_are_made_as_the_recipe_says_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    import rlhf_drive.training.scenes as training_scenes
    from rlhf_drive.scenes.store import SceneStore

    asked = []

    def build_scenes(section: Any, folder: Path, **_: Any) -> SceneStore:
        asked.append((section, folder))
        return SceneStore.open(store)

    monkeypatch.setattr(training_scenes, "build_scenes", build_scenes)
    new = tmp_path / "new"
    assert Result(capsys, "scenes", "generate", str(new)).code == 0
    assert Result(capsys, "scenes", "generate", str(new), "--count", "7", "--kinds", "cut_in, merge").code == 0
    result = Result(capsys, "scenes", "import", str(tmp_path), str(new), "--starts", "all", "--seed", "5")
    generated = load_recipe("scenes").scenes
    recorded = load_recipe("real_scenes", [f"scenes.path={tmp_path}"]).scenes
    assert asked == [
        (generated, new),
        (replace(generated, count=7, kinds=("cut_in", "merge")), new),
        (replace(recorded, starts="all", seed=5), new),
    ]
    assert result.out.strip().splitlines() == [
        f"Scene store: {new} (4 train, 2 held out, 1 refused)",
        "  refused s6: the map is empty",
    ]


def test_rewards_are_listed_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {line.split()[0]: line for line in Result(capsys, "rewards", "list").out.splitlines()}
    assert "Drivable-area compliance" in lines["dac"]
    assert "nc * dac" in lines["pdms"]


def test_the_entry_point_is_the_one_that_is_installed() -> None:
    assert 'rlhf-drive = "rlhf_drive.cli:main"' in (ROOT / "pyproject.toml").read_text()
    script = "import sys; sys.argv = ['rlhf-drive', 'validate', 'quickstrat']; from rlhf_drive.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Unknown recipe 'quickstrat'. Did you mean 'quickstart'?")
    assert "Traceback" not in done.stderr


def test_override_text_is_safe_for_odd_paths(tmp_path: Path) -> None:
    from rlhf_drive.cli_policies import compare_overrides

    odd = tmp_path / "a: b, {c} #d"
    _checkpoint(odd)
    recipe = load_recipe("compare", compare_overrides({"x.y": odd}, odd, tmp_path / "out"))
    assert json.loads(json.dumps(dict(recipe.compare.policies))) == {"x.y": str(odd)}
    assert recipe.scenes.store == str(odd)
