"""The command `nemotron-v3`: one file a verb, whose options are a dataclass."""
