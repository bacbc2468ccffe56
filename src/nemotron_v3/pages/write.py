"""A page from what lies on the disk: a run, or several."""

from collections.abc import Sequence
from pathlib import Path

from nemotron_v3.pages.compare import comparison_page
from nemotron_v3.pages.live import REPORT
from nemotron_v3.pages.page import check_replaceable, write_page
from nemotron_v3.pages.read import read_run
from nemotron_v3.pages.run import run_page


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page of all that is named, and give its path.

    Args:
        paths: folders of runs.
        out: the page. None puts that of one run into its folder, and that of several into
            `report.html` in the working directory.

    Raises:
        ValueError: nothing, or a path that is no run; a file at `out` that is no such page.
        OSError: something cannot be read or written.
    """
    if not paths:
        raise ValueError(
            "there is nothing to report: give folders of runs, or files of evaluations"
        )
    missing = [str(path) for path in paths if not path.is_dir()]
    if missing:
        raise ValueError(f"{', '.join(missing)}: no folder of a run")
    alone = len(paths) == 1
    out = out or (paths[0] / REPORT if alone else Path(REPORT))
    check_replaceable(out)
    runs = [read_run(path) for path in paths]
    write_page(run_page(runs[0]) if alone else comparison_page(runs), out)
    return out
