"""MLflow as a tracker: the messages to its writer process and its answers. Only that process imports MLflow."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import MLflowParameters
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.comparison import flatten
from qwen_vl_lora.runs.masking import mask_text
from qwen_vl_lora.runs.record_schema import Outcome
from qwen_vl_lora.tracking import mlflow_writer
from qwen_vl_lora.tracking.process import WriterProcess, png_of
from qwen_vl_lora.tracking.tracker import Picture, Tracker

logger = logging.getLogger(__name__)

END_SECONDS = 10
EXPERIMENT = "qwen-vl-lora"
CONFIG_FILE = "mlflow.yml"
"""The file of kedro-mlflow, of which the address of the server and the name of the experiment are used."""

_ADDRESS, _NAME = "server.mlflow_tracking_uri", "tracking.experiment.name"
_UNUSED = ("server.credentials", "server.request_header_provider.type", "tracking.run.id", "tracking.run.name")
_STATES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_SETTERS = ("MLFLOW_EXPERIMENT", "MLFLOW_RUN_ID")  # of a run; here parameters.yml has them


class MLflowTracker(Tracker):
    """One run of MLflow. `open` continues the run of the same identity if the server has one.

    Args:
        settings: the `mlflow` block.
        configurations: folders of `conf/` with a `mlflow.yml`, the more specific one last.

    Raises:
        ParameterError: if MLflow or the address of a server is missing.
    """

    name = "MLflow"

    def __init__(self, settings: MLflowParameters, configurations: Sequence[Path]) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ParameterError(
                "trackers has `mlflow`, but MLflow is not installed: pip install 'mlflow-skinny>=3.1' (or mlflow), or "
                "remove it from trackers."
            )
        self._settings = settings
        of_kedro = _of_kedro_mlflow(configurations)
        uri = settings.tracking_uri or of_kedro.get(_ADDRESS) or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise ParameterError(
                "trackers has `mlflow`, but there is no address of a server: set mlflow.tracking_uri, "
                f"{_ADDRESS} in conf/local/{CONFIG_FILE}, or MLFLOW_TRACKING_URI in the environment. `mlflow server` "
                "starts one on this machine, at http://127.0.0.1:5000."
            )
        self._uri = str(uri)
        self._experiment = str(settings.experiment or of_kedro.get(_NAME) or EXPERIMENT)
        self._writer: WriterProcess | None = None
        self._is_reported = False
        self._run: str | None = None
        self._adapter: Path | None = None

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_SETTERS)}
        self._writer = WriterProcess(Path(mlflow_writer.__file__), Path.cwd(), environment)

    def open(self, identity: str, outline: Mapping[str, Any]) -> None:
        run = {
            "tracking_uri": self._uri,
            "experiment": mask_text(self._experiment),
            "identity": identity,
            "name": str(outline.get("run", identity)),
        }
        self._tell({"open": {"run": run, "config": outline}})

    def row(self, values: Mapping[str, float], step: int) -> None:
        self._tell({"log": values, "step": step})

    def pictures(self, shown: Iterator[Picture], step: int) -> None:
        taken = islice(shown, self._settings.prediction_images)
        if told := [{"png": png_of(image), "caption": text} for image, text in taken]:
            self._tell({"pictures": told, "step": step})

    def adapter(self, directory: Path) -> None:
        self._adapter = directory
        self._tell({"artifact": str(directory.absolute()), "name": "adapter"})

    def end(self, outcome: Outcome, error: str | None, outline: Mapping[str, Any]) -> None:
        """Close the run. Waits some seconds for what is still to be sent."""
        self._tell({"config": outline})
        self._process.tell({"finish": _STATES[outcome], "error": error, "seconds": END_SECONDS})
        self._process.wait(END_SECONDS + 2)
        self._hear()
        missing = next((answer["missing"] for answer in self._process.answers if "missing" in answer), ["numbers"])
        if self._run is None:
            self._report_trouble()
        elif "numbers" in missing or "pictures" in missing:
            what = "the whole run" if "numbers" in missing else "the pictures"
            logger.warning(
                "MLflow did not take %s: %s. training_log.csv and the report have it.", what, self._trouble()
            )
        if self._run is not None and self._adapter is not None and {"numbers", "adapter"} & set(missing):
            logger.warning(
                "MLflow did not take the whole adapter; to send it: MLFLOW_TRACKING_URI=%s mlflow artifacts "
                "log-artifacts --run-id %s --artifact-path adapter --local-dir %s",
                mask_text(self._uri),
                self._run,
                relative(self._adapter, Path.cwd()),
            )

    def drop(self) -> None:
        if self._writer is not None:
            self._writer.discard()

    @property
    def _process(self) -> WriterProcess:
        assert self._writer is not None
        return self._writer

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._process.tell(message)
        self._hear()

    def _hear(self) -> None:
        """Log the address of the run, or why there is none."""
        for answer in self._process.answers:
            if "run" in answer and self._run is None:
                self._run = answer["run"]
                logger.info("MLflow: watch the run at %s", mask_text(answer["url"]))
            elif "trouble" in answer and self._run is None:
                self._report_trouble()

    def _report_trouble(self) -> None:
        if not self._is_reported:
            self._is_reported = True
            logger.warning(
                "MLflow's server is not used: %s. The run continues; training_log.csv and the report have all of it.",
                self._trouble(),
            )

    def _trouble(self) -> str:
        told = [answer["trouble"] for answer in self._process.answers if "trouble" in answer]
        return mask_text(told[-1]) if told else f"{mask_text(self._uri)} does not answer in time"


def _of_kedro_mlflow(configurations: Sequence[Path]) -> dict[str, Any]:
    """Dotted key → value of `mlflow.yml`, in the form of kedro-mlflow.

    Raises:
        ParameterError: if a file cannot be read.
    """
    values: dict[str, Any] = {}
    for file in (folder / CONFIG_FILE for folder in configurations):
        if not file.is_file():
            continue
        try:
            tree: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
        except (OmegaConfBaseException, YAMLError, OSError) as error:
            raise ParameterError(
                f"{file} cannot be read ({str(error).splitlines()[0]}). Correct it, or set mlflow.tracking_uri and "
                f"mlflow.experiment and remove the file."
            ) from error
        values |= flatten(tree) if isinstance(tree, dict) else {}
        if unused := [key for key in _UNUSED if values.get(key) is not None]:
            logger.warning("%s: not used here: %s. Credentials are read from the environment.", file, ", ".join(unused))
    return values
