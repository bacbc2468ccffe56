"""The verbs of `nemotron-v3`."""

# A verb is the dataclass of that name in the file of the verb's name. Its fields are the options,
# its docstring is the help text, and `run` does the work. These files import neither torch nor a
# room before `run`, so that help and completion come at once.
VERBS = {
    "convert": "Convert",
    "demo": "Demo",
    "eval": "Eval",
    "generate": "Generate",
    "inspect": "Inspect",
    "report": "Report",
    "train": "Train",
    "warm": "Warm",
    "completion": "Completion",
}
