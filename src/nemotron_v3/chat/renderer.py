"""A child process that renders chat templates, and is killed if a template does not end.

A template is a program from whoever made the checkpoint. Jinja's sandbox keeps it from reading and
changing things; it does not keep it from looping for years or writing ten gigabytes, and no list of
operations to watch is ever complete. So it runs in a process of its own (`worker`) that has so much
memory and computing time and no more. The process starts with the first template, serves all of
them, one at a time, and is started anew after it was ended.
"""

import atexit
import contextlib
import json
import marshal
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_v3.chat.worker import receive, send

SECONDS = 5
"""What a template may compute, in seconds of a processor."""
PATIENCE = 60
"""What it may take by the clock, where other programs hold the processor."""
MEMORY = 2**30
"""Bytes of the process that renders."""
LONGEST = 2**26
"""Characters of a text."""

_WORKER = Path(__file__).with_name("worker.py")


class _Process:
    """The process, while there is one; `lock` is held while it renders."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._child: subprocess.Popen | None = None

    def ask(self, request: bytes) -> bytes | None:
        """The reply of the process; None if it ended without one."""
        child = self._running()
        assert child.stdin is not None and child.stdout is not None, "both are asked for as pipes"
        clock = threading.Timer(PATIENCE, child.kill)
        clock.daemon = True
        clock.start()
        try:
            send(child.stdin, request)
            reply = receive(child.stdout)
        except OSError:  # the process has ended
            reply = None
        except BaseException:  # a KeyboardInterrupt, say: the next request would get this reply
            self.end()
            raise
        finally:
            clock.cancel()
        if reply is None:
            self.end()
        return reply

    def _running(self) -> subprocess.Popen:
        if self._child is not None and self._child.poll() is not None:
            self.end()
        if self._child is None:
            # The worker finds its modules where this process does.
            paths = os.pathsep.join(path for path in sys.path if path)
            self._child = subprocess.Popen(
                [sys.executable, "-S", "-P", str(_WORKER), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )
        return self._child

    def end(self) -> None:
        """Kill the process, if it runs."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout)):
            with contextlib.suppress(OSError):  # flushing into a process that has ended
                pipe.close()

    def forget(self) -> None:
        """In a fork: the process is the parent's."""
        self.__init__()


_process = _Process()
atexit.register(_process.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.forget)


def ask(source: str, variables: Mapping[str, Any] | None, spans: bool = False) -> dict[str, Any]:
    """Render a template.

    Args:
        source: the template.
        variables: plain data for it; None only looks whether it is a template.
        spans: also ask for the places of generation tags.

    Returns:
        `{"text": ...}`, with `"spans"` if asked for; or `{"error": ..., "kind": ..., "line": ...}`.
    """
    request = {
        "source": source,
        "variables": variables,
        "spans": spans,
        "seconds": SECONDS,
        "longest": LONGEST,
    }
    try:
        raw = marshal.dumps(request)
    except ValueError as error:
        raise ValueError(f"messages for a chat template are plain data: {error}") from None
    with _process.lock:
        reply = _process.ask(raw)
        if reply is not None:
            result = json.loads(reply.decode("utf-8", "surrogatepass"))
            if result.pop("fatal", False):
                _process.end()
            return result
    error = f"it takes more than {SECONDS} seconds, or more than its process can bear"
    return {"error": error, "kind": "failed", "line": None}
