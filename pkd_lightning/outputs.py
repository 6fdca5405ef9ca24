"""What a model gives: its logits, and intermediate tensors where they are asked for."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pkd_lightning.errors import ConfigError

NONE: Mapping[str, Tensor] = MappingProxyType({})


class Output(NamedTuple):
    """What a model gives for a batch. A model may return a tensor instead, which are the logits.

    Attributes:
        logits: (batch, L).
        features: intermediate tensors by name; empty unless they are asked for.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = NONE


def output_of(given: Any) -> Output:
    """The `Output` that a model's call gave, or that stands for the logits it gave."""
    return given if isinstance(given, Output) else Output(given)


class Taps:
    """Takes what modules inside of a model give, by their paths (`blocks.2`), while it is open (`with`).

    Of a module that is called several times it is the last call's. Where a module reads the raster in another order,
    such as a mixer that reads backwards, its tokens are brought back to that of the raster: a model has a method
    `raster_positions(path)` for that, see `MambaClassifier`.

    Args:
        model: any torch module; it is not changed, and has no hooks while the taps are closed.
        paths: as in `paths_of`.

    Attributes:
        modules: by their paths.
        read: for each path where in the raster the tokens lie that its module reads; None where in order.

    Raises:
        ConfigError: where there is no such module, with the nearest.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        known = dict(model.named_modules()) if paths else {}
        names = {path: _counted(path, known) for path in paths_of(model, paths)}
        self.modules = {path: known[name] for path, name in names.items()}
        places = getattr(model, "raster_positions", None)
        self.read: dict[str, Tensor | None] = {
            path: None if places is None else places(name) for path, name in names.items()
        }
        self._found: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Taps":
        for path, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._taking(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _taking(self, path: str) -> Callable[..., None]:
        read = self.read[path]
        back = None if read is None else read.argsort()

        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            self._found[path] = output if back is None else output.index_select(1, back.to(output.device))
            if back is None and isinstance(output, Tensor) and not output.is_inference():
                self._versions[path] = output._version

        return take

    def call(self, forward: Callable[[Tensor], Any], inputs: Tensor) -> Output:
        """What `forward`, which calls the model once, gives, with the features that were taken on the way.

        Raises:
            ConfigError: where a module was not called, gave no tensor, or one that a later operation has changed.
        """
        self._found, self._versions = {}, {}
        logits, features = output_of(forward(inputs))
        for path in self.modules:
            if not isinstance(self._found.get(path), Tensor):
                gave = f"gave a {type(self._found[path]).__name__}" if path in self._found else "was not called"
                raise ConfigError([f"{path!r}: this module {gave}, so there is no feature of that name"])
            if path in self._versions and self._found[path]._version != self._versions[path]:
                raise ConfigError(
                    [f"{path!r}: what this module gives is changed in place by what follows; name the module after it"]
                )
        return Output(logits, {**features, **self._found}) if self.modules else Output(logits, features)


def paths_of(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The paths of single modules that these stand for.

    Args:
        model: whose modules are meant.
        paths: names as in `model.named_modules()`; `blocks.-1` is the last of `blocks`, and `blocks.*.norm` stands for
            the `norm` of each that has one, in their order.

    Raises:
        ConfigError: where there is no such module, with the nearest.
    """
    known = dict(model.named_modules()) if paths else {}
    found: list[str] = []
    faults = []
    for path in paths:
        meant = [one for one in _spelt_out(path, known) if one and _counted(one, known) in known]
        if not meant:
            near = difflib.get_close_matches(path, [name for name in known if name], n=3, cutoff=0.3)
            faults.append(f"{path!r}: no module of the model; nearest: {', '.join(near) or 'none'}")
        found += meant
    if faults:
        raise ConfigError(faults)
    return found


def _spelt_out(path: str, known: Mapping[str, nn.Module]) -> list[str]:
    """The paths with the names of all modules in place of each `*`, whether or not they lead anywhere."""
    before, star, after = f".{path}.".partition(".*.")
    if not star:
        return [path]
    before, after = before.strip("."), after.strip(".")
    parent = known.get(_counted(before, known) if before else "")
    children = [name for name, _ in parent.named_children()] if parent is not None else []
    spelt = [".".join(part for part in (before, child, after) if part) for child in children]
    return [one for child in spelt for one in _spelt_out(child, known)]


def _counted(path: str, known: Mapping[str, nn.Module]) -> str:
    """A module's path with its own numbers: for `-1` the last of the modules there, for `-2` the one before."""
    found: list[str] = []
    for part in path.split("."):
        parent = known.get(".".join(found))
        children = [name for name, _ in parent.named_children()] if parent is not None else []
        behind = int(part[1:]) if part[:1] == "-" and part[1:].isdecimal() else 0
        found.append(children[-behind] if 0 < behind <= len(children) else part)
    return ".".join(found)
