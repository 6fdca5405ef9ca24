"""Weights from elsewhere: read without running code, and found under whatever names a training script gave them."""

import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pkd_lightning.checkpoint import load_tensors
from pkd_lightning.errors import RunError
from pkd_lightning.memory import check_memory
from pkd_lightning.models.building import brief

logger = logging.getLogger(__name__)

# what DataParallel, torch.compile, FSDP and activation checkpointing put into the names of what they wrap
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")
DEPTH = 4  # of mappings in mappings that are searched for weights
SHOWN = 6  # names of each kind in a message


class Unread:
    """Stands for an object in a file whose class or function is neither imported nor called.

    Attributes:
        state: what the file holds of it.
    """

    state: Any = None

    def __new__(cls, *arguments: object) -> "Unread":
        """`arguments` are those of the call that is not made."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state


def _mapping(*arguments: object) -> dict[Any, Any]:
    """In place of a defaultdict: torch's reader adds entries to plain containers only."""
    return {}


def _list(*arguments: object) -> list[Any]:
    """In place of a deque."""
    return []


PLAIN: dict[str, Callable[..., Any]] = {"collections.defaultdict": _mapping, "collections.deque": _list}


def read_tensors(path: Path) -> Any:
    """The content of a .safetensors or torch file, with `Unread` in the place of all that is no plain data or tensor.

    torch's `weights_only` reader runs no code of the file; it refuses every class it does not know, so each of those
    is made known as `Unread`.

    Raises:
        RunError: where the file cannot be read so, or not within the memory that there is.
    """
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        names: list[str] = []
        if zipfile.is_zipfile(path):  # in torch's old format its reader refuses the names that it must
            with zipfile.ZipFile(path) as archive:  # torch writes it uncompressed, and reads compressed entries as well
                check_memory(sum(entry.file_size for entry in archive.infolist()), str(path), RunError)
            names = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(PLAIN.get(name, type(name, (Unread,), {})), name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except Exception as error:  # each format has its own errors for a damaged file
        raise RunError(
            f"{path}: cannot be read as weights ({brief(error)}). If it is no damaged file but one that you trust, load"
            " it with the code that made it, and save its weights alone: torch.save(model.state_dict(), FILE)"
        ) from error


@dataclass(frozen=True)
class Match:
    """Tensors of a file as the weights of a model.

    Attributes:
        place: keys of the mappings that hold them, joined by points; "" for the file itself.
        prefix: what their names in the file begin with, besides those of the model.
        tensors: by the model's names; those the model does not have among them.
        expected: shapes by the model's names.
        unused: names in the file that are taken for no part of the model.
    """

    place: str
    prefix: str
    tensors: dict[str, Tensor]
    expected: dict[str, torch.Size]
    unused: list[str]

    @property
    def missing(self) -> list[str]:
        """Names that the file lacks; older files lack the counters of batch norm, which then start at 0."""
        absent = (name for name in self.expected if name not in self.tensors)
        return [name for name in absent if not name.endswith("num_batches_tracked")]

    @property
    def unexpected(self) -> list[str]:
        """Names that the model lacks."""
        return [name for name in self.tensors if name not in self.expected]

    @property
    def reshaped(self) -> list[str]:
        """Names whose shapes differ."""
        both = (name for name in self.tensors if name in self.expected)
        return [name for name in both if self.tensors[name].shape != self.expected[name]]

    @property
    def fits(self) -> bool:
        """Whether these are the weights of the model."""
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The higher, the better it fits; of two that fit, averaged weights go first, as in timm."""
        averaged = bool(AVERAGED.search(f"{self.place}.{self.prefix}"))
        same = len(self.tensors) - len(self.unexpected) - len(self.reshaped)
        return self.fits, 2 * same - len(self.unexpected), averaged

    def __str__(self) -> str:
        where = f"under {self.place!r}" if self.place else "at the top"
        return f"{where} with prefix {self.prefix!r}" if self.prefix else where


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of `model` from a .safetensors file, or a torch file of a state dict, a checkpoint or a module.

    They are found in any mapping of the file and under any common prefix. Entries that are no part of the model are
    named in the log.

    Raises:
        RunError: where the file is missing, unreadable, or does not fit, or where several weights in it do.
    """
    content = read_tensors(path)
    expected = model.state_dict()
    found = [match for place, tensors in states(content) for match in matches(place, tensors, expected)]
    if not found:
        raise RunError(f"{path}: the weights do not fit the model. {_contents(content, expected)}")
    best = max(found, key=lambda match: match.rank)
    rivals = [match for match in found if match.fits and match is not best and not _equal(match, best)]
    if any(match.rank == best.rank for match in rivals):
        places = ", ".join(map(str, [best, *rivals]))
        raise RunError(f"{path}: holds several weights that fit the model ({places}); save one to a file of its own")
    try:
        model.load_state_dict(best.tensors)
    except Exception as error:  # torch's own for what does not fit, and whatever hooks of the model raise
        raise RunError(f"{path}: the weights do not fit the model. {explain(best)}") from error
    if rivals:
        logger.warning("%s: loaded the weights %s; others fit as well: %s", path, best, ", ".join(map(str, rivals)))
    if best.unused:
        logger.warning("%s: not used, as no part of the model: %s", path, _some(best.unused))


def states(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping of names to tensors in the content of a file, with its place; of a pickled module its weights."""
    pending: list[tuple[str, Any, int]] = [("", content, 0)]
    seen: set[int] = set()
    while pending:
        place, part, depth = pending.pop(0)
        if id(part) in seen or depth > DEPTH:
            continue
        seen.add(id(part))
        if isinstance(part, Unread):
            tensors = module_tensors(part)
        elif isinstance(part, Mapping):
            named = {key: value for key, value in part.items() if isinstance(key, str)}
            tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
            others = ((f"{place}.{key}" if place else key, value) for key, value in named.items())
            pending += [(inner, value, depth + 1) for inner, value in others if isinstance(value, (Mapping, Unread))]
        else:
            continue
        if tensors:
            yield place, tensors


def module_tensors(module: Unread) -> dict[str, Tensor]:
    """The state dict of a pickled torch module, from the attributes that the file holds; a shared part comes once."""
    tensors: dict[str, Tensor] = {}
    pending: list[tuple[str, Any]] = [("", module)]
    seen: set[int] = set()
    while pending:
        prefix, part = pending.pop(0)
        state = part.state if isinstance(part, Unread) else None
        if id(part) in seen or not isinstance(state, Mapping):
            continue
        seen.add(id(part))
        kinds = (state.get(kind) for kind in ("_parameters", "_buffers", "_modules"))
        parameters, buffers, modules = (kind if isinstance(kind, Mapping) else {} for kind in kinds)
        left_out = state.get("_non_persistent_buffers_set")
        kept = {name: value for name, value in buffers.items() if not (isinstance(left_out, set) and name in left_out)}
        own = {**parameters, **kept}.items()
        tensors |= {f"{prefix}{name}": value for name, value in own if isinstance(value, Tensor)}
        pending += [(f"{prefix}{name}.", child) for name, child in modules.items()]
    return tensors


def matches(place: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[Match]:
    """Every way to take tensors of a file for the weights `expected`: by prefixes of either's names."""
    unwrapped = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    forms = [tensors]
    if len(unwrapped) == len(tensors) and unwrapped.keys() != tensors.keys():
        forms.append(unwrapped)
    shapes = {name: value.shape for name, value in expected.items()}
    aliases = _aliases(expected)
    for own in _common_prefixes(shapes):
        inner = {name.removeprefix(own) for name in shapes}
        for form in forms:
            for prefix in dict.fromkeys(p for name in form for p in _prefixes(name) if name.removeprefix(p) in inner):
                yield _match(place, prefix, own, form, shapes, aliases)


def _match(
    place: str, prefix: str, own: str, form: dict[str, Tensor], shapes: dict[str, torch.Size], aliases: dict[str, str]
) -> Match:
    """Take the tensors below `prefix` for weights whose names begin with `own`."""
    below = {own + name.removeprefix(prefix): name for name in form if name.startswith(prefix)}
    stems = {_stem(name.removeprefix(own)) for name in shapes}
    foreign = {name for name in below if name not in shapes and _stem(name.removeprefix(own)) not in stems}
    taken = {name: form[source] for name, source in below.items() if name not in foreign}
    for name, other in aliases.items():  # a tied weight may be saved under one of its names
        if name not in taken and other in taken:
            taken[name] = taken[other]
    unused = [name for name in form if own + name.removeprefix(prefix) in foreign or not name.startswith(prefix)]
    return Match(place, prefix, taken, shapes, unused)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _prefixes(name: str) -> Iterator[str]:
    """Everything up to a point: "", "a.", "a.b." of a.b.c."""
    yield ""
    for point in re.finditer(r"\.", name):
        yield name[: point.end()]


def _common_prefixes(names: Mapping[str, object]) -> list[str]:
    """Prefixes of all names: "" first."""
    return [prefix for prefix in _prefixes(next(iter(names), "")) if all(name.startswith(prefix) for name in names)]


def _stem(name: str) -> str:
    """First part of a name without its number: `layer` of layer5.0.weight. What shares it belongs to the model."""
    return name.split(".")[0].rstrip("0123456789")


def _aliases(expected: dict[str, Tensor]) -> dict[str, str]:
    """The names of tied weights, each with another name of the same tensor."""
    first: dict[tuple[int, torch.Size], str] = {}
    aliases: dict[str, str] = {}
    for name, value in expected.items():
        other = first.setdefault((value.data_ptr(), value.shape), name)
        if other != name and value.numel() > 0:
            aliases |= {name: other, other: name}
    return aliases


def _equal(one: Match, other: Match) -> bool:
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.expected if name in one.tensors)


def explain(match: Match) -> str:
    """What is in the file and what was expected, with shapes."""
    shape = {name: tuple(size) for name, size in match.expected.items()}
    file = {name: tuple(tensor.shape) for name, tensor in match.tensors.items()}
    lines = [f"Of {len(shape)} names in the model, the file has {len(shape) - len(match.missing)} {match}."]
    for title, names in (
        ("in the model, not in the file", [f"{name} {shape[name]}" for name in match.missing]),
        ("in the file, not in the model", [f"{name} {file[name]}" for name in match.unexpected]),
        ("of other shapes", [f"{name} {file[name]} in the file, {shape[name]} expected" for name in match.reshaped]),
    ):
        if names:
            lines.append(f"{title}: {_some(names, '; ')}")
    return "\n  - ".join(lines)


def _contents(content: Any, expected: Mapping[str, Tensor]) -> str:
    """What is in a file of whose names not one is the model's."""
    found = {
        f"{place}: {name}" if place else name: tensor
        for place, part in states(content)
        for name, tensor in part.items()
    }
    wanted = f"expected: {_some(_shaped(expected), '; ')}"
    if found:
        return f"\n  - in the file: {_some(_shaped(found), '; ')}\n  - {wanted}"
    keys = f", its keys are {_some([str(key) for key in content])}" if isinstance(content, Mapping) else ""
    return f"It holds no tensors by name, but a {type(content).__name__}{keys}; {wanted}"


def _shaped(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()]


def _some(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more
