"""Every error the project raises on purpose.

    QwenVLLoraError             an expected fault; its message alone is shown to the user
    ├── ParameterError          (ValueError)        a key or value in parameters.yml or --params
    ├── DataFormatError         (ValueError)        a source, sample, image or artifact in the wrong form
    │   ├── samples.records.RowError                one row; a collection makes it a rejection
    │   └── hub.fetching.FetchError                 one address; a stage makes it a rejection
    ├── MissingArtifactError    (FileNotFoundError) a file, snapshot or version that is not there
    ├── BaseModelError          (RuntimeError)      a base model that cannot be used as it is
    ├── AdapterError            (RuntimeError)      an adapter that does not belong to this base or setting
    ├── DeviceError             (RuntimeError)      the asked-for device is absent or too small
    ├── TrainingError           (RuntimeError)      training stopped itself: the result would be wrong
    ├── LauncherError           (RuntimeError)      a rank was killed or hung, or a machine did not come
    ├── MachineError            (RuntimeError)      the disk is full, memory is out, access was refused
    └── lineage.run.RunInterruptedError (RuntimeError)  a signal asked the run to end

A message names where, what was required, what came, and the remedy.
"""


class QwenVLLoraError(Exception):
    """An expected fault: the command line prints its message without a traceback."""


class ParameterError(QwenVLLoraError, ValueError):
    """A parameter is unknown, contradictory or out of range."""


class DataFormatError(QwenVLLoraError, ValueError):
    """A source, sample, image or stored artifact does not have the form it must have."""


class MissingArtifactError(QwenVLLoraError, FileNotFoundError):
    """A file, snapshot or dataset version that is needed is not there."""


class BaseModelError(QwenVLLoraError, RuntimeError):
    """The base model is incomplete, altered or of a family that is not supported."""


class AdapterError(QwenVLLoraError, RuntimeError):
    """The adapter does not fit the base model or the configured prompt and image size."""


class DeviceError(QwenVLLoraError, RuntimeError):
    """The asked-for device is absent, unsupported or out of memory."""


class TrainingError(QwenVLLoraError, RuntimeError):
    """Training stopped itself because its result would have been wrong."""


class LauncherError(QwenVLLoraError, RuntimeError):
    """One of several processes was killed, hung or failed, or a machine did not come."""


class MachineError(QwenVLLoraError, RuntimeError):
    """The machine failed, not the program: the disk is full, memory is out, access was refused."""
