"""`qwen-vl-lora playground` says before anything else what keeps it from starting."""

import socket
import sys

import pytest
from click.testing import CliRunner

from qwen_vl_lora.commands.playground import playground
from qwen_vl_lora.exceptions import MissingArtifactError, ParameterError


def refusal(*arguments):
    return CliRunner().invoke(playground, arguments).exception


def test_without_gradio_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    said = refusal()
    assert isinstance(said, MissingArtifactError)
    assert 'pip install -e ".[playground]"' in str(said)


def test_three_adapters_are_one_too_many():
    said = refusal("--adapter", "a", "--adapter", "b", "--adapter", "c")
    assert isinstance(said, ParameterError)
    assert "one or two adapters; got 3" in str(said)


def test_a_port_of_another_program_is_named():
    pytest.importorskip("gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = refusal("--port", str(port))
    assert isinstance(said, ParameterError)
    assert f"Port {port} is in use" in str(said)
