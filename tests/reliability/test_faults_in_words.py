"""Each library's own way to say that the machine failed becomes the same few messages.

The memory errors of torch, numpy and Python are raised for real. The texts about full and read-only disks were copied
from what safetensors and torch raised on a small tmpfs. Those of a GPU, of threads and of C++ are written in the form
in which these libraries give them and were not raised here: no GPU was at hand.
"""

from __future__ import annotations

import errno
import os
import sys

import numpy as np
import pytest
import torch

from qwen_vl_lora.exceptions import DataFormatError, MachineError
from qwen_vl_lora.faults import machine_fault, shown_bytes
from qwen_vl_lora.session.console import expected_error

CUDA = (
    "CUDA out of memory. Tried to allocate 372.53 GiB. GPU 0 has a total capacity of 139.81 GiB of which 139.29 GiB is "
    "free. Process 1 has 520.00 MiB memory in use. Of the allocated memory 0 bytes is allocated by PyTorch. "
    "If reserved but unallocated memory is large try setting something."
)


def raised(action) -> Exception:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(lambda: torch.empty(10**14), id="torch"),
        pytest.param(lambda: np.empty(10**14), id="numpy"),
        pytest.param(lambda: bytearray(10**15), id="Python"),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems promise any amount")
def test_memory_that_is_not_there_is_told_with_figures(action):
    message = str(machine_fault(raised(action)))
    assert message.startswith("Out of main memory.")
    assert "This process used" in message


def test_what_torch_asked_for_is_told():
    assert "One allocation requested 363.8 TiB" in str(machine_fault(raised(lambda: torch.empty(10**14))))


def test_a_gpus_memory_is_told_with_torchs_figures():
    message = str(machine_fault(torch.OutOfMemoryError(CUDA)))
    assert "Tried to allocate 372.53 GiB" in message
    assert "139.29 GiB is free." in message
    assert "If reserved" not in message
    assert "per_device_train_batch_size: auto" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", "No space left to write"),
        ("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534", "No space left to write"),
        (
            "[enforce fail at inline_container.cc:746] . open file failed with strerror: Read-only file system",
            "read-only",
        ),
        ('Error while serializing: I/O error: Read-only file system (os error 30) at path "/x"', "read-only"),
        ("can't start new thread", "Out of main memory"),
        ("std::bad_alloc", "Out of main memory"),
    ],
)
def test_texts_of_other_libraries_are_understood(text, words):
    assert words in str(machine_fault(RuntimeError(text)))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left to write"),
        (errno.EDQUOT, "No space left to write"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "Access denied"),
        (errno.EPERM, "Access denied"),
        (errno.EPIPE, "its output was closed"),
        (errno.EMFILE, "Too many open files"),
        (errno.EXDEV, "on one filesystem"),
        (errno.EIO, "Disk input/output failed"),
        (errno.ENAMETOOLONG, "longer than the filesystem allows"),
    ],
)
def test_every_fault_says_that_nothing_half_written_is_visible(number, words):
    message = str(machine_fault(OSError(number, os.strerror(number), "data/file")))
    assert words in message
    assert "No partial file is visible" in message


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory"),
        OSError("truncated"),
        ValueError("[Errno 28] No space left on device"),
        RuntimeError("shape mismatch"),
        KeyError("os error 28"),
    ],
)
def test_errors_of_the_program_are_not_taken_for_the_machines(error):
    assert machine_fault(error) is None
    assert expected_error(error) is None


def test_a_fault_is_found_behind_what_wraps_it():
    error = ValueError("Failed while saving data")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(expected_error(error), MachineError)


def test_the_projects_own_words_win():
    own = DataFormatError("mine")
    own.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert expected_error(own) is own


def test_bytes_are_shown_for_people():
    assert [shown_bytes(n) for n in (0, 1023, 1024, 5 * 2**30, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
