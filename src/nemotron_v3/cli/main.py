"""`nemotron-v3 VERB ...`: finds the verb, and says what went wrong in one line."""

import importlib
import linecache
import sys
from collections.abc import Sequence
from pathlib import Path

import nemotron_v3

# A verb is the function of that name in the file of that name: its arguments are the options.
VERBS = {
    "convert": "a checkpoint in another spelling, or with a LoRA adapter merged into it",
    "demo": "train a small hybrid on Python's standard library, save it, reload it, generate",
    "generate": "continue a prompt, or chat, in the terminal",
    "inspect": "layers, parameters, FLOPs and bytes of a released model or a checkpoint",
    "train": "train on one's own text or chats: from scratch, further, or adapters alone",
}

USAGE = f"""\
usage: nemotron-v3 VERB [options]

{"".join(f"  {verb:<10}{summary}{chr(10)}" for verb, summary in VERBS.items())}
  nemotron-v3 VERB --help   the options of a verb
  nemotron-v3 --version"""

ERROR = 2
INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 2 for a mistake in what was asked, 130 for
    Ctrl-C. What we did not expect keeps its traceback."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if args else ERROR
    verb, *options = args
    if verb in ("-V", "--version"):
        print(f"nemotron-v3 {nemotron_v3.__version__}")
        return 0
    if verb not in VERBS:
        return _complain(f"no verb {verb!r}: there are {', '.join(VERBS)}")
    try:
        _run(verb, options)
    except KeyboardInterrupt as interrupt:
        print(": ".join(["nemotron-v3: interrupted", *interrupt.args]), file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not _meant(error):
            raise
        return _complain(str(error))
    return 0


def _run(verb: str, options: Sequence[str]) -> None:
    import tyro

    # Imported only now, so that help and a mistyped verb are answered at once.
    module = importlib.import_module(f"nemotron_v3.cli.{verb}")
    if (kind := getattr(module, verb.title(), None)) is not None:
        config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
        told = {"default": kind.defaults(options), "config": config}
        tyro.cli(kind, prog=f"nemotron-v3 {verb}", args=options, **told).run()
        return
    tyro.cli(getattr(module, verb), prog=f"nemotron-v3 {verb}", args=options)


def _meant(error: Exception) -> bool:
    """Whether the error is an answer to the user: a `raise` in this package, or a file that cannot
    be read or written; anything else is a fault of ours, and its traceback is needed."""
    if isinstance(error, OSError):
        return error.filename is not None
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    file = traceback.tb_frame.f_code.co_filename
    line = linecache.getline(file, traceback.tb_lineno).strip()
    return line.startswith("raise ") and Path(__file__).parents[1] in Path(file).parents


def _complain(message: str) -> int:
    print(f"nemotron-v3: {message}", file=sys.stderr)
    return ERROR


if __name__ == "__main__":
    sys.exit(main())
