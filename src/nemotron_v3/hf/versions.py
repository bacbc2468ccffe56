"""Which transformers this room works with: the one place that says so."""

import re

import transformers

OLDEST = "5.17"
NEWEST = "5.24"


def check_version() -> None:
    """Refuse a transformers outside `OLDEST` to `NEWEST`, any patch release of both included.

    Raises:
        ImportError: another version is installed.
    """
    found = transformers.__version__
    if not _minor(OLDEST) <= _minor(found) <= _minor(NEWEST):
        raise ImportError(
            f"transformers {found} is installed; nemotron_v3.hf is tested with {OLDEST} to "
            f"{NEWEST}: pip install 'transformers>={OLDEST},<{_next_minor(NEWEST)}'"
        )


def _minor(version: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _next_minor(version: str) -> str:
    major, minor = _minor(version)
    return f"{major}.{minor + 1}"
