"""Kills runs at random moments, goes on with them, and compares what they give: `python -m benchmarks.kills`.

A run is started again and again by the same command, and ended by SIGKILL after a random time, until it finishes. Its
results (times aside), students and teacher are then compared, bit by bit, with those of a run that nobody stopped. Of
each kill the script says at what the run was, and how old its newest checkpoint was: the seconds that are repeated.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
EVERY = 0.05  # minutes between two checkpoints
FLAGS = ("experiment=digits", "boosting.rounds=3", "logger=none", "trainer.progress=false", "threads=1",
         f"trainer.checkpoint_every={EVERY}")  # fmt: skip
TIMES = ("seconds", "wall_seconds", "latency", "hardware")  # of results.json: what no two runs have in common


def start(root: Path, seed: int, flags: list[str]) -> subprocess.Popen[bytes]:
    """Start the run of a seed below `root`."""
    command = [sys.executable, "-m", "pkd_lightning.run", *FLAGS, f"seed={seed}", f"run_root={root}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def newest(root: Path, since: float) -> float:
    """When something was last kept of the runs below `root`, in seconds since the epoch; `since`, if nothing was."""
    kept = (*root.rglob("*.ckpt"), *root.rglob("*.safetensors"), *root.rglob("DONE"), *root.rglob("results.json"))
    times = [since]
    for path in kept:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


def begun(root: Path, since: float) -> float | None:
    """When a process began to work, by its log; None before that."""
    for log in root.rglob("run.log"):
        if log.stat().st_mtime >= since:
            return since
    return None


def doing(root: Path) -> str:
    """The last line of the run's log."""
    lines = [line for log in root.rglob("run.log") for line in log.read_text(errors="replace").splitlines()]
    return lines[-1].split(": ", 1)[-1][:70] if lines else "starting"


def without_times(value: Any) -> Any:
    """Results without what is measured by a clock."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(name in k for name in TIMES)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def contents(root: Path) -> dict[str, Any]:
    """Results, students and teacher of the only run below `root`."""
    (run,) = (path.parent for path in root.rglob("DONE"))
    found: dict[str, Any] = {"results": without_times(json.loads((run / "results.json").read_text()))}
    for path in sorted([*run.glob("students/*.safetensors"), *run.glob("teacher/teacher.safetensors")]):
        found[path.name] = {name: value.numpy().tobytes() for name, value in load_file(path).items()}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Kill until there are so many kills; the exit code is 1 where a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--longest", type=float, default=12.0, help="seconds that a process works at most (12)")
    parser.add_argument("--draws", type=int, default=0, help="seed of the moments (0)")
    parser.add_argument("flags", nargs="*", help="more overrides of the runs")
    options = parser.parse_args(arguments)
    draw, folder = random.Random(options.draws), Path(mkdtemp(prefix="pkd-kills-"))
    repeated: list[float] = []
    lost = seed = 0
    while len(repeated) < options.kills:
        whole, stopped = folder / f"whole-{seed}", folder / f"stopped-{seed}"
        process = start(whole, seed, options.flags)
        if process.wait() != 0:
            raise SystemExit(f"a run that nobody stopped fails: {(process.stderr or sys.stdin).read()!r}")
        while True:
            since = time.time()
            process = start(stopped, seed, options.flags)
            work, at_most = None, draw.uniform(0.0, options.longest)
            while process.poll() is None and (work is None or time.time() - work < at_most):
                work = work or (time.time() if begun(stopped, since) else None)
                if len(repeated) == options.kills:  # it may end
                    process.wait()
                time.sleep(0.01)
            if process.poll() is not None:
                break
            now, kept = time.time(), newest(stopped, work or since)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            repeated.append(now - kept)
            print(f"kill {len(repeated):2}: {now - kept:4.1f} s repeated; {doing(stopped)}", flush=True)
        if process.returncode != 0:
            print(f"seed {seed}: exit code {process.returncode}: {(process.stderr or sys.stdin).read()!r}")
            lost += 1
        elif contents(whole) != contents(stopped):
            print(f"seed {seed}: other results than those of the run that nobody stopped")
            lost += 1
        else:
            print(f"seed {seed}: bit-identical", flush=True)
        seed += 1
    middle, most = statistics.median(repeated), max(repeated)
    seconds = f"median {middle:.1f} s, most {most:.1f} s, with a checkpoint every {60 * EVERY:.0f} s"
    print(f"{len(repeated)} kills in {seed} runs, {lost} results lost; repeated: {seconds}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
