"""The command as a whole: verbs, exit statuses, one-line errors, and what is imported when."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nemotron_v3
from nemotron_v3.cli import main as cli
from nemotron_v3.cli.options import read_verb
from nemotron_v3.config.text import check_text
from tests.models import tiny_model


@pytest.fixture
def verb(monkeypatch):
    """Give the command a verb that does what the test says."""

    def install(function):
        class Try:
            run = staticmethod(function)

        monkeypatch.setattr(cli, "parse", lambda args: Try)

    return install


def run_python(script, *arguments, **environment):
    command = [sys.executable, *arguments, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for verb in cli.VERBS:
        assert read_verb(verb).summary in shown


def test_no_verb_is_a_mistake_that_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "usage: nemotron-v3" in capsys.readouterr().out


def test_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nemotron-v3 {nemotron_v3.__version__}\n"


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "nemotron_v3", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"nemotron-v3 {nemotron_v3.__version__}\n" and done.returncode == 0


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["inspekt", "x"], "Available subcommands: convert, demo, eval, generate, inspect"),
        (["demo", "--stepz", "3"], "demo has no option --stepz: did you mean --steps? "),
        (["train", "--optimizer.lr", "3"], "did you mean --optimizer.learning-rate? "),
        (["train", "--optimizer.learningrate=3"], "did you mean --optimizer.learning-rate? "),
        (["train", "--lr", "3"], "--lr: did you mean --optimizer.learning-rate? "),
        (["train", "--quux", "3"], "train has no option --quux: nemotron-v3 train --help shows"),
        (["inspect", "x", "--seq-len", "many"], "--seq-len: invalid literal for int()"),
        (["inspect"], "Missing from nemotron-v3 inspect: STR name of a released model"),
        (["generate", "x", "--temperature"], "--temperature"),
        (["completion", "tcsh"], "Expected one of ('bash', 'zsh', 'fish')"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(capsys, args, told):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nemotron-v3: ") and err.count("\n") == 1
    assert told in err and "help" in err
    assert not set(err) & set("│╭╰─")


def test_an_error_raised_for_the_user_is_one_line(capsys):
    assert cli.main(["demo", "--steps", "0"]) == 2
    assert capsys.readouterr().err == "nemotron-v3: steps is 0: give at least 1\n"


def test_an_error_from_deeper_in_the_package_is_one_line(capsys):
    assert cli.main(["demo", "--pattern", "MX"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("nemotron-v3: ") and told.count("\n") == 1
    assert "'X' at position 1" in told


def test_an_error_of_many_lines_is_one_and_cannot_act_on_the_terminal(verb, capsys):
    verb(lambda: check_text("\ud800", "the\x1b[2J\nname"))
    assert cli.main(["try"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the␛[2J name holds half a character" in told


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "/nowhere"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EIO, "Input/output error", "/mnt/x"), 1),
        (MemoryError(), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), 1),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141),
        (KeyboardInterrupt(), 130),
        (KeyboardInterrupt("kept in x"), 130),
    ],
    ids=repr,
)
def test_each_end_has_its_status(verb, capsys, error, status):
    def fail():
        raise error

    verb(fail)
    assert cli.main(["try"]) == status
    told = capsys.readouterr().err
    if status == 141:
        assert told == ""
        return
    assert told.startswith("nemotron-v3: ") and told.count("\n") == 1
    if isinstance(error, OSError):  # without its number
        assert (
            told == f"nemotron-v3: {f'{error.filename}: ' * bool(error.filename)}{error.strerror}\n"
        )
    else:
        assert str(error) in told


def test_a_failure_that_the_package_tells_is_status_1(verb, capsys):
    def generate():
        model = tiny_model()
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
        model.generate([1, 2], max_new_tokens=1)

    verb(generate)
    assert cli.main(["try"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "row 0" in told


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, OSError, AssertionError])
def test_a_fault_of_ours_keeps_its_traceback(verb, error):
    def fail():
        raise error("not raised in the package")

    verb(fail)
    with pytest.raises(error, match="not raised in the package"):
        cli.main(["try"])


def test_an_error_from_below_the_package_is_a_fault(verb):
    from nemotron_v3.data.corpus import is_held_out

    verb(lambda: is_held_out(3))
    with pytest.raises(AttributeError):
        cli.main(["try"])


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m nemotron_v3 inspect nemotron-3-super"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True
    )
    assert done.returncode == 141 and done.stderr == ""


# What needs no torch: help, completion, mistakes.
@pytest.mark.parametrize(
    "args",
    [["--help"], *([verb, "--help"] for verb in cli.VERBS), ["completion", "zsh"], ["inspekt"]],
    ids=" ".join,
)
def test_help_and_completion_import_neither_torch_nor_what_a_verb_needs(args):
    script = (
        "import json, sys; from nemotron_v3.cli.main import main;"
        f"main({args!r}); print(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    )
    done = run_python(script)
    loaded = set(json.loads(done.stdout.splitlines()[-1])) - set(sys.stdlib_module_names)
    assert loaded <= {
        *("nemotron_v3", "tyro", "docstring_parser", "typing_extensions", "__main__"),
        *("_distutils_hack", "sitecustomize", "usercustomize", "typeguard"),
    }


def test_text_that_stdout_cannot_encode_is_escaped(tmp_path):
    folder = tmp_path / "größe"
    folder.mkdir()
    script = (
        "import sys; from nemotron_v3.cli import main as cli;"
        "cli.parse = lambda args: type('V', (), {'run': lambda self: print('gr\\u00f6\\ud800')})();"
        "sys.exit(cli.main(['x']))"
    )
    done = run_python(script, PYTHONIOENCODING="ascii")
    assert (done.stdout, done.returncode) == ("gr\\xf6\\ud800\n", 0)


def test_every_file_of_a_verb_has_its_class():
    files = {p.stem for p in Path(cli.__file__).parent.glob("*.py")}
    assert set(cli.VERBS) <= files
    for verb in cli.VERBS:
        assert read_verb(verb).summary.endswith(".")


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("convert", "a", "b", "--adapter", "c", "--adapter", "d"), "adapter"),
        (("generate", "a", "--adapter=c", "--adapter", "d", "--prompt", "x"), "adapter"),
        (("eval", "a", "--data", "b", "--data", "c"), "data"),
        (("eval", "a", "--tasks", "b", "--tasks=c"), "tasks"),
        (("train", "--files", "a", "--log.samples", "b", "--log.samples", "c"), "log.samples"),
        (("train", "--files", "a", "--lora.groups", "b", "--lora.groups", "c"), "lora.groups"),
    ],
)
def test_an_option_of_several_values_that_stands_there_twice_drops_none(args, name):
    with pytest.raises(ValueError, match=f"--{name} stands there 2 times"):
        cli.parse(args)


def test_an_option_that_adds_up_may_stand_there_twice():
    verb = cli.parse(["generate", "a", "--prompt", "x", "--prompt", "y"])
    assert verb is not None and verb.prompt == ("x", "y")
    verb = cli.parse(["eval", "a", "--data", "d", "--adapter", "x", "--adapter", "y"])
    assert verb is not None and [path.name for path in verb.adapter] == ["x", "y"]
    verb = cli.parse(["eval", "a", "--data", "d", "--device", "cpu", "--device", "cuda"])
    assert verb is not None and verb.device == "cuda"
