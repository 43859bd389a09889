"""Checkpoints are written in the background, whole, and as they were when they were saved."""

import pytest
import torch

from kit import checkpoint


def test_what_is_saved_is_what_was_there(tmp_path):
    weights, numbers = torch.zeros(3), [1]
    with checkpoint.Saver(torch.device("cpu")) as save:
        state = {"weights": weights, "history": numbers, "lr": {"lr": torch.tensor(0.5)}}
        save({tmp_path / "last.pt": state, tmp_path / "best.pt": {"weights": weights}})
        weights += 1
        numbers.append(2)
    last = checkpoint.load(tmp_path / "last.pt")
    assert last["weights"].tolist() == [0, 0, 0] and last["history"] == [1]
    assert last["lr"]["lr"] == 0.5
    assert checkpoint.load(tmp_path / "best.pt")["weights"].tolist() == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_the_layout_of_weights_is_kept(tmp_path):
    weights = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    with checkpoint.Saver(torch.device("cpu")) as save:
        save({tmp_path / "best.pt": {"weights": weights}})
    loaded = checkpoint.load(tmp_path / "best.pt")["weights"]
    assert torch.equal(loaded, weights) and loaded.stride() == weights.stride()


def test_a_failed_save_is_raised_by_the_next_or_at_the_end(tmp_path):
    (tmp_path / "file").write_text("")
    unwritable = {tmp_path / "file" / "last.pt": {}}
    with pytest.raises(OSError), checkpoint.Saver(torch.device("cpu")) as save:
        save(unwritable)
        save({tmp_path / "last.pt": {}})
    assert not (tmp_path / "last.pt").exists()
    with pytest.raises(OSError), checkpoint.Saver(torch.device("cpu")) as save:
        save(unwritable)
        raise KeyboardInterrupt  # what was lost is said even then
