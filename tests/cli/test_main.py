import subprocess
import sys
from pathlib import Path

import pytest

import nemotron_v3
from nemotron_v3.cli import main as cli


@pytest.fixture
def verb(monkeypatch):
    """Give the command a verb `try` that does what the test says."""

    def install(function):
        monkeypatch.setitem(cli.VERBS, "try", "for a test")
        monkeypatch.setattr(cli, "_run", lambda verb, options: function(*options))

    return install


def test_help_names_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told and summary in told for name, summary in cli.VERBS.items())


def test_no_verb_is_a_mistake_that_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "usage: nemotron-v3 VERB" in capsys.readouterr().out


def test_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nemotron-v3 {nemotron_v3.__version__}\n"


def test_an_unknown_verb_is_named_beside_the_known_ones(capsys):
    assert cli.main(["trian"]) == 2
    known = ", ".join(cli.VERBS)
    assert capsys.readouterr().err == f"nemotron-v3: no verb 'trian': there are {known}\n"


def test_an_error_raised_for_the_user_is_one_line(capsys):
    assert cli.main(["demo", "--steps", "0"]) == 2
    assert capsys.readouterr().err == "nemotron-v3: steps is 0: give at least 1\n"


def test_an_error_from_deeper_in_the_package_is_one_line(capsys):
    assert cli.main(["demo", "--pattern", "MX"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("nemotron-v3: ") and told.count("\n") == 1
    assert "'X' at position 1" in told


def test_a_missing_file_is_one_line(verb, capsys):
    verb(lambda: Path("/nowhere/config.json").read_text())
    assert cli.main(["try"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "/nowhere/config.json" in told


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


@pytest.mark.parametrize(
    ("interrupt", "told"),
    [
        (KeyboardInterrupt(), "nemotron-v3: interrupted\n"),
        (KeyboardInterrupt("kept in x"), "nemotron-v3: interrupted: kept in x\n"),
    ],
)
def test_ctrl_c_is_status_130(verb, capsys, interrupt, told):
    def press():
        raise interrupt

    verb(press)
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == told


def test_a_mistyped_option_is_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--stepz", "3"])
    assert stopped.value.code == 2
    assert "--stepz" in capsys.readouterr().err


def test_help_loads_nothing_that_a_verb_needs():
    script = (
        "import sys; from nemotron_v3.cli.main import main; main(['--help']);"
        "loaded = {'tyro', 'rich', 'matplotlib', 'tokenizers'} & set(sys.modules);"
        "print('loaded:', *loaded)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("\nloaded:\n") and done.stderr == ""
