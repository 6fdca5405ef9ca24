"""Progressive knowledge distillation with Mamba: a teacher distilled, round by round, into a growing ensemble."""

import os

# Before torch loads its OpenMP runtime: threads that wait by spinning stall each other when another process shares the
# cores, and fits of tiny models consist of thousands of short parallel regions.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pkd_lightning._torchvision import repair_on_import

__version__ = "0.1.0"

repair_on_import()
