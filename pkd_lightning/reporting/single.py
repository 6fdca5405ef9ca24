"""The page of one run."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pkd_lightning.errors import RunError, full_disk
from pkd_lightning.reporting import page, style
from pkd_lightning.reporting.exits import curves_of, exits_table
from pkd_lightning.reporting.figures import cards, loss_stages
from pkd_lightning.reporting.load import Row, RunRecord, part
from pkd_lightning.reporting.table import (
    ACCURACY_COLUMNS,
    COST_COLUMNS,
    columns_of,
    condition_sentence,
    student_rows,
    teacher_row,
)
from pkd_lightning.reporting.teachers import TEACHERS_HEAD, teacher_parts, teachers_notes, teachers_table
from pkd_lightning.reporting.values import (
    LATENCY,
    MISSING,
    acceptance,
    count,
    distilled,
    duration,
    ensemble_shares,
    milliseconds,
    number,
    percent,
    share,
    terms,
    trained_together,
)

REFRESH = 20  # seconds after which a browser loads the page of an unfinished run again


def run_page(run: RunRecord, figures: Path | None) -> str:
    """The page of a run; its figures are also saved as PNG files in `figures`. None: it has no figures yet.

    Raises:
        RunError: they cannot be saved, or `figures` is a link, which would lead them elsewhere.
    """
    if figures is not None and figures.is_symlink():
        raise RunError(f"{figures} is a link: figures are written only into the run's own directory; remove it")
    results = run.results
    words = [f"{key} {results.get(key, MISSING)}" for key in ("dataset", "split", "objective", "combine", "seed")]
    words[2] += terms(results)
    graphics = [] if figures is None else _graphics(run, figures)
    body = [
        page.heading(str(results["experiment"]), " · ".join(words)),
        page.tiles(_tiles(results)),
        page.paragraphs(_summary(results)),
        page.notes([*run.notes, *_missing_curves(run)]),
        page.section_heading("Figures") if graphics else "",
        f'<div class="figures">{"".join(graphics)}</div>' if graphics else "",
        page.section_heading("Results"),
        *_tables(results),
        page.paragraphs(_table_notes(results)),
        *_teachers(results),
        *_exits(results),
        page.section_heading("Setting"),
        *_setting(run),
    ]
    title = f"{results['experiment']}: progressive knowledge distillation"
    return page.page(title, body, None if run.finished else REFRESH)


def _graphics(run: RunRecord, figures: Path) -> list[str]:
    graphics = []
    with style.styled():
        for card in cards(run):
            parts = [
                style.svg(part, f"{card.name}{index}", card.title) for index, part in enumerate(card.figures, start=1)
            ]
            graphics.append(page.figure(card.title, card.caption, parts, beside=card.name == "edges"))
            try:
                with full_disk(figures / f"{card.name}.png"):
                    style.save_png(card.draw(), figures / f"{card.name}.png", card.title)
            except OSError as error:
                raise RunError(f"cannot write the figures to {figures}: {error.strerror}") from error
    return graphics


def _tiles(results: Row) -> list[tuple[str, str, str]]:
    ensemble = results.get("ensemble") or {}
    shares = ensemble_shares(results)
    members = len(results["rounds"])
    if not distilled(results):
        return [
            ("teacher", "none", "students learned from labels"),
            (f"ensemble of {members}", percent(number(ensemble, "accuracy")), _error(results, ensemble)),
            ("parameters", count(number(ensemble, "params")), "of all students"),
            ("total MACs", count(number(ensemble, "macs_total")), "of one image, everything counted"),
        ]
    made = [
        ("teacher accuracy", percent(number(results["teacher"], "accuracy")), _error(results, results["teacher"])),
        (f"ensemble of {members}", percent(number(ensemble, "accuracy")), _error(results, ensemble)),
        ("parameters", share(shares["params"]), "of the teacher's"),
        ("total MACs", share(shares["macs_total"]), "of the teacher's, everything counted"),
        ("published FLOPs", share(shares["flops_published"]), "of the teacher's, of Mamba blocks in_proj alone"),
    ]
    own, other = number(ensemble, "latency_ms"), number(results["teacher"], "latency_ms")
    if not math.isnan(own):
        made.append(("latency", milliseconds(own), f"teacher {milliseconds(other)}; one image, one CPU thread"))
    return made


def _error(results: Row, row: Row) -> str:
    """Standard error of an accuracy, from the size of the part it is of."""
    size, accuracy = number(results, "sizes", part(results)), number(row, "accuracy")
    if not (size > 0 and 0 <= accuracy <= 1):
        return f"of the {part(results)} part"
    return f"± {100 * math.sqrt(accuracy * (1 - accuracy) / size):.1f} points, {size:,.0f} {part(results)} images"


def _origins(rounds: Sequence[Row]) -> Iterator[str]:
    """Where students that other runs have trained are from."""
    for run, rows in groupby(enumerate(rounds, 1), lambda row: row[1].get("from")):
        numbers = [number for number, _ in rows]
        if run is not None and len(numbers) == 1:
            yield f"Student {numbers[0]} is from {run}."
        elif run is not None:
            yield f"Students {numbers[0]} to {numbers[-1]} are from {run}."


def _readers(rounds: Sequence[Row]) -> Iterator[str]:
    """Which students read which earlier ones."""
    for read, rows in groupby(enumerate(rounds, 1), lambda row: bool(row[1].get("reads"))):
        numbers = [number for number, _ in rows]
        if read and len(numbers) == 1:
            yield f"Student {numbers[0]} reads all students before it; its costs contain theirs."
        elif read:
            who = f"Students {numbers[0]} to {numbers[-1]}"
            yield f"{who} each read all students before them; their costs contain theirs."


def _together(results: Row) -> str:
    """How students that were trained together were, empty where none was."""
    if not trained_together(results):
        return ""
    first = results["rounds"][0]
    took = f"{count(number(first, 'epochs'))} epochs, {duration(number(first, 'seconds'))}"
    return f"The students were trained together and learned from each other, in one fit: {took}."


def _without_teacher(results: Row, images: str, stop: str) -> list[str]:
    """`_summary` of a run that has none."""
    rounds, ensemble = results["rounds"], results.get("ensemble") or {}
    first = "There is no teacher: students learned from the labels."
    if not rounds:
        return [first, "No student was accepted.", stop]
    who = "The single student" if len(rounds) == 1 else f"The ensemble of {len(rounds)} students"
    macs = number(ensemble, "macs_total")
    cost = "" if math.isnan(macs) else f" and takes {count(macs)} multiply-accumulates an image"
    return [
        f"{first} {who} classifies {percent(number(ensemble, 'accuracy'))} of {images} correctly.",
        f"It has {count(number(ensemble, 'params'))} parameters{cost}.",
        f"{_together(results)} {stop}".strip(),
    ]


def _summary(results: Row) -> list[str]:
    teacher, rounds = results["teacher"], results["rounds"]
    ensemble = results.get("ensemble") or {}
    size = number(results, "sizes", part(results))
    images = f"the {count(size)} {part(results)} images" if size > 0 else f"the {part(results)} images"
    stop = f"The run stopped: {results['stop_reason']}." if results.get("stop_reason") else ""
    stop = " ".join(filter(None, [*_origins(rounds), stop]))
    if not distilled(results):
        return _without_teacher(results, images, stop)
    first = f"The teacher classifies {percent(number(teacher, 'accuracy'))} of {images} correctly."
    if not rounds:
        return [first, "No student was accepted.", stop]
    gap = 100 * (number(ensemble, "accuracy") - number(teacher, "accuracy"))
    against = "" if math.isnan(gap) else f", {abs(gap):.1f} points {'above' if gap > 0 else 'below'} the teacher"
    agreement = number(ensemble, "agreement")
    agrees = "" if math.isnan(agreement) else f", and gives the teacher's answer for {percent(agreement)} of them"
    who = "The single student" if len(rounds) == 1 else f"The ensemble of {len(rounds)} students"
    shares = {key: share(value) for key, value in ensemble_shares(results).items()}
    cost = (
        f"It has {shares['params']} of the teacher's parameters. One image costs {shares['macs_total']} of the "
        f"teacher's multiply-accumulates when everything is counted (total MACs), and {shares['flops_published']} by "
        "the paper's convention (published FLOPs: in_proj alone of a Mamba block)."
    )
    own, other = number(ensemble, "latency_ms"), number(teacher, "latency_ms")
    latency = (
        f"On one CPU thread {who.lower()} takes {milliseconds(own)} an image and the teacher {milliseconds(other)} "
        "(batch of one)."
    )
    return [
        f"{first} {who} reaches {percent(number(ensemble, 'accuracy'))}{against}{agrees}.",
        cost if math.isnan(own) else f"{cost} {latency}",
        " ".join(filter(None, [_together(results), condition_sentence(results), stop])),
    ]


def _missing_curves(run: RunRecord) -> list[str]:
    stages = loss_stages(run.metrics)
    lines = []
    if not run.metrics and not any("metrics.jsonl is missing" in note for note in run.notes):
        lines.append("metrics.jsonl holds no epochs: loss curves are missing")
    if (
        run.metrics
        and distilled(run.results)
        and not any(stage.split("-")[0] in ("teacher", "assistant") for stage in stages)
    ):
        lines.append("metrics.jsonl has no losses of the teacher: it was not trained in this run")
    absent = [
        "peers" if entry.get("trained") == "together" else f"round-{index:02d}"
        for index, entry in enumerate(run.results["rounds"])
    ]
    absent = [stage for stage in dict.fromkeys(absent) if stage not in stages]
    if run.metrics and absent:
        lines.append(f"metrics.jsonl has no losses of {', '.join(absent)}")
    contradictions = [
        index for index, entry in enumerate(run.results["rounds"], 1) if acceptance(entry) == "contradiction"
    ]
    lines += [
        f"student {index} is recorded as accepted by the condition, but its edges are not all positive: it is not "
        "counted as meeting the condition"
        for index in contradictions
    ]
    return lines


def _tables(results: Row) -> list[str]:
    """Accuracy and acceptance, and cost: as one table they are twice as wide as a page."""
    teacher = [teacher_row(results, 2)] if distilled(results) else []
    rows = [*student_rows(results, 2), *teacher]
    known = columns_of(results)
    made = []
    for title, keys in (("Accuracy and acceptance", ACCURACY_COLUMNS), ("Cost", COST_COLUMNS)):
        columns = [column for key in keys for column in known if column.key == key]
        cells = [[row.get(f"{column.key}_full", row[column.key]) for column in columns] for row in rows]
        text = [index for index, column in enumerate(columns) if column.key == "accepted"]
        table = page.table([column.title for column in columns], cells, text, [len(rows) - 1] if teacher else [])
        made += [page.section_heading(title, 3), table]
    return made


def _teachers(results: Row) -> list[str]:
    """The table of several teachers, or of a chain of assistants, where there are any."""
    rows = teachers_table(results)
    if not rows:
        return []
    table = page.table(list(TEACHERS_HEAD), rows)
    return [page.section_heading("Teachers", 3), table, page.paragraphs(teachers_notes(results))]


def _exits(results: Row) -> list[str]:
    """The table of early exits, where there are any."""
    if curves_of(results) is None:
        return []
    words = (
        "Test accuracy where the mean of an image's MACs is within a part of the whole ensemble's. Thresholds"
        " were chosen on the validation part. n/a: the budget does not pay for the first student."
    )
    table = page.table(*exits_table(results))
    return [page.section_heading("Early exit", 3), table, page.paragraphs([words])]


def _table_notes(results: Row) -> list[str]:
    if not results["rounds"]:
        return []
    where = "test part, which decided nothing" if part(results) == "test" else f"{part(results)} part"
    edges = "Edges met: classes with a positive edge; the first student's edges are zero by definition. "
    once = "All students were trained in one fit: its epochs and time are in the first row. "
    return [
        "Prefix: the first t students together. Rung: place of the student's model class in the ladder. "
        f"{edges if distilled(results) else ''}{once if trained_together(results) else ''}"
        f"Accuracies are on the {where}. Latency: {LATENCY}",
        *_readers(results["rounds"]),
    ]


def _setting(run: RunRecord) -> list[str]:
    results = run.results
    seconds = results.get("wall_seconds") or {}
    rounds = seconds.get("rounds") if isinstance(seconds, Mapping) else None
    rounds = rounds if isinstance(rounds, list) else []
    labels = results.get("labels")
    times = {"time, each round": ", ".join(duration(number({"s": value}, "s")) for value in rounds) or MISSING}
    if trained_together(results):
        times = {"time, all students together": duration(number(results["rounds"][0], "seconds"))}
    facts = {
        "run directory": str(run.path),
        "sizes (images)": _inline(results.get("sizes")),
        **({"labels of the outputs": ", ".join(map(str, labels))} if isinstance(labels, list) else {}),
        **({"time, teacher": duration(number(results, "wall_seconds", "teacher"))} if distilled(results) else {}),
        **times,
        "time, total": duration(number(results, "wall_seconds", "total")),
        "hardware": _inline(results.get("hardware")),
        "versions": _inline(results.get("versions")),
    }
    parts = [page.details("Time, hardware, versions", page.pairs(facts)).replace("<details", "<details open", 1)]
    configs: list[tuple[str, Any]] = []
    if distilled(results):
        parts_ = teacher_parts(results)
        configs = [(name, row.get("config")) for name, row in parts_ if isinstance(row.get("config"), dict)]
        configs = configs or [("teacher", results["teacher"].get("config"))]
    configs += [(str(index), entry.get("config")) for index, entry in enumerate(results["rounds"], 1)]
    keys = list(dict.fromkeys(key for _, config in configs if isinstance(config, Mapping) for key in config))
    if keys:
        rows = [[name, *(_value(config, key) for key in keys)] for name, config in configs]
        parts.append(page.details("Models", page.table(["student", *map(str, keys)], rows)))
    if run.config is not None:
        parts.append(page.details("Resolved configuration (config.yaml)", page.preformatted(run.config)))
    return parts


def _value(config: Any, key: str) -> str:
    if not isinstance(config, Mapping) or key not in config:
        return ""
    value = config[key]
    return value if isinstance(value, str) else json.dumps(value)


def _inline(mapping: Any) -> str:
    """A flat mapping on one line."""
    if not isinstance(mapping, Mapping) or not mapping:
        return MISSING
    return ", ".join(f"{key} {'none' if value is None else value}" for key, value in mapping.items())
