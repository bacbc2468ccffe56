"""What the pages show: the picture of the front page, and which model fits on which machine.

    python -m benchmarks.pages

The picture draws figures that stand in the results pages, found there by their row; the tables are
computed by the cost model. A test makes both again and compares.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from nemotron_v3.adapters import coverage, lora_targets
from nemotron_v3.config import PRESETS, NemotronV3Config
from nemotron_v3.model import cost

DOCS = Path(__file__).parents[1] / "docs"
PICTURE = DOCS / "assets" / "peers.svg"
MACHINES_PAGE = DOCS / "which-machine.md"
BEGIN, END = "<!-- computed by benchmarks/pages.py -->", "<!-- end -->"
GIB = 2**30
# Okabe and Ito's palette, which readers who are blind to some colours can tell apart.
OURS, PEER = "#0072B2", "#E69F00"

# A row of a results page: the page, what the row begins with, the columns of the peer and of ours,
# and what the picture says of it. Figures are times but where `rate` says otherwise.
BARS = (
    ("results/mamba2.md", "core, forward + backward, 1x8192, eager", 2, 3,
     "Mamba-2 core, H100", "mamba_ssm", False),
    ("results/moe.md", "Nano, 8192, forward + backward", 1, 2,
     "Mixture of experts, H100", "transformers 5.17", False),
    ("transformers.md", "1 x 4096", 3, 1,
     "7 blocks of Nano's width, H100", "transformers 5.17 in plain PyTorch", False),
    ("transformers.md", "1 x 4096", 2, 1,
     "A small model, 2 CPU cores", "transformers 5.23", True),
    ("transformers.md", "documents of 512, 300, 180", 2, 1,
     "The same, four documents padded", "transformers 5.23", True),
)  # fmt: skip


def ratios() -> Iterator[tuple[str, str, float]]:
    """What was measured, the peer's name, and how many times as fast this package was."""
    for page, row, peer, ours, label, name, is_rate in BARS:
        lines = (DOCS / page).read_text("utf-8").splitlines()
        cells = [line.strip("| ").split("|") for line in lines if line.startswith(f"| {row}")]
        # Rates stand in the first table of the page, times in the last one.
        found = cells[0] if is_rate else cells[-1]
        theirs, mine = (_number(found[column]) for column in (peer, ours))
        yield label, name, mine / theirs if is_rate else theirs / mine


def _number(cell: str) -> float:
    """The first number of a cell; of a range its lower end, which favours the peer."""
    match = re.match(r"\s*([\d ]*\d(?:\.\d+)?)", cell)
    assert match, cell
    return float(match[1].replace(" ", ""))


def draw(path: Path = PICTURE) -> None:
    """Write the picture: how many times as fast as a peer, a bar each."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "nemotron-v3"  # the same figures, the same bytes
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib.figure import Figure

    rows = list(ratios())
    longest = max(ratio for *_, ratio in rows)
    # Labels stand above their bars, so that the picture can be read on a phone.
    figure = Figure(figsize=(7, 0.8 * len(rows) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    for place, (label, peer, ratio) in enumerate(rows):
        axes.barh(place, ratio, height=0.36, color=OURS)
        axes.plot([1, 1], [place - 0.18, place + 0.18], color=PEER, linewidth=4)
        axes.text(0, place - 0.27, f"{label}: beside {peer}", va="bottom", fontsize=12)
        axes.text(ratio + 0.1, place, f"{ratio:.1f}x", va="center", fontsize=13, weight="bold")
    axes.set(xlim=(0, 1.08 * longest), ylim=(len(rows) - 0.6, -0.75), yticks=[], xticks=[1, 5, 10])
    axes.tick_params(labelsize=12)
    axes.set_xlabel("times as fast as the peer, whose speed is the mark at 1", fontsize=12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


# ------------------------------------------------------------------------------- which machine

MACHINES = (("16 GB", 16), ("24 GB", 24), ("48 GB", 48), ("80 GB", 80), ("141 GB", 141),
            ("8 x 80 GB", 640), ("8 x 141 GB", 1128))  # fmt: skip
USABLE = 0.9  # of a machine's memory; the rest is the driver's, the allocator's and the workspace's
CONTEXT = 8192
RANK = 16
# bf16 weight and gradient, fp32 copy of the weight, and AdamW's two moments.
BYTES_FULL = 2 + 2 + 4 + 4 + 4


def needs(name: str) -> dict[str, float]:
    """GiB that one row of `CONTEXT` tokens takes, by what is done; activations left out."""
    config = NemotronV3Config.preset(name)
    dtype = torch.bfloat16
    states = cost.ssm_state_bytes(config) + cost.conv_state_bytes(config, dtype)
    kv = cost.kv_bytes_per_token(config, dtype)
    count = cost.parameters(config).total
    adapter = coverage(config, lora_targets(config), rank=RANK).as_dict()["adapter_parameters"]
    weights = count * dtype.itemsize
    return {
        "parameters": count / 1e9,
        "weights": weights / GIB,
        "states": states / GIB,
        "keys": kv * 131_072 / GIB,
        "generate": (weights + states + kv * CONTEXT) / GIB,
        "LoRA": (weights + adapter * BYTES_FULL) / GIB,
        "full": count * BYTES_FULL / GIB,
    }


def tables() -> str:
    """Both tables of the page."""
    lines = [
        "| model | " + " | ".join(name for name, _ in MACHINES) + " |",
        "|---|" + ":-:|" * len(MACHINES),
    ]
    for model in PRESETS:
        need = needs(model)
        cells = []
        for _, memory in MACHINES:
            fits = [kind for kind in ("generate", "LoRA", "full") if need[kind] < USABLE * memory]
            cells.append(" ".join(kind[0].upper() for kind in fits) or "-")
        lines.append(f"| `{model}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| model | parameters | weights, bf16 | states a row | keys and values, 131 072 tokens "
        "| LoRA | full |",
        "|---|" + "---:|" * 6,
    ]
    for model in PRESETS:
        n = needs(model)
        lines.append(
            f"| `{model}` | {n['parameters']:.1f} B | {n['weights']:,.1f} | {n['states']:.2f} "
            f"| {n['keys']:.2f} | {n['LoRA']:,.0f} | {n['full']:,.0f} |"
        )
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    draw()
    MACHINES_PAGE.write_text(with_tables(MACHINES_PAGE.read_text("utf-8")), encoding="utf-8")
    print(f"{PICTURE} and {MACHINES_PAGE}")
