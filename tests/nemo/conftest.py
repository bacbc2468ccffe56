"""Tests beside the real NeMo AutoModel: collected where it is installed (`make test-automodel`)."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

WITHOUT = "test_versions.py"  # the one that needs no AutoModel

collect_ignore: list[str] = []
if find_spec("nemo_automodel") is None:
    collect_ignore = [p.name for p in Path(__file__).parent.glob("test_*.py") if p.name != WITHOUT]
else:
    # Its LoRA kernels name an argument that they do not have, which Triton 3.9 refuses at import;
    # without Triton it takes its own PyTorch form, which is the one that runs on a CPU anyway.
    sys.modules["triton"] = None
    # What it compiles (activations of experts) takes a minute on a CPU; its numbers are the same.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
