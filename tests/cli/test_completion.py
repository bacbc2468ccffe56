"""Completion scripts: what they offer, asked of the shells themselves."""

import re
import shutil
import subprocess

import pytest

from nemotron_v3.cli import main as cli
from nemotron_v3.cli.completion import Completion
from nemotron_v3.cli.inspect import RELEASED
from nemotron_v3.cli.options import read_verb

# Words so far, the last of them begun; and what is offered.
CASES = [
    (["ins"], {"inspect"}),
    ([""], set(cli.VERBS)),
    (["inspect", "nemotron-3-s"], {"nemotron-3-super"}),
    (["inspect", "x", "--se"], {"--seq-len"}),
    (["inspect", "x", "--dtype", "bf"], {"bf16"}),
    (["generate", "x", "--no-"], {"--no-thinking"}),
    (["generate", "x", "--top-k", "3", "--top"], {"--top-k", "--top-p"}),
    (["convert", "a", "b", "--experts", ""], {"per_expert", "fused"}),
    (["completion", "f"], {"fish"}),
    (["demo", "--pat"], {"--pattern"}),
    (["train", "--memory.checkpoint-every", ""], {"auto"}),
    (["train", "--save.no-b"], {"--save.no-background"}),
    (["eval", "x", "--ta"], {"--tasks"}),
    (["warm", "x", "--le"], {"--length"}),
    (["report", "notes-"], {"notes-1", "notes-2"}),
    (["convert", "notes-"], {"notes-1", "notes-2"}),
    (["generate", "x", "--adapter", "notes-"], {"notes-1", "notes-2"}),
]


def test_a_flag_that_takes_something_away_says_so():
    taking = [o for verb in cli.VERBS for o in read_verb(verb).options if "no-" in (o.flag or "")]
    assert len(taking) > 2
    for option in taking:
        assert option.flag is not None
        assert option.flag.removeprefix("--").rpartition(".")[2] in option.help, option


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Write a shell's script; the folder holds two files beside it."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        (tmp_path / f"notes-{number}").touch()

    def write(shell):
        Completion(shell).run()
        path = tmp_path / f"script.{shell}"
        path.write_text(capsys.readouterr().out)
        return path

    return write


def need(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_bash_offers_verbs_options_values_and_files(script):
    need("bash")
    lines = [f"source {script('bash')}"]
    for words, _ in CASES:
        quoted = " ".join(f"'{word}'" for word in ["nemotron-v3", *words])
        lines += [
            f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}",
            "_nemotron_v3",
            # Nothing offered: then files are, by `complete -o default`.
            '[[ ${COMPREPLY[*]} ]] || COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))',
            'echo "${COMPREPLY[*]}"',
        ]
    lines.append("complete -p nemotron-v3")
    *offered, registered = ask("bash", "-c", "\n".join(lines)).splitlines()
    check([set(line.split()) for line in offered])
    assert "-o default" in registered and "-F _nemotron_v3" in registered


def test_bash_completes_behind_an_equals_sign(script):
    need("bash")
    lines = [f"source {script('bash')}"]
    for words in ("--dtype = bf1", "--dtype ="):
        lines.append(
            f"COMP_WORDS=(nemotron-v3 inspect x {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))"
        )
        lines += ["_nemotron_v3", 'echo "${COMPREPLY[*]}"']
    one, many = ask("bash", "-c", "\n".join(lines)).splitlines()
    assert one == "bf16" and {"bf16", "float32"} <= set(many.split())


def test_fish_offers_verbs_options_values_and_files(script):
    need("fish")
    lines = [f"source {script('fish')}"]
    for words, _ in CASES:
        lines += [f"complete -C 'nemotron-v3 {' '.join(words)}' | cut -f1 | tr '\\n' ' '", "echo"]
    offered = ask("fish", "--no-config", "-c", "\n".join(lines)).splitlines()
    check([set(line.split()) for line in offered])


def test_zsh_reads_the_script_and_offers_the_verbs(script):
    need("zsh")
    path = script("zsh")
    ask("zsh", "-n", str(path))
    # The functions that zsh completes with are called by it alone, so they are listened to.
    told = ask(
        "zsh", "-f", "-c",
        f"_arguments() {{ print -l -- $@; line=(inspect) }}; _describe() {{ print -l -- $verbs }};"
        f"compdef() {{ }}; source {path}; _nemotron_v3",
    )  # fmt: skip
    flags = set(re.findall(r"--[\w-]+", told))
    assert {option.flag for option in read_verb("inspect").options if option.flag} <= flags
    for name in RELEASED:
        assert name in told


def check(offered):
    assert len(offered) == len(CASES)
    for (words, expected), found in zip(CASES, offered, strict=True):
        found = {word for word in found if not word.startswith("-") or words[-1].startswith("-")}
        assert found >= expected, (words, found)
        if words[-1]:
            assert all(word.startswith(words[-1]) for word in found), (words, found)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_options_are_those_that_the_command_takes(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    # A flag further in is a word of a wrapped help text.
    listed = re.findall(r"^[│ ] {1,8}(?:-h, )?(--\w[\w.-]+)", shown, re.MULTILINE)
    options = read_verb(verb).options
    # Numbered ones are spelt by a file.
    listed = [flag for flag in listed if not re.search(r"\.\d+\.", flag)]
    assert sorted(listed) == sorted(option.flag for option in options if option.flag)
    positional = re.findall(r"^[│ ] +(?:STR|\[*PATH|\{bash,zsh,fish\})", shown, re.MULTILINE)
    assert len(positional) == sum(option.flag is None for option in options)
    for option in options:
        takes = re.search(rf"^[│ ] +(?:-h, )?{option.flag} +(\S+)", shown, re.MULTILINE)
        if option.flag and option.takes_value:
            kind = takes[1].split("|")[0] if takes else ""  # a number or a word: INT|{auto}
            assert kind and (kind.isupper() or kind[0] in "{["), option


def test_choices_are_values_that_are_taken(capsys):
    (dtype,) = [o for o in read_verb("inspect").options if o.name == "dtype"]
    for value in dtype.values:
        assert cli.main(["inspect", "nemotron-h-8b", "--dtype", value]) == 0
    assert read_verb("completion").options[0].values == ("bash", "zsh", "fish")
