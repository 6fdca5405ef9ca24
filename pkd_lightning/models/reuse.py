"""What earlier students computed, added to a student's tokens: B-DISTIL's composition of functions (arXiv 2302.10093).

Read are the tokens that an earlier student's head reads, z_s: (batch, length_s, d_s), of all earlier students s.
Each is brought to the student's own raster by a fixed matrix R_s. The tokens x of its tokeniser become

    concat:  W [x, R_1 z_1, R_2 z_2, ...] + b
    gate:    x + sigmoid(g) * (W [R_1 z_1, R_2 z_2, ...] + b)

with W, b, and g of shape (d_model,) trained with the student. With `concat`, W begins as the identity of x and zeros:
the student begins as it is without earlier ones. With `gate`, sigmoid(g) begins at 0.02.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.earlier import Earlier
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.options import Reuse

READ = "norm"  # the module of an earlier student whose output is read
SHUT = -4.0  # g of a new student
Grid = tuple[int, int]


class ReusedTokens(nn.Module):
    """Adds what earlier students computed to a student's tokens; see the equations of this file.

    Args:
        how: `concat` or `gate`.
        d_model: channels of the student's tokens.
        grid: (rows, columns) of its raster.
        sources: raster and channels of each earlier student's tokens.
    """

    def __init__(self, how: Reuse, d_model: int, grid: Grid, sources: Sequence[tuple[Grid, int]]) -> None:
        super().__init__()
        self.resize = nn.ModuleList(Resize(given, grid) for given, _ in sources)
        read = sum(channels for _, channels in sources)
        self.gate: nn.Parameter | None = None
        if how == "concat":
            self.project = nn.Linear(d_model + read, d_model)
            nn.init.eye_(self.project.weight)  # ones on the diagonal, zeros for all that is read
            nn.init.zeros_(self.project.bias)
        else:
            self.project = nn.Linear(read, d_model)
            self.gate = nn.Parameter(torch.full((d_model,), SHUT))

    def forward(self, tokens: Tensor, earlier: Earlier) -> Tensor:
        """Map the student's tokens (batch, length, d_model), with those of earlier students, to the same shape.

        Raises:
            ConfigError: where there are not as many earlier students as it was built after.
        """
        if len(earlier) != len(self.resize):
            raise ConfigError(
                [
                    f"a student that reads {len(self.resize)} earlier ones is called with what {len(earlier)} gave;"
                    " call pkd_lightning.earlier.following(student, students), or the ensemble"
                ]
            )
        pairs = zip(self.resize, earlier, strict=True)
        read = [resize(output.features[READ]) for resize, output in pairs]
        projected: Tensor = self.project(torch.cat(read if self.gate is not None else [tokens, *read], -1))
        return projected if self.gate is None else tokens + self.gate.sigmoid() * projected


class Resize(nn.Module):
    """Brings the tokens of a raster to another: averaged where it is finer, interpolated linearly where it is coarser.

    The same as `adaptive_avg_pool2d` or `interpolate(mode="bilinear")`, as a product of matrices for rows and one for
    columns. So it is counted, and exported, like any other product. A side that stays is not touched.

    Args:
        given: (rows, columns) of the tokens.
        wanted: those of the result.
    """

    def __init__(self, given: Grid, wanted: Grid) -> None:
        super().__init__()
        self.given = given
        self.rows: Tensor | None
        self.columns: Tensor | None
        for name, before, after in zip(("rows", "columns"), given, wanted, strict=True):
            self.register_buffer(name, None if before == after else side_matrix(before, after), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, rows * columns, channels), row by row, to those of the wanted raster."""
        if self.rows is not None:
            lines = self.rows @ tokens.unflatten(1, self.given).flatten(2)  # (batch, wanted rows, columns * channels)
            tokens = lines.unflatten(2, (self.given[1], -1)).flatten(1, 2)
        if self.columns is not None:
            tokens = (self.columns @ tokens.unflatten(1, (-1, self.given[1]))).flatten(1, 2)
        return tokens


def side_matrix(before: int, after: int) -> Tensor:
    """(after, before): what a side of `after` tokens takes of one of `before`; each row sums to 1."""
    units = torch.eye(before)[None]
    if after < before:
        return F.adaptive_avg_pool1d(units, after)[0].T.contiguous()
    return F.interpolate(units, after, mode="linear", align_corners=False)[0].T.contiguous()
