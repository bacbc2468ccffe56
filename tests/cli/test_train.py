"""`nemotron-v3 train`: recipes, what goes over them, and what is refused."""

import sys
from pathlib import Path

import pytest

from nemotron_v3.cli.main import main, parse
from nemotron_v3.train.config_file import read_config
from nemotron_v3.train.options import TrainOptions

OF_A_MODEL = ["--files", "x.txt", "--model.path", "."]
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_asks_for_nothing_that_cannot_be(path):
    options = read_config(path, TrainOptions)
    if options.model.path is None and options.model.preset is None:
        with pytest.raises(ValueError, match="there is no model"):
            options.check()
    else:
        options.check()


def test_the_command_line_goes_over_the_recipe():
    recipe = str(next(path for path in RECIPES if path.stem == "continue"))
    verb = parse(["train", recipe, "--files", "a.txt", "b", "--data.rows", "3", "--resume"])
    assert [source.path for source in verb.options.data.sources] == ["a.txt", "b"]
    assert verb.options.data.rows == 3 and verb.options.data.tokens_per_row == 1024
    assert verb.resume and not verb.dry_run and verb.recipe == Path(recipe)
    assert parse(["train", recipe]).options == read_config(Path(recipe), TrainOptions)


@pytest.mark.parametrize("before", [[], ["--resume"], ["--resume", "--dry-run"]])
def test_the_folder_of_a_run_is_a_recipe(tmp_path, before):
    (tmp_path / "train.toml").write_text(RECIPES[0].read_text())
    verb = parse(["train", *before, str(tmp_path)])
    assert verb.options.out == verb.recipe == tmp_path
    assert verb.read == (tmp_path, ())


@pytest.mark.parametrize("before", [["--dry-run"], ["--data.rows", "3"], ["--seed", "1"]])
def test_a_recipe_behind_options_is_read(before):
    recipe = str(next(path for path in RECIPES if path.stem == "chat"))
    verb = parse(["train", *before, recipe, "--mfu", "0.3"])
    assert verb.read == (Path(recipe), ()) and verb.recipe == Path(recipe)
    given = read_config(Path(recipe), TrainOptions).data.sources
    assert verb.options.data.sources == given


def test_a_recipe_that_tyro_reads_and_the_defaults_do_not_is_refused(tmp_path):
    (tmp_path / "train.toml").write_text(RECIPES[0].read_text())
    verb = parse(["train", "--seed", "1", str(tmp_path), "--files", "x.txt"])
    with pytest.raises(ValueError, match="the recipe is read where it stands first"):
        verb.run()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to train on"),
        (["--files", "none.txt"], "there is no model"),
        (["none.toml"], "none.toml does not exist: give a TOML file"),
        (["recipes/continue", "--files", "x.txt"], "recipes/continue does not exist"),
        (["--resume", "runs/mine"], "runs/mine does not exist"),
        (["/", "--files", "x.txt"], "/ holds no run: there is no train.toml in it"),
        ([__file__], "is no recipe, which is a .toml file: to train on it give --files"),
        (["--files", "a.txt", "--files", "b.txt"], "--files stands there twice"),
        (["--files=a.txt"], "--files with a blank behind it"),
        ([*OF_A_MODEL, "--lora.alpha", "32"], "lora.rank 0 trains the whole model"),
        ([*OF_A_MODEL, "--lora.groups", "mlp"], "lora.rank 0 trains the whole model"),
        ([*OF_A_MODEL, "--schedule.decay", "0.5"], "which the shape cosine has not"),
        ([*OF_A_MODEL, "--seed", str(2**64)], "give an integer of 64 bits"),
        (["--files", "x.txt", "--threads", "0"], "--threads is 0"),
        (["--files", "x.txt", "--data.rows", "0"], "rows is 0"),
        (["--files", "x.txt", "--optimizer.lerning-rate", "1"], "learning-rate"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemotron_v3.cli.train.settle_threads", lambda threads: None)
    assert main(["train", *args]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_several_mistakes_are_a_list_on_lines_of_their_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemotron_v3.cli.train.settle_threads", lambda threads: None)
    Path("bad.toml").write_text("[data]\nsources = []\nrow = 3\n[sched]\n")
    assert main(["train", "bad.toml"]) == 2
    first, *items = capsys.readouterr().err.splitlines()
    assert first == "nemotron-v3: bad.toml cannot be a run's configuration:"
    assert len(items) == 3 and all(item.startswith("  - ") for item in items)
    assert "data.row is no option: did you mean rows" in items[0]
    wrong = ["train", "--files", "x.txt", "--lora.rank", "-1", "--optimizer.eps", "0"]
    assert main(wrong) == 2
    first, *items = capsys.readouterr().err.splitlines()
    assert first == "nemotron-v3: the options cannot be:" and len(items) == 3
    Path("one.toml").write_text("[data]\nsources = []\ntokens_per_row = 8\nrow = 3\n")
    assert main(["train", "one.toml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_that_is_no_checkpoint_is_told_with_the_way_out(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemotron_v3.cli.train.settle_threads", lambda threads: None)
    Path("x.txt").write_text("a")
    for verb in (["train", "--files", "x.txt", "--model.path"], ["generate", "--prompt", "a"]):
        assert main([*verb, "runs/nope"]) == 2
        told = capsys.readouterr().err
        assert "runs/nope" in told and "does not exist: give the folder of a checkpoint" in told
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "mybase"}')
    assert main(["train", "--files", "x.txt", "--model.path", "adapter"]) == 2
    told = capsys.readouterr().err
    assert "nemotron-v3 convert mybase MERGED --adapter adapter" in told


def test_what_peft_says_when_it_is_imported_is_not_shown():
    """It looks for libraries that do not load, and says so in lines of its own."""
    import subprocess

    script = (
        "from nemotron_v3.cli.train import _adapters\n"
        "from nemotron_v3.data.options import DataOptions, Source\n"
        "from nemotron_v3.train.options import LoraOptions, TrainOptions\n"
        "data = DataOptions((Source('x'),), tokens_per_row=8, rows=1)\n"
        "_adapters(TrainOptions(data=data, lora=LoraOptions(rank=1)))\n"
        "import logging; logging.getLogger('theirs').warning('still told')\n"
    )
    pytest.importorskip("peft")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "still told\n", done.stderr


def test_options_are_read_without_torch():
    import subprocess

    script = (
        "import sys; from nemotron_v3.cli.main import parse; "
        f"parse(['train', {str(RECIPES[0])!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
