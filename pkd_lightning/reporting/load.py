"""Read what a run left behind, and say exactly what is wrong with it when it cannot be read."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkd_lightning.errors import RunError
from pkd_lightning.reporting.files import parse_json, read_plain
from pkd_lightning.results import PROGRESS, SCHEMA

TEXT_KEYS = ("experiment", "dataset", "split", "objective", "combine")
COST_KEYS = ("params", "flops_published", "macs_total")
TEACHER_KEYS = ("accuracy", *COST_KEYS)
ROUND_KEYS = ("accuracy", "prefix_accuracy", *COST_KEYS)
EDGE_KEYS = ("min", "max", "satisfied", "classes")
ENSEMBLE_KEYS = ("accuracy", *COST_KEYS)
CONFIG_BYTES = 2**20  # a resolved configuration has some kilobytes

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """One run as the report sees it.

    Attributes:
        path: the run directory.
        results: the checked content of `results.json`; of an unfinished run that of `progress.json`, whose `part` says
            that the accuracies are not of the test part.
        metrics: the rows of `metrics.jsonl`, sorted by (stage, attempt, epoch), of repeated rows the last.
        config: the text of `config.yaml`, None where it is missing.
        notes: what a reader of the report must know about the files: lines skipped, values missing.
    """

    path: Path
    results: Row
    metrics: list[Row] = field(default_factory=list)
    config: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all rounds are done, and evaluated on the test part."""
        return part(self.results) == "test"


def part(results: Row) -> str:
    """The part of the data its accuracies are of: test, or validation while a run is not finished."""
    return str(results.get("part", "test"))


def find_runs(path: Path) -> list[Path]:
    """The run directories at or below `path`: those that hold a `results.json`, or where none does, unfinished ones.

    Raises:
        RunError: `path` is not a directory, or no run below it has results or finished rounds.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not a directory" if path.exists() else f"no such run directory: {path}")
    if (path / "results.json").is_file() or (path / PROGRESS).is_file():
        return [path]
    found = sorted(file.parent for file in path.rglob("results.json") if file.is_file()) or unfinished_runs(path)
    if not found:
        raise RunError(f"no results.json in or below {path}: a run writes it when its last round is done")
    return found


def find_run_directories(path: Path) -> list[Path]:
    """Every directory at or below `path` that a run has made, whether it has come to a result or not."""
    return sorted({file.parent for name in ("config.yaml", "results.json", PROGRESS) for file in path.rglob(name)})


def unfinished_runs(path: Path) -> list[Path]:
    """The run directories at or below `path` that hold finished rounds, but no `results.json`."""
    found = sorted(file.parent for file in path.rglob(PROGRESS))
    return [run for run in found if not (run / "results.json").exists()]


def load_run(path: Path) -> RunRecord:
    """Read one run directory, finished or not.

    Raises:
        RunError: `results.json` is missing, damaged, of another schema or incomplete. Missing or torn `metrics.jsonl`
            and `config.yaml` are notes, not errors.
    """
    unfinished, results = _results_file(path).name == PROGRESS, results_so_far(path)
    notes = [f"results.json has no number for {where}: shown as n/a" for where in _gaps(results)]
    if unfinished:
        done = f"{len(results['rounds'])} of {results.get('planned_rounds', '?')} rounds are done."
        notes = [
            f"This run is not finished: {done}{_doing(path / 'metrics.jsonl')} Accuracies are those of the validation"
            " part, by which students are chosen: the test part is read once, at the end. Costs are counted then, too."
        ]
    metrics, metric_notes = read_metrics(path / "metrics.jsonl")
    config: str | None = None
    try:
        config = read_plain(path / "config.yaml", CONFIG_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        metric_notes.append(f"config.yaml {_why(error)}: the resolved configuration is not shown")
    return RunRecord(path, results, metrics, config, notes + metric_notes)


def _doing(metrics: Path) -> str:
    """In a sentence, at what a run is by the last line of its metrics."""
    try:
        row = parse_json(read_plain(metrics).decode("utf-8", errors="replace").strip().splitlines()[-1])
        stage, epoch, attempt = str(row["stage"]), int(row["epoch"]) + 1, int(row.get("attempt") or 0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, IndexError):
        return ""
    names = {"teacher": "the teacher", "peers": "all students together"}
    found = re.fullmatch(r"round-(\d+)", stage)
    name = names.get(stage, f"round {int(found[1]) + 1}" if found else stage.replace("-", " "))
    return f" Its last epoch was epoch {epoch} of {name}{f', attempt {attempt + 1}' if attempt else ''}."


def results_so_far(path: Path) -> Row:
    """What `load_run` has of a run's results, without its curves and configuration."""
    return read_results(_results_file(path))


def _results_file(path: Path) -> Path:
    unfinished = (path / PROGRESS).is_file() and not (path / "results.json").exists()
    return path / (PROGRESS if unfinished else "results.json")


def read_results(file: Path) -> Row:
    """Parse and check `results.json`; every fault found is named in the one RunError raised."""
    if not file.parent.is_dir():
        raise RunError(f"no such run directory: {file.parent}")
    if not file.is_file():
        raise RunError(f"no results.json in {file.parent}: a run writes it when its last round is done")
    try:
        results = parse_json(read_plain(file).decode("utf-8"))
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{file} is truncated or damaged, not valid JSON: {error}") from error
    if not isinstance(results, dict):
        raise RunError(f"{file} holds a {type(results).__name__}, not the results of a run")
    schema = results.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise RunError(f"{file} has schema {schema!r}; this version of pkd_lightning reads schema {SCHEMA}")
    faults = list(_faults(results))
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise RunError(f"{file} is not a complete result:\n{lines}")
    return results


def read_metrics(file: Path) -> tuple[list[Row], list[str]]:
    """Rows of `metrics.jsonl` and notes on what was skipped.

    A run killed while writing leaves a torn last line, and a resumed run repeats the epochs since its last checkpoint:
    the first is skipped with a note, of the second the last row wins.
    """
    try:
        lines = read_plain(file).decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        return [], [f"metrics.jsonl {_why(error)}: loss curves are missing"]
    rows: dict[tuple[str, int, int], Row] = {}
    skipped = []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            rows[str(row["stage"]), int(row.get("attempt") or 0), int(row["epoch"])] = row
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            skipped.append(place)
    notes = []
    if skipped == [len(lines)]:
        notes.append("metrics.jsonl: the last line is torn (the run was interrupted while writing it) and is skipped")
    elif skipped:
        notes.append(f"metrics.jsonl: {len(skipped)} unreadable line(s) skipped, the first is line {skipped[0]}")
    undefined = sum(
        1
        for row in rows.values()
        for key in ("train_loss", "validation_loss")
        if key in row and (row[key] is None or (isinstance(row[key], float) and not math.isfinite(row[key])))
    )
    if undefined:
        notes.append(f"metrics.jsonl: {undefined} loss value(s) are not finite: gaps in the loss curves")
    return [rows[key] for key in sorted(rows)], notes


def _why(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def _numeric(value: Any) -> bool:
    """Whether a value may stand where a number belongs; None stands for "not measured"."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _part_faults(part: Any, where: str, keys: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(part, Mapping):
        yield f"{where} is missing" if part is None else f"{where} is {part!r}, not an object"
        return
    for key in keys:
        if key not in part:
            yield f"{where}.{key} is missing"
        elif not _numeric(part[key]):
            yield f"{where}.{key} is {part[key]!r}, not a number"


def _faults(results: Row) -> Iterator[str]:
    yield from (f"{key} is missing" for key in TEXT_KEYS if key not in results)
    distilled = results.get("teacher", ...) is not None  # null: a run without a teacher, which has no edges either
    if distilled:
        yield from _part_faults(results.get("teacher"), "teacher", TEACHER_KEYS)
    rounds = results.get("rounds")
    if not isinstance(rounds, list):
        yield "rounds is missing" if rounds is None else f"rounds is {rounds!r}, not a list"
        return
    for index, entry in enumerate(rounds):
        where = f"rounds[{index}]"
        yield from _part_faults(entry, where, ROUND_KEYS)
        if isinstance(entry, Mapping):
            if entry.get("round") != index:
                yield f"{where}.round is {entry.get('round')!r}, not {index}"
            if not isinstance(entry.get("accepted_by"), str):
                yield f"{where}.accepted_by is {entry.get('accepted_by')!r}, not a word"
            if distilled or entry.get("edges") is not None:
                yield from _part_faults(entry.get("edges"), f"{where}.edges", EDGE_KEYS)
    if rounds:
        yield from _part_faults(results.get("ensemble"), "ensemble", ENSEMBLE_KEYS)


def _gaps(results: Row) -> Iterator[str]:
    """Places whose number is null, NaN or infinite."""
    for index, entry in enumerate(results["rounds"]):
        yield from _undefined(entry, f"rounds[{index}]", ROUND_KEYS)
        if entry.get("edges") is not None:
            yield from _undefined(entry["edges"], f"rounds[{index}].edges", EDGE_KEYS)
    if results["teacher"] is not None:
        yield from _undefined(results["teacher"], "teacher", TEACHER_KEYS)
    if results["rounds"]:
        yield from _undefined(results["ensemble"], "ensemble", ENSEMBLE_KEYS)


def _undefined(part: Row, where: str, keys: tuple[str, ...]) -> Iterator[str]:
    extra = [key for key, value in part.items() if isinstance(value, float) and not math.isfinite(value)]
    for key in dict.fromkeys([*keys, *extra]):
        if part[key] is None or key in extra:
            yield f"{where}.{key}"
