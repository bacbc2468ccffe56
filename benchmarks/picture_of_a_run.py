"""The picture of a run's page that the README shows.

    nemotron-v3 demo
    python -m benchmarks.picture_of_a_run runs/demo

A run's page is opened in a headless Chromium, as wide as a window on a desk, and what is seen of
it is written as docs/assets/run.png: its figures, the loss and the learning rate.
"""

import argparse
import tempfile
from pathlib import Path

from nemotron_v3.pages import write_report
from tests.browser import chromium

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "run.png"
WIDTH, HEIGHT = 1200, 715


def take_picture(run: Path, picture: Path) -> None:
    """Write the top of a run's page as a PNG."""
    page = write_report([run])
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        browser.open(page.resolve().as_uri(), WIDTH, HEIGHT)
        browser.until("document.documentElement.dataset.ready === 'true'")
        browser.picture(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    take_picture(parser.parse_args().run, PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
