"""The exceptions that this library raises for mistakes that it can name."""

from __future__ import annotations

__all__ = ["DisagreementError", "OLMoConfigurationError", "OLMoError"]


class OLMoError(Exception):
    """Base class of the library's own exceptions."""


class OLMoConfigurationError(OLMoError):
    """A configuration, or a combination of options, that cannot be honoured.

    The message says what was expected, what came, and what to do instead.
    """


class DisagreementError(OLMoError, ValueError):
    """Ranks that share a sequence were given different input, or one of them refused its own.

    Raised on every rank that did not raise an error of its own.
    """
