"""Times one image through the published models, on one thread: `python -m benchmarks.latency`.

Each student of the pretrained MNIST ensemble, each prefix and the teacher, as `pkd_lightning.cost.latency` measures
them. With `--write` it writes docs/latency.json and the table of docs/performance.md, and refuses where other work
disturbed a measurement.
"""

import argparse
import json
import sys
from functools import partial

import torch

from benchmarks import tables
from benchmarks.timing import Row
from pkd_lightning.cost import latency
from pkd_lightning.evaluate import hardware, versions
from pkd_lightning.pretrained import load


def rows() -> list[Row]:
    """A row a student, with its prefix, then the teacher; milliseconds of CPU time."""
    ensemble, teacher = load("mnist")
    image = torch.zeros(1, 1, 28, 28)
    found = []
    for t, member in enumerate(ensemble.members):
        alone, together = latency(member, image), latency(partial(ensemble, members=t + 1), image)
        disturbed = alone.latency_disturbed or together.latency_disturbed
        found.append({"model": str(t + 1), "ms": alone.latency_ms, "prefix_ms": together.latency_ms})
        found[-1]["disturbed"] = disturbed
    last = latency(teacher, image)
    return [*found, {"model": "teacher", "ms": last.latency_ms, "disturbed": last.latency_disturbed}]


def main(arguments: list[str] | None = None) -> None:
    """Print the table; write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/, where nothing was disturbed")
    options = parser.parse_args(arguments)
    found = rows()
    print(tables.latency(found))
    disturbed = [row["model"] for row in found if row["disturbed"]]
    if disturbed:
        print(f"disturbed by other work: {', '.join(disturbed)}")
    if options.write:
        if disturbed:
            sys.exit("error: not written; run it again on a quiet machine")
        content = {"hardware": hardware(), "versions": versions(), "rows": found}
        tables.LATENCIES.write_text(json.dumps(content, indent=2) + "\n")
        tables.main([])


if __name__ == "__main__":
    main()
