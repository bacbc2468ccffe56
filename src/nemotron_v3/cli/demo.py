"""`nemotron-v3 demo`."""

from typing import Annotated

import tyro

from nemotron_v3.recipes.demo import DemoOptions

# The options' names stand alone: no prefix says which dataclass they come from.
Options = Annotated[DemoOptions, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]


def demo(options: Options) -> None:
    """Train a small Nemotron-3-shaped model on Python's standard library, save it, reload it, and
    let it write."""
    from nemotron_v3.recipes.demo import run_demo

    run_demo(options)
