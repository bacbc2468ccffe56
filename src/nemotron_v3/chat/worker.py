"""The program that renders chat templates: started by `renderer`, and stopped by it.

It reads requests from stdin and answers on stdout, each a length and its bytes. It imports nothing
but Jinja and the standard library, so that it starts in a moment and weighs little. What a template
costs is bounded here by the operating system, where that has the means: memory by its address
space, and computing by processor time, at the end of which the process is killed. No list of
dangerous operations has to be complete then.
"""

import json
import marshal
import re
import secrets
import signal
import struct
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from math import ceil
from typing import IO, Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: the parent process limits the time, nothing limits memory
    resource = None

LENGTH = struct.Struct("<Q")
LONGEST_ERROR = 1000
# Variables rendered before and after a generation tag's body, to find its position in the text.
BEGIN, END = "_generation_begin", "_generation_end"
SOURCES = ("<template>", "<unknown>")  # what tracebacks call a template


class Refusal(TemplateError):
    """A template's own `raise_exception`."""


class TooLong(Exception):
    """A text of more characters than are allowed."""


class Generation(Extension):
    """The tag `generation`, around what the assistant wrote.

    It renders its body in a new scope. The markers before and after it are undefined variables,
    so they are empty unless a render defines them.
    """

    tags: set[str] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")]) for name in (BEGIN, END))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


def environment() -> Environment:
    """The dialect in which checkpoints write their templates, in a sandbox."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def refuse(message: Any = "") -> None:
    raise Refusal(str(message))


@lru_cache(16)
def compiled(source: str) -> Template:
    return environment().from_string(source)


def render(source: str, variables: Mapping[str, Any], longest: int) -> str:
    """The rendered text; raises `TooLong`, and whatever the template raises."""
    pieces, length = [], 0
    for piece in compiled(source).generate(variables):
        length += len(piece)
        if length > longest:
            raise TooLong(f"more than {longest:,} characters of text")
        pieces.append(piece)
    return "".join(pieces)


def render_with_spans(
    source: str, variables: Mapping[str, Any], longest: int
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the positions of the bodies of generation tags in it."""
    begin, end = (f"{character}{secrets.token_hex(8)}" for character in "\ue000\ue001")
    marked = render(source, {**variables, BEGIN: begin, END: end}, longest)
    pieces, spans, length, opened = [], [], 0, 0
    for piece in re.split(f"({begin}|{end})", marked):
        if piece == begin:
            opened = length
        elif piece == end:
            spans.append((opened, length))
        else:
            pieces.append(piece)
            length += len(piece)
    text = "".join(pieces)
    if text != render(source, variables, longest):
        raise Refusal("what it writes depends on where the text of a generation tag begins")
    return text, spans


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to one request: a text, or what is wrong."""
    source = request["source"]
    try:
        compiled(source)
    except Exception as error:
        return {"error": message_of(error), "kind": "no template", "fatal": fatal(error)}
    if request["variables"] is None:
        return {"text": ""}
    try:
        if request["spans"]:
            text, spans = render_with_spans(source, request["variables"], request["longest"])
            return {"text": text, "spans": spans}
        return {"text": render(source, request["variables"], request["longest"])}
    except Exception as error:
        kind = "refused" if isinstance(error, Refusal) else "failed"
        line = None if kind == "refused" else line_of(error)
        return {"error": message_of(error), "kind": kind, "line": line, "fatal": fatal(error)}


def fatal(error: Exception) -> bool:
    """Whether the process should be replaced after this error."""
    return isinstance(error, MemoryError | RecursionError)


def message_of(error: Exception) -> str:
    """An error in one printable line."""
    try:
        text = error.message if isinstance(error, TemplateSyntaxError) else str(error)
        text = " ".join(str(text)[: 4 * LONGEST_ERROR].split())[:LONGEST_ERROR]
    except Exception:
        text = ""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if isinstance(error, TemplateSyntaxError):
        return f"{text} (line {error.lineno})"
    if isinstance(error, MemoryError):
        return "it takes more memory than it is given"
    named = isinstance(error, TemplateError | TooLong)
    return text if named else f"{type(error).__name__}{': ' if text else ''}{text}"


def line_of(error: Exception) -> int | None:
    """The line of the template where an error was raised."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename in SOURCES:
            line = step.tb_lineno
        step = step.tb_next
    return line


def bound_memory(memory: int) -> None:
    """Limit the address space of this process."""
    if resource is None:
        return
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(what, (least, hard))
        except (ValueError, OSError):  # a system without this limit
            continue


def bound_time(seconds: float) -> None:
    """Kill this process after so many more seconds of CPU time."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = ceil(used.ru_utime + used.ru_stime + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(
        resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )


def send(file: IO[bytes], raw: bytes) -> None:
    file.write(LENGTH.pack(len(raw)))
    file.write(raw)
    file.flush()


def receive(file: IO[bytes]) -> bytes | None:
    """The next message; None where the other side has ended."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    raw = file.read(length)
    return raw if len(raw) == length else None


def as_bytes(reply: Mapping[str, Any]) -> bytes:
    # Not with escapes, which would make one character of two halves.
    return json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")


def main() -> None:
    # Ctrl-C in a terminal reaches every process; the one that started this decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bound_memory(int(sys.argv[1]))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while (raw := receive(requests)) is not None:
        try:
            request = marshal.loads(raw)
            bound_time(request["seconds"])
            raw = as_bytes(answer(request))
        except MemoryError as error:
            reply = {"kind": "failed", "error": message_of(error), "line": None, "fatal": True}
            raw = as_bytes(reply)
        send(replies, raw)


if __name__ == "__main__":
    main()
