"""Print every comparison of `benchmarks/ratios.py` with its spread: ours over a peer or over the floor.

    python asv_bench/ratios.py --threads 2 --json asv_bench/results/ratios-epyc-2-cores.json
    python asv_bench/ratios.py --only 'lowrank_orth, 1024' --libraries torch

Each comparison is a process of its own, the two calls in turn; median ratio, its quartiles, median milliseconds of the
reference and of ours.  What a library lacks is left out.  A file that is there keeps what is not measured again.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import ratios
from benchmarks.common import LIBRARIES


def fresh(name: str, case: str, threads: int) -> dict[str, float] | None:
    """Measure in a fresh process; None where the library, or the comparison in it, is missing."""
    command = [sys.executable, __file__, "--in-process", name, case]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {case}:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(name: str, case: str) -> None:
    """Print what `fresh` reads."""
    try:
        print(json.dumps(ratios.measured(name, case)._asdict()))
    except NotImplementedError:
        print("null")


def main() -> None:
    """Measure what is asked for and print it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of the linear algebra libraries")
    parser.add_argument("--libraries", nargs="+", default=["numpy", "torch"], choices=LIBRARIES)
    parser.add_argument("--only", default="", metavar="REGEX", help="names of comparisons")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--in-process", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        measure(*args.in_process)
        return
    rows = {}
    if args.json and args.json.exists():
        rows = {(row["library"], row["case"]): row for row in json.loads(args.json.read_text())["ratios"]}
    for case in filter(re.compile(args.only).search, ratios.CASES):
        for name in args.libraries:
            found = fresh(name, case, args.threads)
            if found:
                figures = {k: float(f"{v:.4g}") for k, v in found.items()}
                rows[name, case] = {"library": name, "case": case, **figures}
                low, median, high, reference, ours = figures.values()
                print(
                    f"{median:7.3f} [{low:.3f}, {high:.3f}] {reference:9.1f} {ours:9.1f} ms  {name:6} {case}",
                    flush=True,
                )
    if args.json:
        made = {"python": platform.python_version(), "threads": args.threads}
        made |= {name: version(name) for name in ("numpy", "torch", "scipy")}
        kept = [rows[name, case] for case in ratios.CASES for name in LIBRARIES if (name, case) in rows]
        args.json.write_text(json.dumps(made | {"ratios": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
