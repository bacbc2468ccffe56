"""The loss of a run as a picture."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from nemotron_v3.train.loop import Step

SMOOTHING = 0.95
# Okabe and Ito's palette, which readers who are blind to some colours can tell apart; each line has
# a pattern of its own as well, for those who see none.
TRAINING = "#0072B2"
HELD_OUT = (("#D55E00", "-"), ("#000000", "--"), ("#009E73", ":"), ("#CC79A7", "-."))


def plot_loss(
    steps: Sequence[Step], bytes_per_token: float, bits_per_byte: dict[str, float], path: Path
) -> None:
    """Write a PNG: the training loss over tokens in bits per byte, each step and smoothed, and the
    held-out figures as horizontal lines.

    Args:
        steps: at least one.
        bytes_per_token: of the training text.
        bits_per_byte: held-out bits per byte by name, the model's first.
    """
    # Figure, not pyplot: no global state, no window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    tokens = [count / 1e6 for count in accumulate(step.tokens for step in steps)]
    losses = [step.loss / math.log(2) / bytes_per_token for step in steps]
    axes.plot(tokens, losses, color=TRAINING, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, _smooth(losses), color=TRAINING, linewidth=2.2, label="training")
    for number, (name, bits) in enumerate(bits_per_byte.items()):
        color, pattern = HELD_OUT[number % len(HELD_OUT)]
        label = f"held out, {name}: {bits:.3f}"
        axes.axhline(bits, color=color, linestyle=pattern, linewidth=1.5, label=label)
    axes.set(
        xlabel="tokens (millions)",
        ylabel="bits per byte",
        ylim=(0, 1.05 * max([*losses, *bits_per_byte.values()])),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential average, corrected for its start."""
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth
