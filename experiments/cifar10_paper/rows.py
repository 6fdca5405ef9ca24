"""Which architectures the rows of Mamba-PKD's Table 2 (arXiv 2503.01727) can be, by arithmetic.

python -m experiments.cifar10_paper.rows    # as a table
"""

from dataclasses import dataclass
from itertools import product

from experiments.tables import table

TOKENS = 3 * 32 * 32  # of an image, each pixel of each colour
EXPAND, WIDTHS, RANKS, STEPS = (1, 2, 3, 4), (1, 2, 3, 4), range(1, 9), (0, 1, 2)  # what may be unsaid


@dataclass(frozen=True)
class Row:
    """A row as printed: blocks, state size, parameters, FLOPs as the paper counts them, accuracy in percent."""

    blocks: int
    state: int
    params: int
    flops: int
    accuracy: int


STUDENTS = (
    Row(24, 128, 22_176, 119_506, 50),
    Row(24, 256, 38_224, 206_080, 65),
    Row(48, 128, 65_242, 351_560, 73),
    Row(48, 256, 72_214, 405_304, 78),
    Row(48, 256, 76_908, 420_202, 81),
    Row(96, 128, 78_730, 430_340, 84),
    Row(96, 128, 83_528, 450_106, 86),
)
TEACHER = Row(96, 256, 443_530, 2_390_016, 87)


def parameters(blocks: int, state: int, tokens: int, expand: int, width: int, rank: int, step: int) -> int:
    """Of the paper's classifier (docs/method.md): blocks of d_model `width`, block i of state size state + step * i."""
    inner = expand * width
    states = blocks * state + step * blocks * (blocks - 1) // 2
    fixed = 2 * inner * width + 5 * inner + inner * rank + rank * inner + inner + inner + inner * width
    embedding = 2 * width if width > 1 else 0
    return embedding + blocks * fixed + 3 * inner * states + (10 * tokens * width + 10)


def flops(blocks: int, tokens: int, expand: int, width: int) -> int:
    """As the paper counts: the multiply-accumulates of in_proj and head, and of an embedding to more than 1 channel."""
    embedding = tokens * width if width > 1 else 0
    return embedding + blocks * tokens * width * 2 * expand * width + 10 * tokens * width


def tokens_by_parameters(row: Row) -> dict[tuple[int, int, int, int], int]:
    """By (expand, d_model, dt_rank, step), the number of tokens with which the row's blocks have its parameters."""
    found = {}
    for options in product(EXPAND, WIDTHS, RANKS, STEPS):
        expand, width, rank, step = options
        left = row.params - parameters(row.blocks, row.state, 0, expand, width, rank, step)
        if left > 0 and left % (10 * width) == 0 and left // (10 * width) <= TOKENS:
            found[options] = left // (10 * width)
    return found


def tokens_by_flops(row: Row, blocks: int | None = None) -> dict[tuple[int, int], int]:
    """By (expand, d_model), the number of tokens with which the row's blocks, or so many, have its FLOPs."""
    found = {}
    for expand, width in product(EXPAND, WIDTHS):
        each = flops(row.blocks if blocks is None else blocks, 1, expand, width)
        if row.flops % each == 0 and row.flops // each <= TOKENS:
            found[expand, width] = row.flops // each
    return found


def architectures(row: Row) -> list[tuple[int, int, int, int, int]]:
    """(tokens, expand, d_model, dt_rank, step) that have both the row's parameters and its FLOPs."""
    counts = tokens_by_flops(row)
    return [
        (tokens, *options) for options, tokens in tokens_by_parameters(row).items() if counts.get(options[:2]) == tokens
    ]


def as_table() -> str:
    """A row a model: what is printed, and how many architectures have its parameters, its FLOPs, and both."""

    def shares(params: int, flops: int) -> str:
        return f"{100 * params / TEACHER.params:.1f} / {100 * flops / TEACHER.flops:.1f}"

    searched = len(EXPAND) * len(WIDTHS) * len(RANKS) * len(STEPS)
    rows = [
        [
            f"student {i + 1}" if row is not TEACHER else "teacher",
            f"{row.blocks} / {row.state}",
            f"{row.params:,}",
            f"{row.flops:,}",
            shares(row.params, row.flops),
            f"{len(tokens_by_parameters(row))} of {searched}",
            f"{len(tokens_by_flops(row))} of {len(EXPAND) * len(WIDTHS)}",
            len(architectures(row)),
        ]
        for i, row in enumerate((*STUDENTS, TEACHER))
    ]
    sums = sum(row.params for row in STUDENTS), sum(row.flops for row in STUDENTS)
    rows.append(["all students", "", f"{sums[0]:,}", f"{sums[1]:,}", shares(*sums), "", "", ""])
    head = [
        "",
        "blocks / states",
        "parameters",
        "FLOPs",
        "% of the teacher's",
        "have its parameters",
        "its FLOPs",
        "both",
    ]
    return table(head, rows)


if __name__ == "__main__":
    print(as_table())
