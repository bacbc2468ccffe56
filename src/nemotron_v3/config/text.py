"""Text that can be written down."""


def check_text(text: str, what: str) -> None:
    """Raise `ValueError` where `text`, called `what`, holds half a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a character (the surrogate {text[error.start]!r}, at "
            f"{error.start}), which no tokenizer reads: give text"
        ) from None
