"""From attention to Mamba: the similarities of tokens by C and B are to be those by a teacher's queries and keys.

In "The Mamba in the Llama" (Wang et al., arXiv 2408.15237, section 3) a Mamba layer is initialised from attention: C
plays the query, B the key. MOHAWK's first stage (arXiv 2408.10189, section 4.1) aligns the matrices of both. Here what
is aligned is C B^T and q k^T, so that channels need not agree in number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.checks import Faults
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.term import FeatureTerm, Pair, by_depth, listed, path_faults
from pkd_lightning.knowledge.tokens import Grid, as_planes, as_tokens, grid_of, resized
from pkd_lightning.outputs import Taps, paths_of

EPS = 1e-6  # norm of a row of similarities below which its direction counts less, and has no steep gradient
NEEDED = "the attention bridge needs the modules of the teacher's attention that give q and k"


def similarities(query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """Rows of query key^T over the tokens that are seen, of mean 0 and norm 1 (of norm 0 where one token is seen).

    Softmax does not see a row's mean either. Computed in float32 at least, under autocast too.

    Args:
        query: (batch, L, channels).
        key: (batch, L, channels).
        seen: (L, L) bool, whether the token of a row sees that of a column.

    Returns:
        (batch, L, L), 0 where nothing is seen.
    """
    kind = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(kind) @ key.to(kind).mT).where(seen, 0)
        centred = (scores - scores.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)).where(seen, 0)
        return F.normalize(centred, dim=-1, eps=EPS)


def bridge_loss(C: Tensor, B: Tensor, query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """Mean over batch and tokens of the squared distance of a row of C B^T and that of q k^T, see `similarities`.

    So it is 2 - 2r, with r the correlation of both rows. The scale of either side does not count.

    Args:
        C: (batch, L, d_state).
        B: (batch, L, d_state).
        query: (batch, L, channels) q, of all heads side by side: their similarities are summed.
        key: (batch, L, channels) k.
        seen: as in `similarities`.
    """
    return (similarities(C, B, seen) - similarities(query, key, seen)).square().sum(-1).mean()


class Link(NamedTuple):
    """A block of the student, and the attention of the teacher that it is matched with.

    Attributes:
        student: path of its x_proj.
        query: of what gives q, or q, k and v.
        key: of what gives k; None where the same module does.
        dt_rank: channels of x_proj before those of B and C.
        read: (L,) where in the raster the tokens lie that it reads one after another; None where in order.
        grids: rasters of the student's and of the teacher's tokens, where the models tell.
    """

    student: str
    query: str
    key: str | None
    dt_rank: int
    read: Tensor | None
    grids: tuple[Grid | None, Grid | None] = (None, None)

    def seen(self, length: int, device: torch.device) -> Tensor:
        """(L, L), for tokens of the raster: itself and what the student has read before."""
        time = torch.arange(length, device=device) if self.read is None else self.read.argsort().to(device)
        return time[:, None] >= time[None, :]


@dataclass(frozen=True)
class AttentionBridge(FeatureTerm):
    """`bridge_loss` of blocks of a Mamba student and attention layers of the teacher, matched as in `FeatureTerm`.

    q and k of another number of tokens are interpolated to the student's. A hook on x_proj keeps its mixer from being
    computed in one pass, so that the student trains slower.

    Args:
        student: paths of the `x_proj` of mixers, whose neighbour `dt_proj` tells their dt_rank.
        teacher: of the modules that give q (batch, L, channels), or q, k and v side by side where there is no `key`.
        key: of those that give k.
        skip: so many of the teacher's tokens come before those of the image, such as a class token.
        causal: only what the student's block has read before, and the token itself, is compared.
        links: is found by `for_models`, and no option.
    """

    key: str | Sequence[str] = ()
    skip: int = 0
    causal: bool = True
    links: Sequence[Link] = ()

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.found += path_faults("key", self.key)
        faults.whole("skip", 0)
        faults.flag("causal")
        return faults

    @property
    def teacher_features(self) -> Sequence[str]:
        """Paths of the modules that give q, then of those that give k."""
        return (*listed(self.teacher), *listed(self.key))

    @property
    def _by_depth(self) -> bool:  # it always is, for the number of paths is no fault
        return True

    def for_models(self, student: nn.Module, teacher: nn.Module | None) -> Self:
        """The term with the links of these models."""
        if teacher is None:
            raise ConfigError([f"teacher={self.teacher!r}: there is none; {NEEDED}"])
        faults: list[str] = []
        own = _found(student, "student", self.student_features, "", faults)
        queries = _found(teacher, "teacher", listed(self.teacher), f"; {NEEDED}", faults)
        keys = _found(teacher, "key", listed(self.key), f"; {NEEDED}", faults)
        if not faults and keys and len(keys) != len(queries):
            faults.append(f"key={self.key!r}: {len(keys)} modules that give k for {len(queries)} that give q")
        ranks = {path: _dt_rank(student, path) for path in own}
        faults += [
            f"student={path!r}: has no dt_proj beside it, whose inputs would tell dt_rank"
            for path in own
            if ranks[path] is None
        ]
        if faults:
            raise ConfigError(faults)
        read = Taps(student, own).read
        links = [
            Link(
                own[i],
                queries[j],
                keys[j] if keys else None,
                ranks[own[i]] or 0,
                read[own[i]],
                (grid_of(student, own[i]), grid_of(teacher, queries[j])),
            )
            for i, j in by_depth(len(own), len(queries))
        ]
        given = [link.key for link in links if link.key is not None]
        return replace(
            self, student=[link.student for link in links], teacher=[link.query for link in links], key=given,
            links=links,
        )  # fmt: skip

    def parts(self, pair: Pair, samples: int) -> nn.Module:
        """None; shapes are checked.

        Raises:
            ConfigError: where a feature is not as it must be.
        """
        faults = [fault for link in self.links for fault in self._shape_faults(link, pair)]
        if faults:
            raise ConfigError(faults)
        return nn.Module()

    def _shape_faults(self, link: Link, pair: Pair) -> list[str]:
        own, query = pair.student.features[link.student], as_tokens(pair.teacher.features[link.query])
        key = query if link.key is None else as_tokens(pair.teacher.features[link.key])
        found = []
        if own.ndim != 3 or own.shape[2] <= link.dt_rank or (own.shape[2] - link.dt_rank) % 2:
            found.append(
                f"student={link.student!r}: gives {tuple(own.shape)}, not tokens of dt_rank + 2 d_state channels"
            )
        if link.key is None and query.shape[2] % 3:
            found.append(
                f"teacher={link.query!r}: gives {query.shape[2]} channels, not q, k and v side by side; name what gives"
                " k in `key`"
            )
        if query.shape != key.shape:
            found.append(f"key={link.key!r}: gives {tuple(key.shape)}, and the module of q {tuple(query.shape)}")
        if query.shape[1] - self.skip < 2:
            found.append(f"skip={self.skip}: leaves fewer than 2 of the {query.shape[1]} tokens of {link.query!r}")
        return found

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        """The mean of `bridge_loss` over the links."""
        losses = [self._of(link, pair) for link in self.links]
        return sum(losses[1:], losses[0]) / len(losses)

    def _of(self, link: Link, pair: Pair) -> Tensor:
        own, query = pair.student.features[link.student], as_tokens(pair.teacher.features[link.query])
        d_state, length = (own.shape[2] - link.dt_rank) // 2, own.shape[1]
        _, B, C = own.split([link.dt_rank, d_state, d_state], dim=-1)
        if link.key is None:
            query, key, _ = query.chunk(3, dim=-1)
        else:
            key = as_tokens(pair.teacher.features[link.key])
        wanted = as_planes(own, link.grids[0])
        query, key = (resized(as_planes(tokens[:, self.skip :], link.grids[1]), wanted) for tokens in (query, key))
        seen = link.seen(length, own.device)
        return bridge_loss(C, B, query, key, seen if self.causal else torch.ones_like(seen))


def _found(model: nn.Module, name: str, paths: Sequence[str], why: str, faults: list[str]) -> list[str]:
    """The paths of modules that an option means; where there are none, these are among the faults."""
    try:
        return paths_of(model, paths)
    except ConfigError as error:
        faults += [f"{name}: {fault}{why}" for fault in error.faults]
        return []


def _dt_rank(model: nn.Module, path: str) -> int | None:
    """The inputs of the dt_proj beside the module at `path`."""
    owner = path.rpartition(".")[0]
    mixer = Taps(model, [owner]).modules[owner] if owner else model
    found = getattr(getattr(mixer, "dt_proj", None), "in_features", None)
    return found if isinstance(found, int) else None
