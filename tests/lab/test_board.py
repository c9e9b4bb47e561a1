"""TensorBoard's files hold the means over seeds, and a full disk there ends nothing."""

import struct

import numpy as np
import pytest

from qlab.lab.board import Board, finite_mean


def rows(*losses):
    return [{"phase": "train", "metrics": {"loss": v}} for v in losses]


def events(file):
    """The format's records: u64 length, its crc, data, its crc."""
    from tensorboardX.proto import event_pb2

    data, at = file.read_bytes(), 0
    while at < len(data):
        (n,) = struct.unpack_from("Q", data, at)
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + n])
        at += 16 + n


def test_means_over_seeds_are_read_back(tmp_path):
    pytest.importorskip("tensorboardX")
    board = Board(tmp_path / "arm")
    board.add(rows(1.0, 3.0), 10)
    board.add(rows(float("nan"), 5.0), 20)
    board.close()
    (file,) = (tmp_path / "arm").iterdir()
    first, *found = events(file)
    assert first.file_version == "brain.Event:2"
    assert [e.step for e in found] == [10, 20]
    assert [e.summary.value[0].tag for e in found] == ["train/loss"] * 2
    assert [e.summary.value[0].simple_value for e in found] == [2.0, 5.0]


def test_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    writers = pytest.importorskip("tensorboardX.record_writer")
    full = "/dev/full"
    monkeypatch.setattr(writers, "open_file", lambda path: open(full, "wb", buffering=64))  # noqa: SIM115
    board = Board(tmp_path)
    for step in range(100):
        board.add(rows(1.0), step)
    board.close()
    board.add(rows(1.0), 101)


def test_a_folder_that_cannot_be_made_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    board = Board(tmp_path / "file" / "arm")
    board.add(rows(1.0), 1)
    board.close()


def test_finite_mean():
    assert finite_mean([1.0, float("inf"), 3.0]) == 2.0
    assert np.isnan(finite_mean([float("nan")]))
