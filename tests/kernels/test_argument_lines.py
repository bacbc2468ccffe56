"""Kernel files are mathematics, not lists of arguments."""

import re
from pathlib import Path

from nemotron_v3 import ops

# A line that holds nothing but a name and a comma: `name,`, `name: annotation,` or `name=name,`.
BARE = re.compile(r"^\s*([A-Za-z_]\w*)(\s*:\s*[^,=]+|\s*=\s*\1)?,\s*(#.*)?$")
MOST = 0.16


def test_few_lines_of_kernel_files_are_bare_arguments():
    room = Path(ops.__file__).parent
    shared = [room / "common" / f"{name}.py" for name in ("dot", "jit", "launch", "sums")]
    files = [*room.glob("*/kernels.py"), *room.glob("*/kernels/*.py"), *shared]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(files) > 30 and len(lines) > 5000
    bare = [line for line in lines if BARE.match(line)]
    assert len(bare) <= MOST * len(lines)
