"""`nemotron-v3 report`: a page that shows what was trained."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Report:
    """Write a page that shows a training run, or several beside each other.

    It is one file of HTML, which needs no network. Training writes that of its own run; this writes
    it anew.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    out: Path | None = None
    """the page; else report.html in the run's folder, of several in the working directory"""

    def run(self) -> None:
        from nemotron_v3.pages.write import write_report

        print(write_report(self.paths, self.out))
