"""The form of a run's results: its version, where they are before they are whole, and names in its epochs' lines."""

from collections.abc import Callable, Mapping
from typing import Any

SCHEMA = 1  # of results.json and progress.json
PROGRESS = "progress.json"  # of a run without results.json: the rounds so far, in the same form
Observer = Callable[[Mapping[str, Any]], None]  # is given what PROGRESS holds, whenever a round is done
OBJECTIVE = "objective"  # the name of the objective among the shares of the gradient
VALUE, SHARE = "knowledge/", "gradient_share/"  # before a term's name, in the lines of the epochs and in trackers
