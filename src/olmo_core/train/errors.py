"""What can go wrong in a run."""

from __future__ import annotations

from olmo_core.exceptions import OLMoError

__all__ = ["CheckpointError", "TrainingError"]


class TrainingError(OLMoError):
    """A run that cannot start or go on."""


class CheckpointError(OLMoError):
    """A checkpoint that is missing, damaged, or could not be written."""
