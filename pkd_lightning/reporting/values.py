"""Numbers out of `results.json`, and numbers as text."""

import math
from collections.abc import Mapping
from typing import Any

from pkd_lightning.reporting.load import COST_KEYS, Row

MISSING = "n/a"

# How a round was accepted, short (terminal) and in full. Only "condition" claims the weak-learning condition.
ACCEPTED_SHORT = {
    "first_round": "first",
    "condition": "condition",
    "relaxed_condition": "relaxed",
    "improvement": "improved",
    "best_candidate": "best try",
    "peers": "peers",
    "contradiction": "see edges",
}
ACCEPTED_FULL = {
    "first_round": "first student, by definition",
    "condition": "weak-learning condition",
    "relaxed_condition": "relaxed condition only",
    "improvement": "improvement",
    "best_candidate": "best candidate, nothing required was met",
    "peers": "trained together, not judged",
    "contradiction": "recorded as condition, edges disagree",
}


def number(mapping: Mapping[str, Any] | None, *keys: str) -> float:
    """The number at a path of keys; NaN where it is missing, null or not finite, or there is no mapping."""
    value: Any = mapping
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


def terms(results: Row) -> str:
    """The terms of knowledge beside the objective, as ` + fitnet + rkd`; empty where there are none."""
    names = results.get("knowledge")
    return "".join(f" + {name}" for name in names) if isinstance(names, list) else ""


def acceptance(entry: Row) -> str:
    """The kind of acceptance of a round, a key of ACCEPTED_FULL where it is a known one.

    A round recorded as meeting the condition whose edges deny it is a "contradiction": the edges are the measurement.
    """
    kind = str(entry["accepted_by"])
    satisfied, classes = number(entry, "edges", "satisfied"), number(entry, "edges", "classes")
    if kind == "condition" and not (satisfied == classes and classes > 0):
        return "contradiction"
    return kind


def prefix_cost(results: Row, key: str) -> list[float]:
    """Cost of the first t students, t = 1..T: the sum of theirs, NaN from the first student whose cost is unknown.

    Of a student that reads earlier ones the prefix is recorded: its own cost contains theirs.
    """
    totals: list[float] = []
    for entry in results["rounds"]:
        own = number(entry, key) + (totals[-1] if totals else 0)
        totals.append(number(entry, f"prefix_{key}") if f"prefix_{key}" in entry else own)
    return totals


def validation_of(results: Row) -> float:
    """Validation accuracy of the ensemble, by which runs are chosen; NaN where it was not recorded."""
    rounds = results["rounds"]
    return number(rounds[-1], "prefix_validation_accuracy") if rounds else math.nan


def test_of(results: Row) -> float:
    """Test accuracy of the ensemble, which chooses nothing."""
    return number(results.get("ensemble") or {}, "accuracy")


def ratio(part: float, whole: float) -> float:
    """`part / whole`, NaN where the whole is zero or either is unknown."""
    return part / whole if whole else math.nan


def ensemble_share(results: Row, key: str) -> float:
    """Cost of the whole ensemble as a fraction of the teacher's."""
    given = number(results.get("ensemble") or {}, "fraction_of_teacher", key)
    if not math.isnan(given):
        return given
    return ratio(number(results.get("ensemble") or {}, key), number(results["teacher"], key))


def ensemble_shares(results: Row) -> dict[str, float]:
    """`ensemble_share` for parameters, published FLOPs and total MACs: always shown together."""
    return {key: ensemble_share(results, key) for key in COST_KEYS}


def distilled(results: Row) -> bool:
    """Whether the run has a teacher."""
    return results["teacher"] is not None


def trained_together(results: Row) -> bool:
    """Whether the students were trained in one fit."""
    return any(entry.get("trained") == "together" for entry in results["rounds"])


def condition_counts(results: Row) -> tuple[int, int]:
    """Students after the first with a positive edge in every class, and students after the first that have edges.

    By the edges, not by `accepted_by`: a student accepted for another reason may meet the condition all the same.
    """
    later = [entry for entry in results["rounds"][1:] if entry.get("edges") is not None]
    return sum(entry["edges"]["satisfied"] == entry["edges"]["classes"] > 0 for entry in later), len(later)


LATENCY = (
    "milliseconds of CPU time for one image on one thread, the least of several calls (in results of earlier versions "
    "the median of wall times); ~: other work disturbed the measurement."
)


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction of 1 as per cent."""
    return MISSING if math.isnan(fraction) else f"{100 * fraction:.{digits}f}%"


def share(fraction: float) -> str:
    """A cost relative to the teacher as per cent: three digits, because it spans 0.01% to more than 100%."""
    if math.isnan(fraction):
        return MISSING
    value = 100 * fraction
    if value == 0 or value >= 0.995:
        return f"{value:.0f}%" if value >= 99.95 else f"{value:.1f}%"
    return "<0.01%" if value < 0.005 else f"{value:.2f}%"


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return MISSING if math.isnan(value) else f"{value:,.0f}"


def decimal(value: float, digits: int) -> str:
    """A plain decimal number."""
    return MISSING if math.isnan(value) else f"{value:.{digits}f}"


def milliseconds(value: float) -> str:
    """A latency: three digits, since it spans microseconds to seconds."""
    return MISSING if math.isnan(value) else f"{value:.2f} ms" if value < 99.95 else f"{value:,.0f} ms"


def latency(part: Mapping[str, Any], prefix: str = "") -> str:
    """A latency of `part` in milliseconds for a table, marked by ~ where other work disturbed its measurement."""
    mark = "~" if part.get(f"{prefix}latency_disturbed") is True else ""
    return mark + decimal(number(part, f"{prefix}latency_ms"), 2)


def duration(seconds: float) -> str:
    """Seconds as a reader would say them: 5.1 s, 12 min 30 s, 3 h 05 min."""
    if math.isnan(seconds):
        return MISSING
    if seconds < 99.5:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def engineering(value: float) -> str:
    """A count with a metric prefix: 686, 9.4 k, 14 M."""
    if math.isnan(value):
        return MISSING
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"
