"""The one table printer: rows of measurements, and the same as JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

OOM = "OOM"


def unavailable(why: str) -> str:
    """The value of a measurement that there is none of."""
    return f"n/a: {why}"


@dataclass(frozen=True)
class Row:
    """One piece of work, measured for us and for each peer.

    Attributes:
        work: what is done.
        shape: on what.
        unit: of all values.
        ours: a number, `OOM`, or `unavailable(why)`.
        peers: the same by the peer's name.
        more_is_better: whether the unit is a rate; else a time or a size.
        floor: the value that the machine allows at best, where it is known.
    """

    work: str
    shape: str
    unit: str
    ours: float | str
    peers: Mapping[str, float | str] = field(default_factory=dict)
    more_is_better: bool = True
    floor: float | None = None

    def ratio(self, peer: str) -> float | None:
        """How many times better than the peer we are: above 1 is better, whatever the unit."""
        theirs = self.peers.get(peer)
        if isinstance(self.ours, str) or theirs is None or isinstance(theirs, str):
            return None
        return self.ours / theirs if self.more_is_better else theirs / self.ours

    def percent_of_floor(self) -> float | None:
        if isinstance(self.ours, str) or self.floor is None:
            return None
        return 100 * (self.ours / self.floor if self.more_is_better else self.floor / self.ours)


def render(rows: Iterable[Row], machine: Mapping[str, str]) -> str:
    """The machine, then the table; a column of the ratio beside each peer's."""
    rows = list(rows)
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    with_floor = any(row.floor is not None for row in rows)
    header = ["work", "shape", "unit", "ours"]
    for peer in peers:
        header += [peer, "ratio"]
    lines = [header + (["% of floor"] if with_floor else [])]
    for row in rows:
        line = [row.work, row.shape, row.unit, shown(row.ours)]
        for peer in peers:
            ratio = row.ratio(peer)
            line += [shown(row.peers.get(peer, "")), "" if ratio is None else f"{ratio:.2f}x"]
        if with_floor:
            percent = row.percent_of_floor()
            line.append("" if percent is None else f"{percent:.0f}")
        lines.append(line)
    facts = [f"{name}: {value}" for name, value in machine.items()]
    return "\n".join([*facts, "", *aligned(lines, text_columns=3)])


def aligned(lines: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """A header and rows as lines of a table; columns behind the first ones hold numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    table.insert(1, "  ".join("-" * width for width in widths))
    return table


def to_json(rows: Iterable[Row], machine: Mapping[str, str]) -> str:
    """One line."""
    listed = [
        {**asdict(row), "ratios": {peer: row.ratio(peer) for peer in row.peers}} for row in rows
    ]
    return json.dumps({"machine": dict(machine), "rows": listed})


def shown(value: float | str) -> str:
    """A cell of a table."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
