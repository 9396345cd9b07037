"""Every exception and warning of the package's own, and the importer of optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


class DmcpError(Exception):
    """Root of the package's own exceptions; the command line prints one as a single line."""


class ConfigError(DmcpError, ValueError):
    """An option has a value that is not accepted."""


class UnknownNameError(ConfigError, KeyError):
    """A read-only mapping of the package holds nothing of that name."""

    __str__ = Exception.__str__  # that of a KeyError puts the message in quotes


class TraceError(DmcpError):
    """A model cannot be traced to channel units; the message names the module and the reason."""


class BudgetError(DmcpError, ValueError):
    """A budget is malformed, or no structure of the network can meet it."""


class SamplingError(DmcpError):
    """Markov sampling found no structure within the tolerance of the budget."""


class DataError(DmcpError, ValueError):
    """A data set is missing, empty, malformed or too small."""


class CheckpointError(DmcpError):
    """A checkpoint or a run folder is corrupt, or belongs to something else."""


class StructureError(ConfigError):
    """A structure file is malformed, or of another network."""


class ExportError(DmcpError):
    """A network has no exact counterpart in the form asked for; the message says where."""


class DivergenceError(DmcpError):
    """A loss became NaN or infinite."""


class SearchWarning(UserWarning):
    """A search goes on, but its result may not be what was asked for."""


class MissingDependencyError(DmcpError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: the name to import, e.g. ``"sklearn.datasets"``.
        extra: the extra of ``dmcp`` that installs it.
        purpose: what needs it, the subject of the error message.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package {package.split('.')[0]!r}: pip install 'dmcp[{extra}]'"
        ) from error
