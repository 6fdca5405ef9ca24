"""The shell of a page: one file, no requests, readable in light and dark, on a desk and on a phone."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from pkd_lightning.checkpoint import atomic_write
from pkd_lightning.errors import RunError

CSS = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1c2024; --soft: #5b6470; --line: #dde1e6;
  --accent: #0072b2; --note: #fff4d6; --note-line: #e0a800; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1e2226; --ink: #e8eaed; --soft: #a3acb8;
  --line: #363c43; --accent: #56b4e9; --note: #35301d; --note-line: #b38600; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.25rem; margin: 36px 0 12px; }
h3 { font-size: 1rem; margin: 20px 0 8px; }
figure h3 { margin-top: 0; }
p { margin: 0 0 8px; max-width: 78ch; }
.soft, figcaption, .tile small { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile span { display: block; font-size: .85rem; color: var(--soft); }
.tile b { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile small { display: block; line-height: 1.3; }
.notes { background: var(--note); border-left: 4px solid var(--note-line); border-radius: 4px; padding: 10px 14px;
  margin: 16px 0; }
.notes ul { margin: 4px 0 0; padding-left: 20px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
  min-width: 0; }
figure.wide, figure.beside { grid-column: 1 / -1; }
@media (min-width: 1040px) { figure.beside { display: grid; column-gap: 30px;
  grid-template-columns: minmax(0, 690px) 1fr; }
  figure.beside h3 { grid-column: 1 / -1; } figure.beside figcaption { align-self: center; } }
figcaption { font-size: .85rem; margin-top: 8px; max-width: 90ch; }
.plate { background: #ffffff; border-radius: 6px; padding: 6px; }
.plate svg { display: block; width: 100%; height: auto; max-width: 680px; margin: 0 auto; }
.multiples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: 8px; }
.multiples svg { max-width: 420px; }
/* the shadow at the right edge shows while there is more to scroll to: the cover moves with the content */
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin-bottom: 12px;
  background: linear-gradient(to left, var(--card) 40%, transparent) right / 60px 100% no-repeat local,
  linear-gradient(to left, rgb(0 0 0 / .22), transparent) right / 18px 100% no-repeat scroll, var(--card); }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td { white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; line-height: 1.25; min-width: 64px; }
th:first-child, td:first-child { text-align: left; min-width: 0; }
th:first-child:not(.text), td:first-child:not(.text) { position: sticky; left: 0; background: var(--card); }
td.text, th.text { text-align: left; }
td.long { white-space: normal; min-width: 240px; }
tr:last-child td { border-bottom: 0; }
tr.group th { padding-top: 14px; }
tr.group span { position: sticky; left: 10px; }
tr.strong td { font-weight: 700; border-top: 2px solid var(--line); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; }
summary { cursor: pointer; padding: 10px 14px; font-weight: 600; }
details > div { padding: 0 14px 14px; overflow-x: auto; }
pre { margin: 0; font: .8rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-x: auto;
  white-space: pre; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 4px 18px; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; }
@media (max-width: 600px) { main { padding: 16px 12px 32px; } h1 { font-size: 1.35rem; } figure { padding: 8px; }
  th, td { padding: 5px 7px; } .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; } }
@media print { body { background: #fff; } figure, .tile { break-inside: avoid; } }
"""


def page(title: str, body: Iterable[str], refresh: int | None = None) -> str:
    """A complete HTML document around finished pieces of markup. The policy forbids every request.

    Args:
        title: of the document.
        body: the pieces.
        refresh: seconds after which a browser loads the file again.
    """
    again = "" if refresh is None else f'\n<meta http-equiv="refresh" content="{refresh}">'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{again}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{chr(10).join(piece for piece in body if piece)}
</main>
</body>
</html>
"""


def heading(title: str, subtitle: str) -> str:
    """The page's first lines."""
    return f'<header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p></header>'


def section_heading(title: str, level: int = 2) -> str:
    """The first line of a part of the page."""
    return f"<h{level}>{escape(title)}</h{level}>"


def paragraphs(sentences: Sequence[str]) -> str:
    """One paragraph a sentence group."""
    return "\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences if sentence)


def notes(lines: Sequence[str], title: str = "Notes on the data") -> str:
    """A marked box, empty where there is nothing to say."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<aside class="notes"><strong>{escape(title)}</strong><ul>{items}</ul></aside>'


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: (label, number, remark)."""
    inner = "".join(
        f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(remark)}</small></div>'
        for label, value, remark in entries
    )
    return f'<div class="tiles">{inner}</div>'


def figure(title: str, caption: str, graphics: Sequence[str], beside: bool = False) -> str:
    """A card with one SVG, or with several small ones that fill the page's width. `graphics` is markup.

    A card with its caption `beside` the graphic fills the page's width with one.
    """
    many = len(graphics) > 1
    plate = f'<div class="plate{" multiples" if many else ""}">{"".join(_cell(svg, many) for svg in graphics)}</div>'
    kind = ' class="wide"' if many else ' class="beside"' if beside else ""
    return f"<figure{kind}><h3>{escape(title)}</h3>{plate}<figcaption>{escape(caption)}</figcaption></figure>"


def _cell(svg: str, many: bool) -> str:
    return f"<div>{svg}</div>" if many else svg


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], text: Iterable[int] = (), strong: Iterable[int] = ()
) -> str:
    """A table that scrolls sideways in its own frame.

    Args:
        head: headings.
        rows: cells, as many a row as headings; a single cell is a heading over the rows below it.
        text: indices of columns aligned left.
        strong: indices of rows set in bold.
    """
    left, bold = set(text), set(strong)

    def cell(tag: str, index: int, value: str) -> str:
        kinds = ["text"] * (index in left) + ["long"] * (tag == "td" and index in left and len(value) > 40)
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    def row(place: int, values: Sequence[str]) -> str:
        if len(values) == 1 < len(head):
            return f'<tr class="group"><th colspan="{len(head)}"><span>{escape(values[0])}</span></th></tr>'
        kind = ' class="strong"' if place in bold else ""
        return f"<tr{kind}>{''.join(cell('td', index, value) for index, value in enumerate(values))}</tr>"

    top = "".join(cell("th", index, value) for index, value in enumerate(head))
    lines = "\n".join(row(place, values) for place, values in enumerate(rows))
    inner = f"<thead><tr>{top}</tr></thead><tbody>\n{lines}\n</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inner}</table></div>'


def details(title: str, markup: str) -> str:
    """A section that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><div>{markup}</div></details>"


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def pairs(values: Mapping[str, str]) -> str:
    """Names and values."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items()) + "</dl>"


def write(file: Path, text: str) -> None:
    """Write a page so that a reader sees the old one or the new one, never half of it; a link at its place is replaced.

    Raises:
        RunError: it cannot be written, or something other than a file is at its place.
    """
    if not file.parent.is_dir():
        raise RunError(f"cannot write {file}: there is no directory {file.parent}")
    if file.exists() and not file.is_file():
        raise RunError(f"cannot write {file}: it is not a regular file")
    try:
        atomic_write(file, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from error
