"""Names a model option can take."""

from typing import Literal

Tokeniser = Literal["pixels", "patches"]
PixelChannels = Literal["one", "all"]
Norm = Literal["none", "rms", "layer"]
Direction = Literal["forward", "alternating"]
Head = Literal["flatten", "mean", "grid"]
