"""`nemotron-v3 report`: a page that shows what was trained, or what an evaluation found."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Report:
    """Write a page that shows training runs or evaluations, several beside each other.

    It is one file of HTML, which needs no network. Training writes that of its own run; this writes
    it anew.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or the JSON files of evaluations"""
    out: Path | None = None
    """the page; else report.html in the run's folder, FILE.html beside an evaluation's FILE.json,
    and of several report.html in the working directory"""

    def run(self) -> None:
        from nemotron_v3.config.atomic import settle

        for path in self.paths:
            if not path.exists():
                settle(path)  # a whole run may have been moved aside
        missing = [str(path) for path in self.paths if not path.exists()]
        if missing:
            raise ValueError(f"{', '.join(missing)}: no such file or folder")
        files = [path for path in self.paths if path.is_file()]
        if files and len(files) < len(self.paths):
            raise ValueError("runs and evaluations have pages of their own: give folders, or files")
        if files:
            from nemotron_v3.evaluation.page import write_report
        else:
            from nemotron_v3.pages.write import write_report
        print(write_report(self.paths, self.out))
