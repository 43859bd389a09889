"""Checkpoints are whole, as they were when saved, and load in place into any optimizer."""

import hashlib
import io
import json
import random
from copy import deepcopy
from types import SimpleNamespace

import train
from kit import checkpoint, run
from kit.ema import EMA
from models import build_model

import numpy as np
import pytest
import torch
from conftest import assert_same, is_one_line, train_small

CPU = torch.device("cpu")
FOLDER = "fashion_mnist/published/se/seed0"


def test_what_is_saved_is_what_was_there(tmp_path):
    state = {"weights": torch.arange(3.0), "history": [1, {"lr": 0.5}], "none": None, "odd": "§"}
    (tmp_path / "last.pt").write_bytes(checkpoint.serialized(state))
    assert_same(checkpoint.load(tmp_path / "last.pt"), state)
    assert_same(torch.load(tmp_path / "last.pt", weights_only=True), state)
    torch.save(state, tmp_path / "theirs.pt")
    assert_same(checkpoint.load(tmp_path / "theirs.pt"), state)


def test_a_checkpoint_with_a_sha256_at_its_end_is_loaded(tmp_path):
    """As they were saved for a time: in the comment of the archive, which ends with its length."""
    state = {"weights": torch.arange(3.0)}
    body = checkpoint.serialized(state)[:-2] + (64).to_bytes(2, "little")
    (tmp_path / "last.pt").write_bytes(body + hashlib.sha256(body).hexdigest().encode())
    assert_same(checkpoint.load(tmp_path / "last.pt"), state)


def test_a_damaged_file_is_refused_or_loads_as_it_was(tmp_path):
    """A bit of every byte; that by which a member is called a folder; bytes and ends missing."""
    state, path = {"weights": torch.arange(6.0), "history": [1, {"lr": 0.5}]}, tmp_path / "last.pt"
    body, refused = checkpoint.serialized(state), 0
    draw = random.Random(0)
    folders = [i + 38 for i in range(len(body)) if body[i : i + 4] == b"PK\1\2"]
    flips = [(at, 1 << draw.randrange(8)) for at in range(len(body))]
    damaged = [body[:end] for end in range(0, len(body), 7)]
    damaged += [body[:at] + body[at + 1 :] for at in range(0, len(body), 7)]
    for at, bit in flips + [(at, 0x10) for at in folders]:
        damaged.append(body[:at] + bytes([body[at] ^ bit]) + body[at + 1 :])
    for bad in damaged:
        path.write_bytes(bad)
        try:
            found = checkpoint.load(path)
        except Exception as error:
            assert not isinstance(error, OSError)  # which would end the run
            refused += 1
        else:
            assert_same(found, state)
            assert len(bad) > len(body) - 2  # where it is cut off, it never loads
    assert len(folders) > 4 and refused > len(body) / 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["model", "within", "TorchScript"])
def test_a_pickled_model_is_refused_and_nobody_is_told_to_switch_safety_off(tmp_path, kind):
    model, path = build_model("se", width=4, seed=0), tmp_path / "best.pt"
    if kind == "TorchScript":
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    else:
        torch.save({"model": model} if kind == "within" else model, path)
    with pytest.raises(ValueError) as refused:
        checkpoint.load(path)
    message = str(refused.value)
    assert is_one_line(message) and "it holds a pickled model" in message
    assert "weights_only" not in message and "torch.save(model.state_dict(), FILE)" in message


def legacy():
    """A pickled model as PyTorch saved it before 1.6: no archive, no checksums."""
    buffer = io.BytesIO()
    torch.save(build_model("se", width=4), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body", [b"", b"version https://git-lfs.github.com/spec/v1", b"PK\3\4", legacy()],
    ids=["empty", "Git LFS", "PK", "legacy"],
)  # fmt: skip
def test_what_is_no_archive_never_leads_to_advice_either(tmp_path, body):
    (tmp_path / "best.pt").write_bytes(body)
    with pytest.raises(Exception) as refused:
        checkpoint.load(tmp_path / "best.pt")
    assert is_one_line(str(refused.value)) and "weights_only" not in str(refused.value)


def test_the_best_weights_are_copies_in_their_own_layout(tmp_path):
    model = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    progress = checkpoint.Progress()
    for epoch, (accuracy, value) in enumerate(((50.0, 1.0), (60.0, 2.0), (60.0, 3.0)), start=1):
        torch.nn.init.constant_(model.weight, value)
        progress.end_epoch({"epoch": epoch, "val_acc": accuracy}, model, "best")
    torch.nn.init.zeros_(model.weight)
    assert (progress.best_epoch, progress.epochs) == (2, 3)  # the first of the best
    (tmp_path / "best.pt").write_bytes(checkpoint.serialized(progress.best))
    loaded = checkpoint.load(tmp_path / "best.pt")["weight"]
    assert (loaded == 2).all() and loaded.stride() == model.weight.stride()


# --- States, in place -----------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adam, amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(
        [{"params": p[:1]}, {"params": p[1:], "weight_decay": 0.0}], 0.01, weight_decay=0.3
    ),
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "sgd, momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "sgd, nesterov": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "sgd, dampening": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, dampening=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "rmsprop, centered": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
}


class Descent:
    """A linear layer, an optimizer, and its steps, each fixed by its number."""

    def __init__(self, make):
        self.layer = torch.nn.Linear(5, 3)
        for parameter in self.layer.parameters():
            torch.nn.init.uniform_(parameter, generator=torch.Generator().manual_seed(0))
        self.optimizer = make(list(self.layer.parameters()))

    def steps(self, *numbers):
        for number in numbers:
            inputs = torch.rand(4, 5, generator=torch.Generator().manual_seed(number))
            self.optimizer.zero_grad()
            self.layer(inputs).square().sum().backward()
            self.optimizer.step()

    def load(self, weights, state):
        self.layer.load_state_dict(weights)
        checkpoint.load_optimizer(self.optimizer, state)

    @property
    def states(self):
        return deepcopy([self.layer.state_dict(), self.optimizer.state_dict()])

    @property
    def addresses(self):
        return {
            (i, key): value.data_ptr()
            for i, state in enumerate(self.optimizer.state.values())
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_loaded_in_place(name):
    descent = Descent(OPTIMIZERS[name])
    descent.steps(1, 2)
    before, addresses = descent.states, descent.addresses
    descent.steps(3, 4)
    after = descent.states
    descent.optimizer.param_groups[0]["lr"] = 7.0
    descent.load(*before)
    assert_same(descent.states, before)
    assert descent.addresses == addresses
    descent.steps(3, 4)
    assert_same(descent.states, after)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_before_its_first_step_an_optimizer_is_as_new(name):
    """As after the warm-up of a compiled step."""
    descent, fresh = Descent(OPTIMIZERS[name]), Descent(OPTIMIZERS[name])
    before = descent.states
    for _ in range(2):  # also when it is loaded twice
        descent.steps(1, 2)
        descent.load(*before)
    for each in (descent, fresh):
        each.steps(3, 4, 5)
    assert_same(descent.states, fresh.states)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_another_process_is_loaded(name, tmp_path):
    descent, other = Descent(OPTIMIZERS[name]), Descent(OPTIMIZERS[name])
    descent.steps(1, 2)
    (tmp_path / "last.pt").write_bytes(checkpoint.serialized({"states": descent.states}))
    other.load(*checkpoint.load(tmp_path / "last.pt")["states"])
    for each in (descent, other):
        each.steps(3, 4)
    assert_same(other.states, descent.states)


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor():
    """A CUDA graph knows its address, and a schedule fills it. On the CPU it is a number."""
    lr = torch.tensor(0.01)
    on_gpu = Descent(lambda p: torch.optim.Adam(p, lr, capturable=False, foreach=False))
    on_cpu = Descent(lambda p: torch.optim.Adam(p, 0.5))
    on_cpu.steps(1)
    checkpoint.load_optimizer(on_gpu.optimizer, on_cpu.optimizer.state_dict())
    assert on_gpu.optimizer.param_groups[0]["lr"] is lr and lr == 0.5
    checkpoint.load_optimizer(on_cpu.optimizer, on_gpu.optimizer.state_dict())
    assert on_cpu.optimizer.param_groups[0]["lr"] == 0.5
    assert isinstance(on_cpu.optimizer.param_groups[0]["lr"], float)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64, np.bool_])
def test_a_schedule_may_use_numpy_s_numbers(tmp_path, kind):
    (tmp_path / "last.pt").write_bytes(checkpoint.serialized({"lr": [kind(1)], "name": "x"}))
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded == {"lr": [1], "name": "x"} and type(loaded["lr"][0]) is kind


def test_states_of_all_parts_are_loaded_in_place():
    model = build_model("se", width=8, seed=0)
    optimizer, ema = train.adam(model, 1e-3), EMA(model, 0.9)
    parts = dict(model=model, optimizer=optimizer, scheduler=train.cosine(optimizer, 5), ema=ema)

    def step():
        optimizer.zero_grad()
        model(torch.rand(16, 1, 28, 28)).square().sum().backward()
        optimizer.step()
        ema.update()
        parts["scheduler"].step()

    step()
    before = deepcopy(checkpoint.get_state(parts, CPU))
    tensors = [*model.state_dict().values(), *ema.model.state_dict().values(), ema.steps]
    addresses = [tensor.data_ptr() for tensor in tensors]
    step()
    after = deepcopy(checkpoint.get_state(parts, CPU))
    assert not torch.equal(before["model"]["conv1.weight"], after["model"]["conv1.weight"])
    assert before["ema"]["steps"] == 1 and after["ema"]["steps"] == 2
    checkpoint.load_state(before, parts, CPU)
    assert_same(checkpoint.get_state(parts, CPU), before)
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    step()  # with the same random images
    assert_same(checkpoint.get_state(parts, CPU), after)


# --- How often it is saved ------------------------------------------------------------------------


class Clock:
    """In place of time, in kit.run: a step takes ten seconds, and writing a last.pt takes one."""

    def __init__(self, patch):
        self.now, self.saved, write = 0.0, [], run.write_atomically

        def slow_write(path, body, previous=None):
            write(path, body, previous)
            if path.name == "last.pt":
                self.saved.append(self.now)
                self.now += 1

        def step(_):
            self.now += 10

        patch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: self.now))
        patch.setattr(run, "write_atomically", slow_write)
        patch.setattr(run.Run, "leave_if_stopped", step)


def test_saving_takes_one_percent_of_the_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    assert train_small("se", tmp_path, "--epochs", "9", "--patience", "9") == 0
    assert clock.saved == [40, 161, 282]  # epochs of three steps and a validation
    result = json.loads((tmp_path / FOLDER / "result.json").read_text())
    assert result["save_seconds"] == 3
