"""Which NeMo AutoModel this room works with: the one place that says so."""

import re
from importlib.metadata import PackageNotFoundError, version

OLDEST = "0.5"
NEWEST = "0.7"
# What 0.7.0 pins: nemotron_v3.hf takes it too, so that both rooms may be in use.
ITS_TRANSFORMERS = "5.18.0"


def check_version() -> None:
    """Refuse a NeMo AutoModel outside `OLDEST` to `NEWEST`, any patch release of both included.

    Raises:
        ImportError: another version is installed, or none.
    """
    needed = f"nemotron_v3.nemo is tested with NeMo AutoModel {OLDEST} to {NEWEST}"
    try:
        found = version("nemo-automodel")
    except PackageNotFoundError as error:
        raise ImportError(
            f"nemo-automodel is not installed, and {needed}: pip install 'nemo-automodel==0.7.0', "
            f"in an environment of its own, since it pins transformers {ITS_TRANSFORMERS}"
        ) from error
    if not _minor(OLDEST) <= _minor(found) <= _minor(NEWEST):
        raise ImportError(
            f"nemo-automodel {found} is installed; {needed}: pip install 'nemo-automodel==0.7.0'"
        )


def _minor(text: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
