"""Times ensembles in use, by prefix and batch: `python -m benchmarks.inference`, or `make bench-inference`.

The digits' ladder and the pretrained ensembles, on one thread: eager, compiled, compiled on two threads, and what
`pkd export` writes (onnxruntime, C). With `--before DIR`, a checkout of an earlier commit, its eager students too, of
the ensembles that have targets.
Times do not depend on the weights: the digits' are as they were drawn. `--write` writes docs/inference.json and the
tables of docs/inference.md; with `--only`, what is there of the other ensembles stays.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from benchmarks import floor
from benchmarks.report import conclude, show
from benchmarks.tables import DOCS, SLOT, markdown
from benchmarks.timing import Row, at_least, at_most, compared, interleaved, measured, shown, summary
from pkd_lightning.cost import total_macs
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.evaluate import hardware, versions
from pkd_lightning.export import export
from pkd_lightning.export.c_source import loaded
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.config import MambaClassifierConfig
from pkd_lightning.models.mamba import Mamba
from pkd_lightning.pretrained import load, names
from pkd_lightning.tasks import ImageClassification

CONF = Path(__file__).parent.parent / "conf"
RESULTS, DOCUMENT = DOCS / "inference.json", DOCS / "inference.md"
BATCHES = (1, 256)
TARGETED = ("digits", "mnist")  # ensembles with targets
SECONDS = 3.0  # a call's share of the time
SIDE = 1024  # of the matrices whose product is the peak
FLAGS = ("-O3", "-march=native")  # for the C compiler
Calls = dict[str, Callable[[], object]]


def classifier(path: str, shape: tuple[int, ...]) -> list[MambaClassifier]:
    """The models of a configuration of students or of a teacher, weights as drawn."""
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / path))
    torch.manual_seed(0)
    if "rungs" in content:
        return [MambaClassifier(shape, 10, **content["common"], **rung).eval() for rung in content["rungs"]]
    options = {name: value for name, value in content["model"].items() if not name.startswith("_")}
    return [MambaClassifier(shape, 10, **options).eval()]


def models() -> dict[str, tuple[ProgressiveEnsemble, nn.Module]]:
    """The ensembles and their teachers."""
    shape = (1, 8, 8)
    task = ImageClassification(shape, 10, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    students = classifier("student/patches_small.yaml", shape)
    digits = ProgressiveEnsemble(students, [(0.5, 0.5)] * len(students), task).eval()
    return {
        "digits": (digits, classifier("teacher/mamba_small.yaml", shape)[0]),
        **{name: load(name) for name in names()},
    }


def options_of(student: MambaClassifier) -> dict[str, Any]:
    """The options that differ from their defaults: an earlier commit may not know the others."""
    default = vars(MambaClassifierConfig())
    return {name: value for name, value in vars(student.config).items() if value != default[name]}


class Before:
    """The eager students of another checkout, in a process of its own that takes turns with this one."""

    def __init__(self, checkout: Path, ensembles: Mapping[str, ProgressiveEnsemble]) -> None:
        described = {
            name: (ensemble.task.input_shape, [options_of(member) for member in ensemble.members])
            for name, ensemble in ensembles.items()
        }
        command = [sys.executable, str(Path(__file__).with_name("before.py")), json.dumps(described)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, name: str, batch: int, count: int) -> None:
        """Have it ask `count` students of an ensemble for a batch."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # then nothing is answered
            self.process.stdin.write(f"{name} {batch} {count}\n")
            self.process.stdin.flush()
        if not self.process.stdout.readline():
            sys.exit(f"error: the other checkout's process ended with {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def rows(rounds: int, before: Before | None, only: Sequence[str]) -> list[Row]:
    """A row a comparison: every prefix at every size of batch, and the teacher."""
    found = []
    for name, (ensemble, teacher) in models().items():
        if name in only:
            with exported(ensemble) as others:
                for batch in BATCHES:
                    earlier = before if name in TARGETED else None
                    found += _prefixes(name, ensemble, teacher, batch, rounds, earlier, others)
    return found


@contextmanager
def exported(ensemble: ProgressiveEnsemble) -> Iterator[Callable[[int, int], Calls]]:
    """What `pkd export` writes, as calls for a number of students and of images, on one thread.

    onnxruntime, where it is installed, has all students in its file; C, where there is a compiler, takes one image.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        session: Any = None
        if find_spec("onnxruntime") is not None:
            import onnxruntime

            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = settings.inter_op_num_threads = 1
            path = str(export(ensemble, "onnx", folder).path)
            session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        source = export(ensemble, "c", folder).path
        predict = stack.enter_context(loaded(source, source, FLAGS)) if shutil.which("cc") else None

        def calls(count: int, batch: int) -> Calls:
            images = torch.zeros(batch, *ensemble.task.input_shape, dtype=torch.uint8)
            logits, found = torch.empty(ensemble.task.num_classes), Calls()
            if session is not None and count == len(ensemble):
                found["onnxruntime"] = lambda: session.run(["logits"], {"inputs": images.numpy()})
            if predict is not None and batch == 1:
                found["C"] = lambda: (predict(images.data_ptr(), count, logits.data_ptr()), images)
            return found

        yield calls


@torch.inference_mode()
def _prefixes(
    name: str,
    ensemble: ProgressiveEnsemble,
    teacher: nn.Module,
    batch: int,
    rounds: int,
    before: Before | None,
    others: Callable[[int, int], Calls],
) -> list[Row]:
    images, compiled = torch.zeros(batch, *ensemble.task.input_shape), ensemble.compiled()
    found = []
    for count in range(1, len(ensemble) + 1):
        calls: Calls = {
            "compiled": lambda count=count: compiled(images, count),
            "eager": lambda count=count: ensemble(images, count),
        }
        threads = {}
        if batch > 1:
            calls["two threads"], threads["two threads"] = calls["compiled"], 2
        if before is not None:
            calls["eager before"] = lambda count=count: before(name, batch, count)
        if count == len(ensemble):
            calls["teacher"] = lambda: teacher(images)
        calls |= others(count, batch)
        times = interleaved(calls, rounds, SECONDS, threads)
        whole = count == len(ensemble)
        judged = whole and name in TARGETED
        what = f"{name}, {count} of {len(ensemble)} students, batch {batch}"
        for against in ("eager", "eager before"):
            if against in calls:
                reference = "eager" if before is None else "eager before"
                target = at_least(8 if batch == 1 else 2) if judged and against == reference else None
                found.append(compared(what, times, "compiled", against, target))
        for against in ("onnxruntime", "C"):
            if against in calls:
                target = at_least(1) if judged and (against, batch) == ("onnxruntime", 1) else None
                found.append(compared(what, times, "compiled", against, target))
        if "two threads" in calls:
            times["one thread"] = times["compiled"]
            target = at_least(1.7) if judged else None
            found.append({**compared(f"{what}, two threads", times, "two threads", "one thread", target), "threads": 2})
        if whole:
            target = at_most(1 / 3) if (name, batch) == ("mnist", 1) else None
            found.append(compared(what, times, "compiled", "teacher", target, cost=True))
            found.append(_of_peak(what, ensemble, times["compiled"], batch, rounds))
    return found


def _of_peak(what: str, ensemble: ProgressiveEnsemble, times: Sequence[float], batch: int, rounds: int) -> Row:
    """The share of the multiply-accumulates of a matrix product, and what exponentials alone would take.

    A product of large matrices does as many multiply-accumulates a second as this machine can. The exponentials' floor
    is that of the scan (`benchmarks.floor`): each with its state's update, on registers.
    """
    macs = batch * sum(total_macs(member, ensemble.task.input_shape) for member in ensemble.members)
    count = batch * sum(exponentials(member, ensemble.task.input_shape) for member in ensemble.members)
    a = torch.randn(SIDE, SIDE)
    least = interleaved({"product": lambda: a @ a, "exponentials": floor.floor(count, False)}, rounds, SECONDS)
    product, exponential = (summary(least[name])["median_ms"] for name in ("product", "exponentials"))
    median = summary(times)["median_ms"]
    at_peak = macs / SIDE**3 * product
    row = measured(f"{what}, of the peak", times, 100 * at_peak / median, "% of a matrix product's rate")
    return {**row, "macs": macs, "exponentials": count, "macs_ms": at_peak, "exponentials_ms": exponential}


def exponentials(student: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Exponentials of one input: of a step of a channel one a state and three more; of a stem's SiLU one a value."""
    counts: list[int] = []
    mixers = [module for module in student.modules() if isinstance(module, Mamba)]
    hooks = [
        mixer.register_forward_hook(lambda mixer, given, _: counts.append(given[0].shape[1] * steps(mixer)))
        for mixer in mixers
    ]
    tokens = student.tokens
    if (stem := getattr(tokens, "stem", None)) is not None and tokens.between is None:
        hooks.append(stem.register_forward_hook(lambda *call: counts.append(call[2].numel())))
    student(torch.zeros(1, *input_shape))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def steps(mixer: Mamba) -> int:
    """Exponentials of a step: decays, SiLU, softplus and gate."""
    return mixer.d_inner * (mixer.d_state + 3)


def latencies(rows: Sequence[Row]) -> str:
    """A line a prefix and batch."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if "of the peak" in row["what"]:
            continue
        cells = lines.setdefault(row["what"].removesuffix(", two threads"), {})
        own = "two threads" if row.get("threads") == 2 else "compiled"
        cells[own] = _ms(row["median_ms"])
        if own == "compiled":
            cells[row["against"]] = _ms(row["against_median_ms"])
    columns = ["eager before", "eager", "compiled", "two threads", "onnxruntime", "C", "teacher"]
    columns = [name for name in columns if any(name in cells for cells in lines.values())]
    body = [[what, *(cells.get(name, "") for name in columns)] for what, cells in lines.items()]
    return markdown(["milliseconds", *columns], body)


def peaks(rows: Sequence[Row]) -> str:
    """A line an ensemble and batch: where the time goes."""
    head = ["", "million MACs", "ms", "% of the product's rate", "MACs at that rate, ms", "exponentials' floor, ms"]
    lines = []
    for row in rows:
        if "of the peak" in row["what"]:
            times = [_ms(row[name]) for name in ("macs_ms", "exponentials_ms")]
            what = row["what"].removesuffix(", of the peak")
            lines.append([what, shown(row["macs"] / 1e6), _ms(row["median_ms"]), shown(row["figure"]), *times])
    return markdown(head, lines)


def targets(rows: Sequence[Row]) -> str:
    """A line a target."""
    lines = []
    for row in rows:
        if "target" in row:
            figure = f"{shown(row['figure'])} {row['unit']} {row.get('against', '')}"
            lines.append([row["what"], figure.strip(), row["target"], "yes" if row["met"] else "**no**"])
    return markdown(["what", "figure", "target", "met"], lines)


def _ms(value: float) -> str:
    return f"{value:.3g}"


TABLES = {"latencies": latencies, "peaks": peaks, "targets": targets}


def fill(text: str, rows: Sequence[Row]) -> str:
    """`text` with this benchmark's tables written anew."""
    return SLOT.sub(lambda slot: slot[1] + TABLES[slot[2]](rows) + slot[3] if slot[2] in TABLES else slot[0], text)


def merged(found: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows found, and for ensembles that were not timed those of docs/inference.json, in the order of `names`."""
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows: list[Row] = []
    for name in names:
        new, old = ([row for row in part if row["what"].startswith(f"{name}, ")] for part in (found, before))
        rows += new or old
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the rows and the targets that fall short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; fewer of what takes long")
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit to compare with")
    parser.add_argument("--only", help="ensembles, separated by commas; default: all")
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ensembles = {name: ensemble for name, (ensemble, _) in models().items()}
    only = options.only.split(",") if options.only else list(ensembles)
    if unknown := [name for name in only if name not in ensembles]:
        parser.error(f"--only: no ensemble {', '.join(unknown)}; there are {', '.join(ensembles)}")
    earlier = {name: ensemble for name, ensemble in ensembles.items() if name in TARGETED}
    before = None if options.before is None else Before(options.before.resolve(), earlier)
    found = rows(options.rounds, before, only)
    if before is not None:
        before.close()
    show("inference", found)
    conclude(found)
    if options.write:
        found = merged(found, list(ensembles))
        content = {"hardware": hardware(), "versions": versions(), "rounds": options.rounds, "rows": found}
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), found))


if __name__ == "__main__":
    main()
