"""What decides about the token ids of every row, and how two of these differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_v3.data.options import DataOptions
from nemotron_v3.data.store import TokenStore

NAMED = 5  # differences that are told one by one


@dataclass(frozen=True)
class FilesOfSource:
    """A source's weight, and the name of each of its files with a hash of its token ids.

    Raises:
        ValueError: a file that is no such pair.
    """

    weight: float
    files: list[list[str]]

    def __post_init__(self) -> None:
        if odd := [file for file in self.files if len(file) != 2]:
            raise ValueError(f"a file of the data is {odd[0]}: a name and a hash are needed")


@dataclass(frozen=True)
class Fingerprint:
    """What `fingerprint` gives, as it is read again."""

    tokens_per_row: int
    seed: int
    sources: list[FilesOfSource]


def fingerprint(options: DataOptions, stores: Sequence[TokenStore]) -> dict[str, Any]:
    """For JSON: the options that decide, and of each file its name and a hash of its token ids.

    A source's place is not in it: data that were moved are the same data.
    """
    return {
        "tokens_per_row": options.tokens_per_row,
        "seed": options.seed,
        "sources": [
            {
                "weight": source.weight,
                "files": [[file.name, file.digest] for file in store.about.files],
            }
            for source, store in zip(options.sources, stores, strict=True)
        ],
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the data of an earlier run differ from those of now, a line each; none if they are the
    same."""
    found = [
        f"{name} was {before[name]}, is {now[name]}"
        for name in ("tokens_per_row", "seed")
        if before[name] != now[name]
    ]
    counts = len(before["sources"]), len(now["sources"])
    if counts[0] != counts[1]:
        return [*found, f"there were {counts[0]} sources, there are {counts[1]}"]
    for number, (old, new) in enumerate(zip(before["sources"], now["sources"], strict=True)):
        if old["weight"] != new["weight"]:
            found.append(f"source {number}: weight was {old['weight']}, is {new['weight']}")
        found += _of_files(number, old["files"], new["files"])
    more = len(found) - NAMED
    return found if more <= 0 else [*found[:NAMED], f"and {more} more"]


def _of_files(number: int, old: list[list[str]], new: list[list[str]]) -> Iterator[str]:
    before, now = dict(old), dict(new)
    both = before.keys() & now.keys()
    changed = [name for name in before if name in both and before[name] != now[name]]
    if len(changed) == len(both) > 1:
        yield (
            f"source {number}: all files give other tokens: another tokenizer, chat template, "
            "train_on or field"
        )
    else:
        for name in changed:
            yield (
                f"source {number}: {name} gives other tokens: it was changed, or read with another "
                "tokenizer, chat template, train_on or field"
            )
    for name in sorted(before.keys() - both):
        yield f"source {number}: {name} is not there any more"
    for name in sorted(now.keys() - both):
        yield f"source {number}: {name} was not there"
    if not changed and before.keys() == now.keys() and old != new:
        yield f"source {number}: its files come in another order"
