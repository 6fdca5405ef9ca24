"""For mkdocs: links of the pages to files of the repository, which are not part of the site, become their names."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[the loop](../pkd_lightning/boosting/loop.py)` to `the loop (pkd_lightning/boosting/loop.py)`."""
    return re.sub(r"\[([^\]]+)\]\(\.\./([\w./-]+)(?:#[\w-]+)?\)", _named, markdown)


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    return f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"
