"""`nemotron-v3 completion`: a script that completes verbs, options and values in a shell.

A script holds all that it needs: nothing of this package runs when TAB is pressed. tyro can write
such scripts too; its own complete neither files in the place of arguments nor `Choices`.
"""

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from nemotron_v3.cli.options import Option, VerbOptions


@dataclass(frozen=True)
class Completion:
    """Print a script that completes verbs, options and values; docs/cli.md says where to put it."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """of which the script is"""

    def run(self) -> None:
        from nemotron_v3.cli.options import read_verb
        from nemotron_v3.cli.verbs import VERBS

        write = {"bash": bash, "zsh": zsh, "fish": fish}[self.shell]
        print(write([read_verb(verb) for verb in VERBS]), end="")


def bash(verbs: "list[VerbOptions]") -> str:
    """For bash. Where a case leaves COMPREPLY empty, readline completes files."""
    cases, words = [], []
    for verb in verbs:
        for option in verb.options:
            if option.takes_value and option.flag is not None:
                values = " ".join(option.values or ())
                cases.append(f'    "{verb.name} {option.flag}") words="{values}" ;;')
        flags = " ".join(option.flag for option in verb.options if option.flag is not None)
        first = " ".join(v for o in verb.options if o.flag is None for v in o.values or ())
        words.append(f'    {verb.name}) flags="{flags}"; first="{first}" ;;')
    names = " ".join(verb.name for verb in verbs)
    return f"""\
# Completion of nemotron-v3 for bash.
_nemotron_v3() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words="" flags first
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W "{names} --help --version" -- "$word"))
    return
  fi
  if [[ $word == "=" ]]; then
    word=""
  elif [[ $before == "=" ]]; then
    before=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(words)}
    *) return ;;
  esac
  case "${{COMP_WORDS[1]}} $before" in
{chr(10).join(cases)}
    *) if [[ $word == -* ]]; then words=$flags; else words=$first; fi ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -o bashdefault -F _nemotron_v3 nemotron-v3
"""


def zsh(verbs: "list[VerbOptions]") -> str:
    """For zsh: a file for `$fpath`, or one to source."""
    names = "\n".join(f"    {shlex.quote(f'{v.name}:{v.summary}')}" for v in verbs)
    cases = []
    for verb in verbs:
        specs = " \\\n        ".join(shlex.quote(_zsh_spec(option)) for option in verb.options)
        cases.append(f"    {verb.name})\n      _arguments \\\n        {specs}\n      ;;")
    return f"""\
#compdef nemotron-v3
# Completion of nemotron-v3 for zsh.
_nemotron_v3() {{
  local curcontext="$curcontext" state line
  local -a verbs=(
{names}
  )
  _arguments -C '(- *)--help[show the verbs]' '(- *)--version[show the version]' \\
    '1:verb:->verb' '*::option:->options'
  if [[ $state == verb ]]; then
    _describe verb verbs
    return
  fi
  case $line[1] in
{chr(10).join(cases)}
  esac
}}
if [[ $funcstack[1] == _nemotron_v3 ]]; then
  _nemotron_v3 "$@"
else
  compdef _nemotron_v3 nemotron-v3
fi
"""


def _zsh_spec(option: "Option") -> str:
    text = option.help
    for mark in "\\[]:":
        text = text.replace(mark, f"\\{mark}")
    if option.values is None:
        action = "_files"
    elif option.values:
        # Only what stands there for an option; beside a positional's values a path may be meant.
        action = f"({' '.join(option.values)})"
        if option.flag is None:
            action = f'{{_alternative "values:value:{action}" "files:file:_files"}}'
    else:
        action = ""
    if option.flag is None:
        return f":{option.name}:{action}"
    repeat = "*" if option.repeatable else ""
    return f"{repeat}{option.flag}[{text}]" + f":{option.name}:{action}" * option.takes_value


def fish(verbs: "list[VerbOptions]") -> str:
    """For fish."""
    lines = ["# Completion of nemotron-v3 for fish.", "complete -c nemotron-v3 -f"]
    for verb in verbs:
        text = shlex.quote(verb.summary)
        lines.append(f"complete -c nemotron-v3 -n __fish_use_subcommand -a {verb.name} -d {text}")
    for flag in ("help", "version"):
        lines.append(f"complete -c nemotron-v3 -n __fish_use_subcommand -l {flag}")
    for verb in verbs:
        start = f"complete -c nemotron-v3 -n '__fish_seen_subcommand_from {verb.name}'"
        for option in verb.options:
            values = " ".join(option.values or ())
            if option.flag is None:
                lines.append(f"{start} -F" + f" -a {shlex.quote(values)}" * bool(values))
                continue
            takes = " -r -F" if option.values is None else " -x" * option.takes_value
            chosen = f" -a {shlex.quote(values)}" if values else ""
            text = shlex.quote(option.help)
            lines.append(f"{start} -l {option.flag[2:]}{takes}{chosen} -d {text}")
    return "\n".join(dict.fromkeys(lines)) + "\n"
