"""In which order a block reads its tokens."""

from typing import NamedTuple


class Order(NamedTuple):
    """Of the tokens of a raster, which lie row by row.

    Attributes:
        rows: rows of the raster; of no meaning unless it is read by columns.
        columns: its columns where it is read by columns, else 0.
        backwards: from the end.
    """

    rows: int = 0
    columns: int = 0
    backwards: bool = False


AS_THEY_LIE = Order()
