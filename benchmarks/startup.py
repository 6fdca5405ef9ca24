"""Times how long it takes to start: `python -m benchmarks.startup [--starts N]`.

Each row is a process of its own: an import above `import torch`, or a command from its start to its end. Reported are
the medians of several starts, in turn. Limits are printed beside them.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from statistics import median

from PIL import Image

from benchmarks.report import conclude, show
from benchmarks.timing import FEWEST, Row, at_most, measured

# seconds, printed by the process itself
IMPORT = "import time, torch; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
LOADED = "from pkd_lightning.pretrained import load; load('mnist')"
ASKED = (
    "from pkd_lightning.ensemble import ProgressiveEnsemble;"
    " ProgressiveEnsemble.load('mnist').predict(torch.zeros(1, 28, 28, dtype=torch.uint8))"
)
IMPORTS = {
    "import pkd_lightning.ensemble": ("import pkd_lightning.ensemble", 0.3),
    "import pkd_lightning.pretrained": ("import pkd_lightning.pretrained", 0.3),
    "load the pretrained ensemble": (LOADED, None),
    "load it and ask all students": (ASKED, None),
}
RUN = ("experiment=digits", "boosting.rounds=1", "trainer.max_epochs=1", "logger=none", "data.limit=200")


def imported(code: str) -> float:
    """Seconds of some code above `import torch`, in a process of its own."""
    command = [sys.executable, "-c", IMPORT.format(code=code)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def answered(*arguments: str) -> float:
    """Seconds of a command of `pkd`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pkd_lightning", *arguments], capture_output=True, check=True)
    return time.perf_counter() - start


def rows(starts: int) -> list[Row]:
    """A row an import and a command, each started so many times, in turn, after once to have the files in memory."""
    with tempfile.TemporaryDirectory() as root:
        finished, image = (*RUN, f"run_root={root}"), f"{root}/image.png"
        Image.new("L", (28, 28)).save(image)
        answered(*finished)
        calls = {what: (partial(imported, code), limit) for what, (code, limit) in IMPORTS.items()}
        calls["pkd --help"] = partial(answered, "--help"), 2.0
        calls["pkd showing a finished run"] = partial(answered, *finished), 2.0
        calls["pkd predict, one image, all students"] = partial(answered, "predict", "mnist", image), None
        times: dict[str, list[float]] = {what: [] for what in calls}
        for i in range(starts + 1):
            for what, (call, _) in calls.items():
                seconds = call()
                if i > 0:
                    times[what].append(seconds)
    found = []
    for what, (_, limit) in calls.items():
        target = None if limit is None else at_most(limit)
        found.append(measured(what, [1000 * second for second in times[what]], median(times[what]), "s", target))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="of each")
    options = parser.parse_args(arguments)
    if options.starts < FEWEST:
        parser.error(f"--starts must be at least {FEWEST}")
    found = rows(options.starts)
    show("start", found)
    conclude(found)


if __name__ == "__main__":
    main()
