"""`nemotron-v3 demo`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from nemotron_v3.recipes.options import DemoOptions


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small hybrid on Python's standard library, save it, reload it, and let it write."""

    # The options' names stand alone: no prefix says which dataclass they come from.
    options: Annotated[DemoOptions, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes] = (
        DemoOptions()
    )

    def run(self) -> None:
        from nemotron_v3.recipes.demo import run_demo

        run_demo(self.options)
