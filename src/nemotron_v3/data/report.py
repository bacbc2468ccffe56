"""What was found in the data, to be told before training."""

from dataclasses import dataclass

from nemotron_v3.data.store import BadLine

SHOWN = 10


@dataclass(frozen=True)
class SourceReport:
    """What one source gave.

    Attributes:
        path: as given.
        weight: passes in each epoch.
        files: read.
        documents, tokens: of one pass.
        targets: tokens of one pass that are predicted and count.
        bad: lines and files that are no document, and why.
        empty: documents without text, left out.
        without_targets: chats without a word of the assistant's, left out.
        cut: documents longer than a row.
        stretches_left_out: of cut chats, stretches without a target.
        files_left_out: files in the folder with other endings, by ending, and what is no file.
    """

    path: str
    weight: float
    files: int
    documents: int
    tokens: int
    bad: tuple[BadLine, ...]
    empty: int
    without_targets: int
    cut: int
    stretches_left_out: int
    files_left_out: dict[str, int]


@dataclass(frozen=True)
class DataReport:
    """What the sources gave, and how large the sum is."""

    sources: tuple[SourceReport, ...]

    @property
    def documents(self) -> int:
        """Of one pass over each source."""
        return sum(source.documents for source in self.sources)

    @property
    def tokens(self) -> int:
        """Of one pass over each source."""
        return sum(source.tokens for source in self.sources)

    @property
    def bad(self) -> tuple[BadLine, ...]:
        return tuple(line for source in self.sources for line in source.bad)

    @property
    def cut(self) -> int:
        return sum(source.cut for source in self.sources)

    def lines(self) -> list[str]:
        """A line for each source, and one for each fact that somebody should know."""
        told = []
        total = sum(source.weight * source.tokens for source in self.sources)
        for source in self.sources:
            share = source.weight * source.tokens / total
            told.append(
                f"{source.path}: {source.documents:,} documents, {source.tokens:,} tokens in "
                f"{source.files:,} files; {share:.1%} of an epoch (weight {source.weight:g})"
            )
            facts = [
                (source.cut, "documents are longer than a row and are cut"),
                (source.empty, "documents are empty and left out"),
                (source.without_targets, "chats have no word of the assistant's: left out"),
                (source.stretches_left_out, "stretches of cut chats have no target: left out"),
                (sum(source.files_left_out.values()), _left_out(source)),
                (len(source.bad), "lines are bad and left out:"),
            ]
            told += [f"  {count:,} {what}" for count, what in facts if count]
            told += [f"    {line}" for line in source.bad[:SHOWN]]
            if len(source.bad) > SHOWN:
                told.append(f"    and {len(source.bad) - SHOWN} more")
        return told

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _left_out(source: SourceReport) -> str:
    return f"files of other kinds ({', '.join(source.files_left_out)}) are left out"
