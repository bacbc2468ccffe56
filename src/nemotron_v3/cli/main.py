"""`nemotron-v3 VERB ...`: reads what is asked, runs it, and says what went wrong in one line."""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import nemotron_v3
from nemotron_v3.cli.errors import in_words, status_of
from nemotron_v3.cli.repeated import check_repeated
from nemotron_v3.cli.terminal import told_lines
from nemotron_v3.cli.verbs import VERBS

MORE = "nemotron-v3 VERB --help shows the options of a verb, nemotron-v3 --version the version."

WRONG_CALL = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE


class Verb(Protocol):
    """What the user asked for."""

    def run(self) -> None: ...


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    0; 2 for a mistake in what was asked; 1 for a failure (no memory, a full disk); 130 for Ctrl-C;
    141 where the reader of a pipe has gone. What nobody foresaw keeps its traceback, and Python's
    status for it is 1.
    """
    args = list(sys.argv[1:] if args is None else args)
    _print_anything()
    try:
        verb = parse(args)
        if verb is not None:
            verb.run()
            sys.stdout.flush()
        return 0 if args else WRONG_CALL
    except KeyboardInterrupt as interrupt:
        print(": ".join(["nemotron-v3: interrupted", *interrupt.args]), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more when it ends, which would be an error again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        print(f"nemotron-v3: {told_lines(in_words(error))}", file=sys.stderr)
        return status


def parse(args: Sequence[str]) -> Verb | None:
    """The verb with its options; None where help or the version was asked for, and printed.

    Raises:
        ValueError: no such verb or option, or a value that cannot be read.
    """
    if args and args[0] in ("-V", "--version"):
        print(f"nemotron-v3 {nemotron_v3.__version__}")
        return None
    if not args or args[0] == "help":
        args = ["--help"]
    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            verb = tyro.cli(
                verbs(args),
                prog="nemotron-v3",
                description=f"{nemotron_v3.__doc__}\n\n{MORE}",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stopped:
        if not stopped.code:
            return None
        told = _plain(stderr.getvalue())
        raise ValueError(_of_unknown_option(told, args) or told) from None
    check_repeated(verb, args)
    return verb


def verbs(args: Sequence[str]) -> Any:
    """All verbs as one type, each with its options.

    A verb with a class method `defaults(args)` takes what it does not find on the command line from
    there: a file that is named among its arguments.
    """
    from typing import Annotated, Union

    import tyro

    classes = []
    for verb, name in VERBS.items():
        cls = getattr(importlib.import_module(f"nemotron_v3.cli.{verb}"), name)
        more = {}
        if hasattr(cls, "defaults"):
            more["default"] = cls.defaults(args[1:] if args[:1] == [verb] else ())
        classes.append(Annotated[cls, tyro.conf.subcommand(verb, prefix_name=False, **more)])
    return Union[tuple(classes)]  # noqa: UP007


def _of_unknown_option(told: str, args: Sequence[str]) -> str | None:
    """Of an option that a verb does not have, the ones that may be meant; None for other errors."""
    unknown = re.match(r"Unrecognized options: (--[^\s,]+)", told)
    if unknown is None or args[0] not in VERBS:
        return None
    from nemotron_v3.cli.nearest import nearest
    from nemotron_v3.cli.options import read_verb

    given = unknown[1].partition("=")[0]
    flags = [option.flag for option in read_verb(args[0]).options if option.flag is not None]
    found = " or ".join(nearest(given, flags))
    meant = f"did you mean {found}? " if found else ""
    return f"{args[0]} has no option {given}: {meant}nemotron-v3 {args[0]} --help shows all"


def _plain(frame: str) -> str:
    """tyro's framed error as text: the title, and the sections as sentences."""
    sections = [[]]
    for line in frame.splitlines():
        text = line.strip().strip("│").strip()
        if text.startswith("╭"):
            sections = [[text.strip("╭╮─ ")], []]
        elif text and not text.strip("╰╯─-"):
            sections.append([])
        elif text:
            sections[-1].append(text)
    # An option is called as it is given: what tyro wraps around the verbs has a name of its own.
    inner = re.compile(r"Error parsing __tyro-dummy-inner__\S*: ")
    title, *sentences = [
        inner.sub("", " ".join(section)).rstrip(".") for section in sections if section
    ]
    if sentences and sentences[0].lower().startswith(title.lower()):
        return ". ".join(sentences)
    return f"{title}: {'. '.join(sentences)}"


def _print_anything() -> None:
    """Let stdout write what its encoding has no character for as an escape, not as an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
