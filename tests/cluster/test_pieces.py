"""Pieces of work are done once each, by whichever process is free, also where processes die."""

import pytest
import torch

from cluster.works import Squares, cluster
from qwen_vl_lora.cluster.work import Processes
from qwen_vl_lora.exceptions import ClusterError, DataFormatError

CPU = torch.device("cpu")


def results_of(work, pieces, *processes):
    """Results by the number of their piece."""
    return {done.number: done.result for done in Processes(*processes).in_pieces(work, pieces)}


def done_by(folder):
    """Numbers of the pieces that each process finished."""
    return {file.name: [int(line) for line in file.read_text().splitlines()] for file in folder.glob("done by *")}


@pytest.mark.parametrize("processes", [1, 3])
def test_every_piece_is_done_once_and_told_with_its_number(tmp_path, mark, processes, caplog):
    with caplog.at_level("INFO"):
        squares = Squares(tmp_path, together=processes)
        results = results_of(squares, iter(range(5, 25)), cluster(processes=processes), CPU)
    assert results == {number: (5 + number) ** 2 for number in range(20)}
    done = done_by(tmp_path)
    assert len(done) == processes
    assert sorted(number for numbers in done.values() for number in numbers) == list(range(5, 25))
    assert ("Squares: 20 pieces in 3 processes (" in caplog.text) == (processes > 1)


def test_the_share_of_a_process_that_is_killed_is_repeated(tmp_path, mark, caplog):
    results = results_of(Squares(tmp_path, {3: "killed", 9: "killed"}), range(20), cluster(), CPU)
    assert results == {number: number**2 for number in range(20)}
    assert caplog.text.count("A process was killed. Its share is repeated") == 2


def test_a_piece_that_kills_every_process_ends_the_work(tmp_path, mark):
    with pytest.raises(ClusterError, match=r"Processes died 3 times without finishing a piece"):
        results_of(Squares(tmp_path, {0: "always killed"}), range(1), cluster(), CPU)


def test_an_error_of_a_piece_is_raised_as_it_is(tmp_path, mark):
    with pytest.raises(DataFormatError, match=r"^Picture 7 is bad\. Take another\.$"):
        results_of(Squares(tmp_path, {7: "expected"}), range(20), cluster(), CPU)


def test_a_process_that_hangs_ends_the_work(tmp_path, mark):
    with pytest.raises(ClusterError, match="No piece was finished for 15 s"):
        results_of(Squares(tmp_path, {1: "busy"}), range(2), cluster(timeout=15), CPU)
