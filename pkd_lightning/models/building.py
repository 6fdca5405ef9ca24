"""Building any importable classifier for a data set's images, and checking that it gives their logits."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pkd_lightning.checks import located
from pkd_lightning.earlier import following, reads
from pkd_lightning.errors import ConfigError, PKDError
from pkd_lightning.outputs import output_of

InputShape = tuple[int, ...]
ImageShape = tuple[int, int, int]
Trust = bool | str | Sequence[str]
PACKAGE = __name__.split(".")[0]

# Import paths of the ladders built in this process. They are the user's own words, unlike those in a run's files: so a
# run of a user's model is resumed, and loaded where it was trained, without `trust`.
configured: set[str] = set()


# of whoever named the parts of a model that is being built: its configuration, or the file of a run
_trust: ContextVar[Trust] = ContextVar("trust", default=True)


@contextmanager
def trusting(trust: Trust) -> Iterator[None]:
    """Within the block, parts of models are imported by `trust`, see `import_model`."""
    token = _trust.set(trust)
    try:
        yield
    finally:
        _trust.reset(token)


def import_part(key: str, path: str) -> Callable[..., Any]:
    """The module at the import path of a model's option `key`, by the trust that the model has.

    Raises:
        ConfigError: see `import_model`.
    """
    trust = _trust.get()
    part = import_model(path, trust, key)
    if trust is True:
        configured.add(path)
    return part


def path_of(cls: type) -> str:
    """The import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def trusted(cls: type) -> None:
    """Note that a class is used in this process, by its configuration: a file may name it."""
    configured.add(path_of(cls))


def import_model(path: str, trust: Trust, key: str = "model", kind: type = nn.Module) -> Callable[..., Any]:
    """The model at an import path, which is imported only where it is trusted, and not called.

    Args:
        path: import path.
        trust: import paths of models, or of packages with all models in them, that are trusted besides this package
            and those `configured`. True: any.
        key: what names it, for messages.
        kind: what it must be a class of.

    Raises:
        ConfigError: where it is not trusted, cannot be imported, or is no class of `kind`, nor a function annotated to
            return one.
    """
    given = [PACKAGE, *([trust] if isinstance(trust, str) else trust or [])] if trust is not True else [path]
    inside = [name for name in given if f"{path}.".startswith(f"{name}.")]
    advice = f"where you trust its code, which loading it runs, say trust={path!r}, or its package"
    if path not in configured and not inside:
        raise ConfigError([f"{key}={path!r}: is not of {PACKAGE}; {advice}"])
    try:
        model: Callable[..., Any] = located(path)
        made = model if isinstance(model, type) else inspect.signature(model, eval_str=True).return_annotation
    except Exception as error:  # an annotation, too, may name what is not there
        raise ConfigError([f"{key}={path!r}: cannot be imported ({error})"]) from error
    name = "torch.nn.Module" if kind is nn.Module else kind.__name__
    if not (isinstance(made, type) and issubclass(made, kind)):
        raise ConfigError([f"{key}={path!r}: must be a class of {name}, or a function annotated to return one"])
    # not a function, not even of this package: one could load other files with a `trust` that stands in the file
    own = isinstance(model, type) and model.__module__.split(".")[0] == PACKAGE
    if path not in configured and inside == [PACKAGE] and not own:
        raise ConfigError([f"{key}={path!r}: is no class of {PACKAGE}; {advice}"])
    return model


def build_classifier(
    make: Callable[..., Any],
    options: Mapping[str, Any],
    input_shape: InputShape,
    num_classes: int,
    earlier: Callable[[], Sequence[nn.Module]] = tuple,
) -> nn.Module:
    """Call `make` with `options`, and with the shape of its inputs (as `input_shape`, or `image_shape`) and
    `num_classes` where its signature names them.

    A model with lazy layers is called once, on one input, so that it comes with all its parameters; where it reads
    earlier students, together with those that `earlier` gives. One that reads them and has a method `follow` makes its
    layers there: it is called with these students, which may be none.

    Raises:
        ConfigError: from `make`, or where it refuses its arguments, gives no torch module, or leaves a layer lazy.
    """
    named = inspect.signature(make).parameters
    offered = {"input_shape": input_shape, "image_shape": input_shape, "num_classes": num_classes}
    missing = {name: value for name, value in offered.items() if name in named and name not in options}
    try:
        model = make(**missing, **options)
    except PKDError:
        raise
    except Exception as error:  # whatever the user's constructor raises
        raise ConfigError([f"{_name(make)}: cannot be built ({error})"]) from error
    if not isinstance(model, nn.Module):
        raise ConfigError([f"{_name(make)}: gives a {type(model).__name__}, not a torch module"])
    if reads(model) and hasattr(model, "follow"):
        model.follow(list(earlier()))  # type: ignore[operator]
    if _lazy(model):
        evaluated(following(model, earlier() if reads(model) else ()), torch.zeros(1, *input_shape))
        if left := _lazy(model):
            raise ConfigError([f"{_name(make)}: lazy parameters without a size after a call: {', '.join(left)}"])
    return model


def evaluated(model: nn.Module, inputs: Tensor) -> Any:
    """The logits that `model` gives for `inputs` (batch, *input_shape) in evaluation mode, without gradients.

    Raises:
        ConfigError: where the call fails.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return output_of(model(inputs)).logits
    except PKDError:
        raise
    except Exception as error:  # whatever the user's forward raises
        shape = "x".join(map(str, inputs.shape[1:]))
        raise ConfigError([f"cannot read inputs of {shape} ({brief(error)})"]) from error
    finally:
        model.train(training)


def check_logits(logits: Any, samples: int, num_classes: int) -> None:
    """Check that what a model gave are floating-point logits (samples, num_classes).

    Raises:
        ConfigError: where they are not.
    """
    expected = (samples, num_classes)
    if not isinstance(logits, Tensor):
        raise ConfigError([f"gives type {type(logits).__name__}, not logits in a tensor of shape {expected}"])
    if tuple(logits.shape) != expected:
        found = f"shape {tuple(logits.shape)} for {samples} input{'s' if samples > 1 else ''}"
        raise ConfigError([f"gives {found} of {num_classes} classes, not {expected}"])
    if not logits.is_floating_point():
        raise ConfigError([f"gives logits of type {logits.dtype}, not of floating point"])


def brief(error: Exception) -> str:
    """The kind of an error and the first line of its message, at most 200 characters of it."""
    return ": ".join([type(error).__name__, *str(error).strip()[:200].splitlines()[:1]])


def _lazy(model: nn.Module) -> list[str]:
    named = chain(model.named_parameters(), model.named_buffers())
    return [name for name, value in named if is_lazy(value)]


def _name(make: Callable[..., Any]) -> str:
    return str(getattr(make, "__name__", make))
