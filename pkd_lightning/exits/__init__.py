"""Early exit: rules, their calibration on validation rows, and what they give on the test part."""

from pkd_lightning.exits.calibration import budgeted_thresholds, one_threshold
from pkd_lightning.exits.learned import LearnedExit, learn
from pkd_lightning.exits.policy import ExitPolicy, Exits, calibrate
from pkd_lightning.exits.rules import ENTROPY, MARGIN, MAXIMUM, PATIENCE, Rule

__all__ = [
    "ENTROPY",
    "MARGIN",
    "MAXIMUM",
    "PATIENCE",
    "ExitPolicy",
    "Exits",
    "LearnedExit",
    "Rule",
    "budgeted_thresholds",
    "calibrate",
    "learn",
    "one_threshold",
]
