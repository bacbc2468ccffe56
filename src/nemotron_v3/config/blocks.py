"""The four block types of the hybrid and the three vocabularies that files spell them in."""

from collections.abc import Iterable

BLOCK_TYPES = ("mamba", "attention", "mlp", "moe")
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}

# One row per vocabulary: canonical name -> the word a file of that vocabulary uses.
LETTERS = {block: letter for letter, block in PATTERN.items()}
RELEASED = {block: block for block in BLOCK_TYPES}
RENAMED = RELEASED | {"mamba": "linear_attention", "attention": "full_attention"}
VOCABULARIES = (RELEASED, RENAMED, LETTERS)

_CANONICAL = {word: block for words in VOCABULARIES for block, word in words.items()}
_LEGEND = ", ".join(f"{letter} ({block})" for letter, block in PATTERN.items())


def canonical_block_type(name: str) -> str:
    """The canonical name (one of `BLOCK_TYPES`) of a block type in any spelling.

    Raises `ValueError` for a name that is in none of the vocabularies.
    """
    if isinstance(name, str) and name in _CANONICAL:
        return _CANONICAL[name]
    raise ValueError(
        f"Invalid block_type {name!r}: use one of {', '.join(BLOCK_TYPES)} "
        f"(or {RENAMED['mamba']}, {RENAMED['attention']}, or a pattern letter {_LEGEND})"
    )


# Letters of Megatron-LM's hybrid models that no release has used, and what they stand for.
NEWER = {
    "G": "a Gated DeltaNet block",
    "D": "a block of sparse attention",
    "+": "a block of multi-head latent attention",
    "/": "the border of multi-token prediction, which mtp_hybrid_override_pattern tells here",
}
PIPELINE_CUT = "|"  # between two blocks, where Megatron-LM changes the process


def parse_pattern(name: str, pattern: str) -> tuple[str, ...]:
    """The block types that a pattern string such as `"MEM*-"` stands for.

    `name` is what the error calls the string. Raises `ValueError` with the letter and its
    position (counted from 0). `|`, a cut of a pipeline, is no block.
    """
    for position, letter in enumerate(pattern):
        if letter not in PATTERN and letter != PIPELINE_CUT:
            meaning = f" ({NEWER[letter]})" if letter in NEWER else ""
            raise ValueError(
                f"{name} has {letter!r} at position {position} of {pattern!r}{meaning}: "
                f"the pattern letters are {_LEGEND}"
            )
    return tuple(PATTERN[letter] for letter in pattern if letter != PIPELINE_CUT)


def to_pattern(blocks: Iterable[str]) -> str:
    """The pattern string of canonical block types."""
    return "".join(LETTERS[block] for block in blocks)


def vocabulary_of(words: Iterable[str]) -> dict[str, str]:
    """The vocabulary that `words` were taken from (the released one where several fit)."""
    words = set(words)
    return next((v for v in VOCABULARIES if words <= set(v.values())), RELEASED)
