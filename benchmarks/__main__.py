"""The command line of the benchmarks."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import ROOT, machine
from benchmarks.table import Row, render, to_json

RESULTS = ROOT / "benchmarks" / "results"

# A suite is a module with `rows()`; a GPU's runs only where there is one.
SUITES = {
    "attention_gpu": "attention over packs and long documents on a GPU, beside PyTorch's own",
    "cpu": "training, the experts, the loss and decoding on a CPU, beside transformers",
    "cross_entropy_gpu": "the loss over a vocabulary of 131 072 on a GPU",
    "decode_gpu": "decoding of a whole model of Nano's shape on a GPU, and each kernel alone",
    "hf_cpu": "training an accelerated transformers model on a CPU, beside the plain one",
    "hf_gpu": "the same on a GPU, 7 blocks of Nano's width in bf16",
    "lengths_gpu": "training and prefill on a GPU with lengths drawn anew in every step",
    "mamba2_gpu": "the core of a Mamba-2 mixer on a GPU",
    "moe_gpu": "a mixture-of-experts block on a GPU, beside transformers",
    "segments_gpu": "training in segments in time on a GPU, up to a million tokens",
    "training_gpu": "the loop of train and LoRA of a whole model on a GPU",
}


def main(arguments: Sequence[str] | None = None) -> None:
    suites = "\n".join(f"  {name:<18} {what}" for name, what in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ours beside its peers, in one table. The last line is the same as JSON, which "
        "is also written to a file.",
        epilog=f"suites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="by default all that can run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--threads", type=int, help="of PyTorch, by default its own choice")
    options = parser.parse_args(arguments)
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"unknown suite {name!r}: choose from {', '.join(SUITES)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for name in options.suites or runnable():
        run(name, options.out)


def runnable() -> list[str]:
    return [name for name in SUITES if not name.endswith("_gpu") or torch.cuda.is_available()]


def run(name: str, folder: Path) -> None:
    facts = {"suite": name, **machine()}
    rows: list[Row] = []
    for row in importlib.import_module(f"benchmarks.{name}").rows():
        rows.append(row)
        print(f"measured: {row.work}, {row.shape}, {row.unit}", file=sys.stderr, flush=True)
    print(render(rows, facts))
    line = to_json(rows, facts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{facts['commit']}.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
