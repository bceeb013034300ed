"""Errors that a user can fix: one line says what, the next says how."""


class TrtKdError(Exception):
    """Something the user can change; the command line prints it as two lines, exit code 2."""

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.hint = hint

    def __str__(self) -> str:
        what = super().__str__()
        return f"{what}\n  hint: {self.hint}" if self.hint else what


class ConfigError(TrtKdError):
    """A recipe, an override or an option is wrong."""


class ArtifactError(TrtKdError):
    """A directory is not the finished, unchanged artifact that was asked for."""


class ModelError(TrtKdError):
    """A model is unsupported, damaged or unfit for the request."""


class DataError(TrtKdError):
    """Text is missing, empty or too short for the request."""


class ServerError(TrtKdError):
    """A server does not answer, or not what was asked."""


class VerificationError(TrtKdError):
    """What was written does not say what its source says."""


class MissingDependencyError(TrtKdError):
    """An optional package is not installed."""
