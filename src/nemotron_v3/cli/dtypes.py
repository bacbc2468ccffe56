"""Names of dtypes on the command line."""

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float64": "float64",
    "fp64": "float64",
}


def dtype_name(given: str) -> str:
    """torch's name of the dtype that the user gave, such as `bfloat16` for `bf16`.

    Raises:
        ValueError: no dtype of weights.
    """
    name = given.lower().removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {given!r}: give one of {', '.join(DTYPES)}")
    return DTYPES[name]
