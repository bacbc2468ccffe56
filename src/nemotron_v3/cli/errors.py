"""Which errors are an answer to the user, and the exit status that belongs to each."""

import errno
import linecache
import sys
from pathlib import Path

FAILED, WRONG_CALL = 1, 2
PACKAGE = Path(__file__).parents[1]
# What the user gave is not there, or is of another kind; any other is the machine's.
_WRONG_PATH = frozenset(
    {
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EROFS, errno.ENXIO),
    }
)
_FAILURES = (RuntimeError, ArithmeticError, MemoryError)


def status_of(error: Exception) -> int | None:
    """The exit status of an error that is printed in one line; None for a fault of ours, whose
    traceback is needed."""
    if isinstance(error, OSError) and error.errno is not None:
        return WRONG_CALL if error.errno in _WRONG_PATH else FAILED
    if is_out_of_memory(error):
        return FAILED
    if not _raised_here(error):
        return None
    failed = isinstance(error, _FAILURES) and not isinstance(error, NotImplementedError)
    return FAILED if failed else WRONG_CALL


def in_words(error: Exception) -> str:
    """What an error says: of the system's the file and what is wrong with it, without a number."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return str(error) or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine's or the device's memory was too small."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # On a CPU torch has no class of its own for it.
    return isinstance(error, MemoryError) or (
        type(error) is RuntimeError and "not enough memory" in str(error)
    )


def _raised_here(error: Exception) -> bool:
    """Whether a `raise` in this package made the error. Anything from below it is a fault."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    file = traceback.tb_frame.f_code.co_filename
    line = linecache.getline(file, traceback.tb_lineno).strip()
    return line.startswith("raise ") and PACKAGE in Path(file).parents
