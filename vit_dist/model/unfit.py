"""The error of weights that do not fit a model as it is set, and would if something were set."""

from collections.abc import Mapping
from typing import Any

from vit_dist.config.errors import DataError


class UnfitError(DataError):
    """Weights that do not fit; the message names no flag, as each command has flags of its own.

    Attributes:
      settings: what would make them fit: key of the config -> value, or "..." where only the user
        knows it. The command that fails turns it into its own flags (see run/origins.py).
    """

    def __init__(self, message: str, settings: Mapping[str, Any]):
        super().__init__(message)
        self.settings = dict(settings)
