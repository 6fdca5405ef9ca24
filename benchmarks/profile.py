"""Where the time of one training step goes, by operation: `python -m benchmarks.profile S7`."""

import argparse

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import BEST, CIFAR, PATCHES, STUDENTS, TEACHER, classifier, shape_of, size_of
from benchmarks.steps import step_call

MODELS = {**STUDENTS, **TEACHER, **PATCHES, **BEST, **CIFAR}


def main(arguments: list[str] | None = None) -> None:
    """Print the operations that take most of a step's own time, on one thread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size, shape = size_of(options.model), shape_of(options.model)
    step = step_call(classifier(MODELS[options.model], shape), size, shape)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(options.steps):
            step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    title = f"{options.model}, batch {size}: {total / 1000 / options.steps:.3g} ms a step, with the profiler's own"
    table = Table(title, "share", "ms a step", "calls a step", box=box.SIMPLE)
    for event in events[:10]:
        own, calls = event.self_cpu_time_total, event.count / options.steps
        table.add_row(event.key, f"{own / total:.1%}", f"{own / 1000 / options.steps:.3g}", f"{calls:g}")
    rest = sum(event.self_cpu_time_total for event in events[10:])
    table.add_row(f"{len(events[10:])} others", f"{rest / total:.1%}", f"{rest / 1000 / options.steps:.3g}", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
