"""Rewrites the tables and draws the figures of the READMEs, so that no figure in them is typed by hand.

    python -m experiments.readme          # or: make readme-tables

A table stands between `<!-- table: STUDY NAME [RUN ...] -->` and `<!-- end of table -->`, NAME a function of
`experiments.tables`; the runs are those it is made of, in this order, all of the study's where none is named. STUDY
`*` is every study, `-` none: some tables are not made of runs.
Figures are the files of `experiments.figures.FIGURES`.
"""

import re
import sys
from pathlib import Path

from experiments.figures import FIGURES, digest
from experiments.tables import ROOT, TABLES, chosen, every_study
from pkd_lightning.checkpoint import atomic_write
from pkd_lightning.errors import PKDError, RunError

END = "<!-- end of table -->"
SLOT = re.compile(rf"(<!-- table: (\S+) (\S+)((?: \S+)*) -->\n)((?:(?!<!--).)*)({END})", re.DOTALL)


def fill(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        RunError: a slot lacks its beginning or end, or names a table or a run that there is not.
    """

    def made(match: re.Match[str]) -> str:
        if match[3] not in TABLES:
            raise RunError(f"{match[1].strip()}: no such table. Tables: {', '.join(TABLES)}")
        whole = {"*": every_study, "-": dict}.get(match[2])
        runs = whole() if whole else chosen(match[2], match[4].split(), match[3] != "seed_by_seed")
        return f"{match[1]}{TABLES[match[3]](runs)}\n{match[6]}"

    filled, count = SLOT.subn(made, text)
    if not count == text.count("<!-- table:") == text.count(END):
        raise RunError(f"a `<!-- table: STUDY NAME [RUN ...] -->` without its `{END}`, or the other way round")
    return filled


def documents() -> list[Path]:
    """Every Markdown file with tables."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "experiments").rglob("README.md"))) if path.exists()]


def main() -> None:
    """Rewrite the tables, and draw the figures."""
    try:
        for path in documents():
            try:
                text = fill(path.read_text())
            except PKDError as error:
                raise RunError(f"{path}: {error}") from error
            atomic_write(path, lambda temporary, text=text: temporary.write_text(text))  # type: ignore[misc]
        for name, draw in FIGURES.items():
            figure = draw()
            figure.savefig(ROOT / "experiments" / name, dpi=150, metadata={"Title": digest(figure)})
    except PKDError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
