"""Every error that the project raises on purpose.

    QwenVLLoraError             an expected fault; only its message is shown to the user
    ├── ParameterError          (ValueError)        a key or value in parameters.yml or --params
    ├── DataFormatError         (ValueError)        a source, sample, picture or artifact in the wrong form
    │   ├── samples.records.RowError                one row; a collection turns it into a rejection
    │   └── hub.fetching.FetchError                 one URL; a stage turns it into a rejection
    ├── MissingArtifactError    (FileNotFoundError) a file, snapshot or version was not found
    ├── BaseModelError          (RuntimeError)      a base model that cannot be used
    ├── AdapterError            (RuntimeError)      an adapter that does not fit the base model or the parameters
    ├── DeviceError             (RuntimeError)      the requested device is missing or too small
    ├── TrainingError           (RuntimeError)      training stopped because the result would be wrong
    ├── ClusterError            (RuntimeError)      a rank was killed or hung, or a machine did not join
    ├── ServerError             (RuntimeError)      a server of captions is gone, refuses, or is another
    ├── MachineError            (RuntimeError)      the disk is full, memory is exhausted, access was denied
    └── runs.run.RunInterruptedError (RuntimeError)  a signal ended the run

A message states the place, what was expected, what it got, and the remedy.
"""

CTRL_C = 130
"""Exit code of a command that Ctrl-C ended: 128 and the number of SIGINT, as in shells."""


class QwenVLLoraError(Exception):
    """Base of all expected faults. The command line prints the message without a traceback.

    Attributes:
        exit_code: of the command that it ends.
    """

    exit_code = 1


class ParameterError(QwenVLLoraError, ValueError):
    """A parameter is unknown, contradictory or out of range."""


class DataFormatError(QwenVLLoraError, ValueError):
    """A source, sample, picture or stored artifact does not have the expected form."""


class MissingArtifactError(QwenVLLoraError, FileNotFoundError):
    """A required file, snapshot or dataset version was not found."""


class BaseModelError(QwenVLLoraError, RuntimeError):
    """The base model is incomplete, altered or of an unsupported family."""


class AdapterError(QwenVLLoraError, RuntimeError):
    """The adapter does not fit the base model or the configured prompt and image size."""


class DeviceError(QwenVLLoraError, RuntimeError):
    """The requested device is missing, unsupported or out of memory."""


class TrainingError(QwenVLLoraError, RuntimeError):
    """Training stopped because its result would have been wrong."""


class ClusterError(QwenVLLoraError, RuntimeError):
    """One of several processes was killed, hung or failed, or a machine did not join."""


class ServerError(QwenVLLoraError, RuntimeError):
    """A server of captions does not answer, refuses every question, or answers what was not asked."""


class MachineError(QwenVLLoraError, RuntimeError):
    """A fault of the machine: the disk is full, memory is exhausted, or access was denied."""
