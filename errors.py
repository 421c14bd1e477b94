"""Every error that a user can cause, and the exit code that the command line gives it.

    OnnxpressError
    ├── UsageError      2   the command, the call or what it was given is wrong
    │   ├── SourceError     a model that cannot be found, read or built
    │   ├── ExportError     a model that cannot be captured as a graph
    │   ├── InputError      feeds or text that the model does not take (also a ValueError)
    │   ├── OutputError     a place that cannot be written, or already holds something
    │   └── MissingPackage  an optional package is not installed; the hint is the pip line
    ├── GateError       3   a check refused the result; nothing was published
    ├── ProviderError   4   an execution provider is missing, or fell back to another
    └── ArtifactError   5   an artifact is damaged, incomplete or of a newer format

An error says what happened, where, and what to do next: three parts, three arguments.
"""

from __future__ import annotations


class OnnxpressError(Exception):
    """Base of all of them.

    Args:
        what: What happened, as one sentence without a full stop at its end.
        where: The file, input, node or line concerned; left out where `what` says it.
        hint: What the user can do next.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  hint:  {self.hint}")
        return "\n".join(lines)


class UsageError(OnnxpressError):
    """The command, the call or what it was given is wrong."""


class SourceError(UsageError):
    """A model that cannot be found, read or built."""


class ExportError(UsageError):
    """A model that torch.export or the ONNX exporter cannot take; `where` is the user's line."""


class InputError(UsageError, ValueError):
    """Feeds or text that the model does not take."""


class OutputError(UsageError):
    """A place that cannot be written, or that already holds something."""


class MissingPackage(UsageError):
    """An optional package is not installed; the hint is the pip line that mends it."""


class GateError(OnnxpressError):
    """A check refused the result; nothing was published."""

    exit_code = 3


class ProviderError(OnnxpressError):
    """An execution provider is missing, or nodes fell back to another one."""

    exit_code = 4


class ArtifactError(OnnxpressError):
    """An artifact is damaged, incomplete or of a newer format."""

    exit_code = 5
