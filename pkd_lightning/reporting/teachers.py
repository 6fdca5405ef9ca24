"""Several teachers and chains of assistants, for the terminal and for the page."""

from collections.abc import Mapping

from pkd_lightning.reporting.load import Row
from pkd_lightning.reporting.values import count, decimal, duration, number, percent

# a heading of the page for each column, and that of the terminal
TEACHERS_HEAD = {
    "teacher": "teacher",
    "test accuracy": "test\nacc.",
    "validation accuracy": "valid.\nacc.",
    "parameters": "params",
    "published FLOPs": "FLOPs\npubl.",
    "total MACs": "MACs\ntotal",
    "time": "time",
}


def teacher_parts(results: Row) -> list[tuple[str, Row]]:
    """Each of those that teach, with what it is called: members, then the chain they begin; empty for a single teacher.

    All members together, where no assistant follows, are the teacher itself.
    """
    teacher = results["teacher"] or {}
    members, chain = (teacher.get(key) or [] for key in ("members", "chain"))
    found = [(f"member {row['name']}", row) for row in members]
    together = f"all {len(members)} together"
    if members and not chain:
        seconds = {"seconds": number(results, "wall_seconds", "teacher")}
        found.append((together, {**teacher, **seconds}))
    for place, row in enumerate(chain):
        first = together if members else "teacher"
        found.append((f"assistant {row['name']}" if place else first, row))
    return found


def teachers_table(results: Row) -> list[list[str]]:
    """The cells of each of `teacher_parts`, in the order of `TEACHERS_HEAD`; empty for a single teacher."""
    return [
        [
            name,
            percent(number(row, "accuracy"), 2),
            percent(number(row, "validation_accuracy"), 2),
            *(count(number(row, key)) for key in ("params", "flops_published", "macs_total")),
            duration(number(row, "seconds")),
        ]
        for name, row in teacher_parts(results)
    ]


def teachers_notes(results: Row) -> list[str]:
    """How the members are combined, how far they disagree, and who teaches the students."""
    teacher = results["teacher"] or {}
    notes = []
    if teacher.get("members"):
        how = teacher.get("combine")
        words = {
            "mean": "by the mean of their probabilities",
            "confidence": "by their probabilities, weighted on each image by the largest",
            "cross_entropy": "by their probabilities, weighted on each training image by that of the label. Elsewhere, "
            "where labels may not be used, they are weighted by the entropy",
        }
        given = ", ".join(f"{name} {weight:g}" for name, weight in how.items()) if isinstance(how, Mapping) else ""
        notes.append(f"The members are combined {words.get(str(how), f'by their probabilities, weighted {given}')}.")
        rows, pairs, kl = (number(teacher, "disagreement", key) for key in ("rows", "pairs", "kl"))
        notes.append(
            f"On {percent(rows)} of the validation images not all members give the same answer; two of them differ on "
            f"{percent(pairs)}. KL divergence of a member from the combination: {decimal(kl, 3)} nats."
        )
    if teacher.get("chain"):
        notes.append("The last assistant teaches the students: elsewhere it is called the teacher.")
    return notes
