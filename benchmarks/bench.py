"""Times everything on this machine, the scan first and a round's passes last, and says which target falls short:
`make bench`, or `python -m benchmarks.bench --only scan,fit`.

One thread of torch, and two where a row says so. See `benchmarks.timing` for how it is timed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import block, data, fits, rounds, scan, steps
from benchmarks.report import conclude, show, write
from benchmarks.timing import FEWEST, Row

SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "scan": scan.rows,
    "block": block.rows,
    "step": steps.rows,
    "fit": fits.rows,
    "data": data.rows,
    "rounds": lambda count: [*rounds.rows(count), rounds.memory_row()],
}


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each section and the targets that fall short, write benchmarks/results/cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; fewer of what takes seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.rounds < FEWEST:
        parser.error(f"--rounds must be at least {FEWEST}")
    torch.set_num_threads(1)
    start, found, seconds = time.perf_counter(), [], {}
    for name in names:
        began = time.perf_counter()
        rows = SECTIONS[name](options.rounds)
        found += [{"section": name, **row} for row in rows]
        seconds[name] = round(time.perf_counter() - began, 1)
        show(f"{name} ({seconds[name]:.0f} s)", rows)
    print(f"{time.perf_counter() - start:.0f} s in all")
    conclude(found)
    write(options.out, found, rounds=options.rounds, seconds=seconds)


if __name__ == "__main__":
    main()
