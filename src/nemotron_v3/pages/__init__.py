"""Self-contained pages that show a training run, an evaluation, or several beside each other."""

from nemotron_v3.pages.live import LiveReport
from nemotron_v3.pages.write import write_report

__all__ = ["LiveReport", "write_report"]
