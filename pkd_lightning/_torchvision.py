"""Lets torchvision's wheel import beside the CPU build of torch."""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_libraries: list[Any] = []  # a torch Library's definitions live as long as the object


class Repair(MetaPathFinder):
    """Finds no module, but calls `define_missing_operators` when torchvision is first looked for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Leave the module `name` to other finders."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            define_missing_operators()


def repair_on_import() -> None:
    """Have the operators defined before torchvision is imported, and torch, which takes a second, not before that."""
    if not any(isinstance(finder, Repair) for finder in sys.meta_path):
        sys.meta_path.insert(0, Repair())


def define_missing_operators() -> None:
    """Define the schemas `torchvision::nms` and `torchvision::qnms` where torchvision's extension cannot load.

    torchvision's wheel is linked against the CUDA build of torch. Beside a CPU build its extension fails to load, and
    its import then fails while it registers fake kernels for two operators nobody defined. torchmetrics, and through it
    lightning, import torchvision, so this must run before either. Where the extension loads, nothing is changed.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if _libraries or spec is None or spec.origin is None:
        return
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
