"""Mutates the wiring, line by line, and runs the tests that reach the line: `python -m benchmarks.mutation`.

Each mutant is one small change of one expression or statement: a comparison, an operator, a constant, a condition, a
call left out, two arguments exchanged. It dies if a test fails. Words are not mutated: messages, log lines, types.

First the tests of the wiring run once under coverage, so that a mutant is shown only to those that reach its line: the
quick ones that reach little else first. A mutant that none of them kills within `--seconds` of processor time survives,
so the figure is a lower bound. What was found is kept in `--out`, and the same command goes on from there. Survivors
that change no behaviour are named, with the reason, in benchmarks/equivalent.toml.
"""

import argparse
import ast
import copy
import hashlib
import importlib.abc
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "pkd_lightning"
WIRING = (
    "experiment", "teacher", "shared_teacher", "fitting", "fit_module", "fit_checkpoint", "evaluate",
    "ensemble", "losses", "metrics", "prefixes", "schedules", "tasks",
    "boosting.combine", "boosting.loop", "boosting.objectives", "boosting.partial", "boosting.residuals",
    "boosting.round", "boosting.state", "boosting.student", "boosting.weak_learner",
)  # fmt: skip
TESTS = tuple(
    f"tests/test_{name}.py" for name in (
        "configs", "earlier", "ensemble", "evaluate", "fit_resume", "fit_wiring", "fitting", "full_disk", "growth",
        "identity", "left_behind", "locks", "loop", "losses", "modes", "outside", "pretrained", "promises", "published",
        "residuals", "resume", "run", "shared_teachers", "teacher", "teachers_trainer", "trial", "trust",
        "unfinished", "wiring",
    )
)  # fmt: skip
# not wiring, and slow to import; they are loaded once, and every mutant is a fork of this process
LIBRARIES = (
    "torch", "lightning.pytorch", "torchmetrics", "torchvision", "hydra", "numba", "scipy.optimize", "sklearn.datasets",
    "matplotlib.pyplot", "fvcore.nn", "wandb", "tensorboard", "hypothesis", "torch._dynamo",
    f"{PACKAGE}.kernels.scan.cpu", f"{PACKAGE}.models.classifier", f"{PACKAGE}.reporting.page",
)  # fmt: skip

Comparisons = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
Operators = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip

DECIDED = (ast.Compare, ast.BoolOp, ast.UnaryOp)  # conditions that are changed in their own right


@dataclass(frozen=True)
class Mutant:
    """One change: its module and line, the code before and after, and the whole changed module."""

    module: str
    line: int
    before: str
    after: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """What identifies it while its line stays as it is, wherever the line is."""
        return f"{self.module}: {self.before} -> {self.after}"


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Small changes of one node, each a copy."""

    def changed(**fields: Any) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[op]) if type(op) in Comparisons:
            yield changed(ops=[Comparisons[type(op)]()])
        case ast.BinOp(op=op, left=left, right=right) if (
            type(op) in Operators and not _words(left) and not _words(right)
        ):
            yield changed(op=Operators[type(op)]())
        case ast.AugAssign(op=op) if type(op) in Operators:
            yield changed(op=Operators[type(op)]())
        case ast.BoolOp(op=op, values=values):
            yield changed(op=Operators[type(op)]())
            if len(values) > 2:
                yield changed(values=values[1:])
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):  # an axis, where 1 is the same one of two
            yield ast.Constant(0)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool() as value):
            yield changed(value=not value)
        case ast.Constant(value=int() | float() as value):
            yield changed(value=value + 1)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not isinstance(test, DECIDED):
            yield changed(test=ast.UnaryOp(ast.Not(), test))
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Call(args=args, keywords=keywords):
            for i in range(len(args) - 1):
                if _alike(args[i], args[i + 1]):
                    yield changed(args=[*args[:i], args[i + 1], args[i], *args[i + 2 :]])
            for i in [i for i, keyword in enumerate(keywords) if keyword.arg != "strict"]:
                yield changed(keywords=keywords[:i] + keywords[i + 1 :])
        case ast.Tuple(elts=[first, second], ctx=ast.Load()) if _alike(first, second):
            yield changed(elts=[second, first])
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            yield changed(value=ast.Constant(None))
        case ast.Assign(targets=[ast.Attribute()], value=value) if not isinstance(value, ast.Constant):
            yield changed(value=ast.Constant(None))


def _alike(first: ast.AST, second: ast.AST) -> bool:
    """Whether two expressions may be exchanged by mistake: names, attributes, parts of something."""
    kinds = (ast.Name, ast.Attribute, ast.Subscript, ast.BinOp, ast.Constant)
    return type(first) is type(second) and isinstance(first, kinds) and ast.dump(first) != ast.dump(second)


def _words(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _skipped(node: ast.AST) -> bool:
    """Messages, log lines, types, imports, and that lengths which are equal are checked to be."""
    match node:
        case ast.keyword(arg="strict"):
            return True
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Assert() | ast.Raise():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="logger" | "warnings" | "logging"))):
            return True
        case ast.Call(func=ast.Name(id="RunError" | "ConfigError" | "ValueError" | "getattr" | "isinstance" | "cast")):
            return True
    return False


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """The parts of a node that are mutated, each with its place: not annotations, decorators and base classes."""
    left_out = {"annotation", "returns", "decorator_list", "bases", "type_comment"}
    for name, value in ast.iter_fields(node):
        if name in left_out:
            continue
        if isinstance(value, ast.AST):
            yield value, name, None
        elif isinstance(value, list):
            for i, part in enumerate(value):
                if isinstance(part, ast.AST):
                    yield part, name, i


def mutants(module: str) -> list[Mutant]:
    """All mutants of a module of the package, in the order of its lines."""
    source = (ROOT / PACKAGE / f"{module.replace('.', '/')}.py").read_text()
    found: list[Mutant] = []

    def visit(parent: ast.AST, statement: ast.stmt | None) -> None:
        for node, field, i in list(_children(parent)):
            if _skipped(node) or (isinstance(node, ast.Expr) and _skipped(node.value)):
                continue
            around = node if isinstance(node, ast.stmt) else statement
            if around is not None and not isinstance(around, (ast.ClassDef, ast.FunctionDef)):
                for variant in variants(node):
                    ast.copy_location(variant, node)
                    before = _brief(around)
                    place = getattr(parent, field)
                    if i is None:
                        setattr(parent, field, variant)
                    else:
                        place[i] = variant
                    after = _brief(variant if node is around else around)
                    whole = ast.fix_missing_locations(copy.deepcopy(tree))
                    if i is None:
                        setattr(parent, field, node)
                    else:
                        place[i] = node
                    found.append(Mutant(module, around.lineno, before, after, whole))
            visit(node, around)

    tree = ast.parse(source)
    visit(tree, None)
    return list({mutant.name: mutant for mutant in found}.values())


def _brief(statement: ast.AST) -> str:
    """The code of a statement, of a compound one its first line."""
    return ast.unparse(statement).split("\n")[0]


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from its changed tree."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant, self.module = mutant, f"{PACKAGE}.{mutant.module}"
        self.path = ROOT / f"{self.module.replace('.', '/')}.py"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """A specification of the one module."""
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def exec_module(self, module: Any) -> None:
        """Run the changed code."""
        exec(compile(self.mutant.tree, str(self.path), "exec"), module.__dict__)


WAITED = 6  # times the processor time that is allowed: other work wants the cores, too


def child(work: Any, seconds: float, log: Path = Path(os.devnull)) -> int:
    """Run `work` in a fork of this process; its exit code, or -1 where it took more than `seconds` of processor time.

    What it prints goes to `log`.
    """
    sys.stdout.flush()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), resource.RLIM_INFINITY))
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            code = work()
        except BaseException:  # a mutant may raise anything
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(output)
    end = time.monotonic() + WAITED * seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return -1 if code == -signal.SIGXCPU else code % 256
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def pytest_of(tests: Sequence[str], plugins: Sequence[object] = ()) -> int:
    """Run tests in this process, until the first that fails."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    return int(pytest.main([*options, *tests], plugins=list(plugins)))


class Reached:
    """A pytest plugin: how long each test takes, and the lines of the wiring it runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, dict[str, float]()
        self.coverage = coverage.Coverage(
            data_file=None, include=[str(ROOT / PACKAGE / "*")], config_file=False, concurrency="thread"
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> Iterator[None]:
        """Time a test, and put down what it runs under its name."""
        self.coverage.switch_context(item.nodeid)
        start = time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = time.perf_counter() - start
        return result

    def pytest_sessionstart(self) -> None:
        """Start before the modules are imported."""
        self.coverage.start()

    def pytest_sessionfinish(self) -> None:
        """Write what was found."""
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {}
        for module in WIRING:
            by_line = data.contexts_by_lineno(str(ROOT / PACKAGE / f"{module.replace('.', '/')}.py"))
            lines[module] = {str(line): [name for name in names if name] for line, names in by_line.items()}
        self.path.write_text(json.dumps({"seconds": self.seconds, "lines": lines}))


class Limited:
    """A pytest plugin: a test that takes far longer than without a mutant fails, as one that never ends."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        """Have an alarm set while the test runs."""

        def late(number: int, frame: Any) -> None:
            raise TimeoutError(f"{item.nodeid} takes too long")

        signal.signal(signal.SIGPROF, late)
        signal.setitimer(signal.ITIMER_PROF, 5 + 5 * self.seconds.get(item.nodeid, 0))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def reaching(mutant: Mutant, reached: dict[str, Any]) -> list[str]:
    """The tests that run the mutant's line, or of a line that is run by an import those of its module.

    First come those that are quick and reach little: they are the ones that are about the line.
    """
    lines = reached["lines"][mutant.module]
    tests = lines.get(str(mutant.line)) or sorted({test for names in lines.values() for test in names})
    return sorted(tests, key=lambda test: reached["breadth"][test] * (0.3 + float(reached["seconds"][test])))


def main(arguments: list[str] | None = None) -> None:
    """Show mutants to the tests; print the survivors and the share of those that die."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=WIRING, help=f"of {', '.join(WIRING)}")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files of tests (those of the wiring)")
    parser.add_argument("--seconds", type=float, default=60, help="of processor time for a mutant, at most (60)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutation", help="what is kept (build/mutation)")
    parser.add_argument("--again", action="store_true", help="show those that survived to the tests of today")
    parser.add_argument("--sample", type=float, default=1, help="of the mutants, drawn by their names (1: all)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args(arguments)
    chosen = [mutant for module in options.modules for mutant in mutants(module) if drawn(mutant) < options.sample]
    if options.list:
        print(*(f"{mutant.line:4} {mutant.name}" for mutant in chosen), f"{len(chosen)} mutants", sep="\n")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for library in LIBRARIES:
        importlib.import_module(library)
    loaded = [name for name in WIRING if f"{PACKAGE}.{name}" in sys.modules]
    assert not loaded, f"{loaded} are loaded before they are mutated"
    reached = map_of_tests(options.tests, options.out)
    verdicts = options.out / "verdicts.json"
    known: dict[str, str] = json.loads(verdicts.read_text()) if verdicts.exists() else {}
    equivalent: dict[str, str] = tomllib.loads((ROOT / "benchmarks" / "equivalent.toml").read_text())
    start = time.monotonic()
    for i, mutant in enumerate(chosen):
        if mutant.name in equivalent or (mutant.name in known and not (options.again and known[mutant.name] != "died")):
            continue
        known[mutant.name] = verdict(mutant, reaching(mutant, reached), options.seconds, reached["seconds"])
        verdicts.write_text(json.dumps(known, indent=1))
        print(
            f"{time.monotonic() - start:6.0f} s {i + 1}/{len(chosen)} {known[mutant.name]:9} {mutant.name}", flush=True
        )
    report(chosen, known, equivalent)


def drawn(mutant: Mutant) -> float:
    """A number from 0 to 1 that its name alone determines."""
    return int.from_bytes(hashlib.sha256(mutant.name.encode()).digest()[:4], "little") / 2**32


def verdict(mutant: Mutant, tests: Sequence[str], seconds: float, usual: dict[str, float]) -> str:
    """`died`, `survived`, or `unreached` where no test runs the line."""
    if not tests:
        return "unreached"

    def work() -> int:
        sys.meta_path.insert(0, Mutated(mutant))
        return pytest_of(tests, [Limited(usual)])

    code = child(work, seconds)
    return "survived" if code in (0, -1) else "died"


def map_of_tests(tests: Sequence[str], out: Path) -> dict[str, Any]:
    """The tests, their times and the lines they reach; found anew where a test or the wiring has changed."""
    files = [*(ROOT / test for test in tests), *(ROOT / PACKAGE / f"{m.replace('.', '/')}.py" for m in WIRING)]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    path = out / f"reached-{key}.json"
    if not path.exists():
        print("running the tests once, to see which lines they reach", flush=True)
        log = out / "tests.log"
        if child(lambda: pytest_of(tests, [Reached(path)]), 3600, log) != 0:
            path.unlink(missing_ok=True)  # of some of the tests
            sys.exit(f"error: the tests do not pass, so no mutant can be judged; see {log}")
    reached: dict[str, Any] = json.loads(path.read_text())
    of_all = (names for lines in reached["lines"].values() for names in lines.values())
    reached["breadth"] = Counter(test for names in of_all for test in names)  # lines of the wiring that each runs
    return reached


def report(chosen: Sequence[Mutant], known: dict[str, str], equivalent: dict[str, str]) -> None:
    """Print the survivors and a line a module."""
    print("\nsurvivors:")
    judged = [mutant for mutant in chosen if mutant.name not in equivalent]
    for mutant in judged:
        if known[mutant.name] != "died":
            print(f"{known[mutant.name]:9} {mutant.line:4} {mutant.name}")
    print()
    for module in dict.fromkeys(mutant.module for mutant in chosen):
        of = [mutant for mutant in judged if mutant.module == module]
        died = sum(known[mutant.name] == "died" for mutant in of)
        print(f"{module:22} {died:4} of {len(of):4} died")
    died = sum(known[mutant.name] == "died" for mutant in judged)
    print(f"all: {died} of {len(judged)} died ({died / len(judged):.1%}); {len(chosen) - len(judged)} change nothing")


if __name__ == "__main__":
    main()
