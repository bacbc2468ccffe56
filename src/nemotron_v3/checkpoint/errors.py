"""The one exception that reading, proving and writing a checkpoint raises."""

from collections.abc import Iterable

SHOWN = 100  # max. problems listed in a message; the exception holds all
LONGEST = 1000  # max. characters of a line: a broken file may hold a name of any length


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is not what its config says, or cannot be written.

    `problems` holds one line for each tensor, file or field that is wrong; the message shows the
    first 100 of them, shortened where they are very long.
    """

    def __init__(self, summary: str, problems: Iterable[str] = ()):
        self.problems: tuple[str, ...] = tuple(problems)
        lines = [_short(summary), *(f"  - {_short(text)}" for text in self.problems[:SHOWN])]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN} more, in this error's .problems")
        super().__init__("\n".join(lines))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
