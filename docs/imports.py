"""The package's imports by floors: `python -m docs.imports` prints them as a diagram, `--write` into docs/imports.md.

A module may import those of its own floor and of the floors below, inside functions too; there is no circle.
"""

import argparse
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "pkd_lightning"
PAGE = Path(__file__).parent / "imports.md"
# from the top, each with what it is for; a package stands for all of its modules
FLOORS = (
    (
        "what a user calls",
        (
            "__main__", "child", "run", "finish", "distil", "live", "predict", "sweeps", "cli", "commands", "dashboard",
            "naming", "report", "pretrained", "export",
        ),
    ),
    ("from a configuration to checked parts", ("assembling", "experiment", "trial")),
    ("results, reports, run directories", ("evaluate", "growth", "reporting", "rundir")),
    ("rounds of boosting", ("boosting",)),
    (
        "a teacher, an ensemble",
        ("teacher", "teachers", "shared_teacher", "ensemble", "saved", "parallel", "compiled", "packing", "exits"),
    ),
    (
        "one fit, its weights and costs",
        (
            "fitting", "fit_checkpoint", "fit_module", "graphs", "processes", "weights", "rounding", "cost",
            "predicting", "trainer",
        ),
    ),
    ("terms of knowledge", ("knowledge",)),
    ("models and data", ("models", "data", "inputs", "tasks")),
    ("compiled kernels", ("kernels",)),
    (
        "foundations",
        (
            "checkpoint", "checks", "composition", "earlier", "errors", "loggers", "locks", "losses", "matrix",
            "memory", "metrics", "outputs", "prefixes", "process", "progress", "ranks", "results", "schedules",
            "seeding", "wandb_tracker", "_torchvision", "__init__",
        ),
    ),
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Each module of the package by its name within it."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, wherever it does."""
    known, found = modules(), {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == PACKAGE:
                inside = str(node.module).removeprefix(PACKAGE).lstrip(".")
                for imported in (f"{inside}.{alias.name}".lstrip(".") for alias in node.names):
                    found[name].add(imported if imported in known else inside or "__init__")
            elif isinstance(node, ast.Import):
                found[name] |= {
                    alias.name.removeprefix(f"{PACKAGE}.") for alias in node.names if alias.name.startswith(PACKAGE)
                }
        found[name] -= {name}
    return found


def part(module: str) -> str:
    """The module or package of the top level that a module belongs to."""
    return module.split(".")[0]


def faults() -> list[str]:
    """Circles, imports of a higher floor, and modules without a floor."""
    graph = imports()
    height = {name: -i for i, (_, names) in enumerate(FLOORS) for name in names}
    found = [f"{module} is on no floor" for module in graph if part(module) not in height]
    for module, below in sorted(graph.items()):
        for other in sorted(below):
            if height.get(part(module), 0) < height.get(part(other), 0):
                found.append(f"{module} imports {other}, of a higher floor")
    for edges in (graph, between_parts(graph)):
        try:
            TopologicalSorter(edges).prepare()
        except CycleError as error:
            found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def between_parts(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports between modules and packages of the top level."""
    edges: dict[str, set[str]] = {part(module): set() for module in graph}
    for module, below in graph.items():
        edges[part(module)] |= set(map(part, below)) - {part(module)}
    return edges


def diagram() -> str:
    """The floors with their parts, and the imports between parts, as a Mermaid flowchart.

    An import that follows from others is left out: where a imports b and c, and b imports c, a -> c is not drawn.
    """
    edges = between_parts(imports())
    reach = {name: _reached(name, edges) for name in edges}
    lines = ["flowchart TB"]
    for i, (title, names) in enumerate(FLOORS):
        lines += [f'  subgraph floor{i}["{title}"]', "    direction LR", *(f"    {name}" for name in names), "  end"]
    for name in (name for _, names in FLOORS for name in names):
        direct = {other for other in edges[name] if not any(other in reach[third] for third in edges[name] - {other})}
        lines += [f"  {name} --> {other}" for other in sorted(direct)]
    return "\n".join(lines)


def _reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    open_ = [start]
    while open_:
        new = edges[open_.pop()] - found
        found |= new
        open_ += new
    return found


def page() -> str:
    """The content of docs/imports.md."""
    return f"# The package's imports by floors\n\n{__doc__}\n```mermaid\n{diagram()}\n```\n"


def main(arguments: list[str] | None = None) -> None:
    """Print or write the page, and what is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/imports.md")
    options = parser.parse_args(arguments)
    if options.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
    for fault in faults():
        print(fault)


if __name__ == "__main__":
    main()
