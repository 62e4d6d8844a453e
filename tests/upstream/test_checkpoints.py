"""Checkpoints are data: what nnU-Net and we write is read, code is refused, also by nnU-Net's own loading."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_model_cases import CHECKPOINT, FIXTURE, MODEL

from nnunetv2_mgml.upstream.checkpoints import TRUST_VARIABLE, load_checkpoint, loading


class Program:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_of_0_1_0_is_data_with_numpy_numbers() -> None:
    stored = load_checkpoint(FIXTURE / MODEL / CHECKPOINT)
    whole = torch.load(FIXTURE / MODEL / CHECKPOINT, map_location="cpu", weights_only=False)
    assert stored.keys() == whole.keys()
    assert repr(stored["logging"]) == repr(whole["logging"])
    assert all(torch.equal(stored["network_weights"][name], w) for name, w in whole["network_weights"].items())


@pytest.mark.parametrize("value", [np.float16(1), np.float32(1), np.float64(1), np.int64(1), np.uint8(1), np.bool_(1)])
def test_numbers_of_numpy(tmp_path: Path, value: Any) -> None:
    torch.save({"logging": [value]}, tmp_path / "c.pth")
    (found,) = load_checkpoint(tmp_path / "c.pth")["logging"]
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("place", ["entry", "legacy", "pickle"])
def test_code_is_refused_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    file, ran = tmp_path / "c.pth", tmp_path / "ran"
    content = {"network_weights": {}, "more": Program(ran)}
    if place == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=place == "entry")
    for mmap in (True, False):
        with pytest.raises(ValueError, match=r"c\.pth holds more than weights.*--trust_checkpoint") as error:
            load_checkpoint(file, mmap=mmap)
    if place != "pickle":
        assert "mkdir" in str(error.value)
    assert "\n" not in str(error.value)
    # however it is asked for: nnU-Net asks for everything
    with pytest.raises(ValueError, match="holds more than weights"), loading(file):
        torch.load(file, weights_only=False)
    assert not ran.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    if place == "entry":
        load_checkpoint(file, trust=True)
        assert ran.is_dir()
        ran.rmdir()
        monkeypatch.setenv(TRUST_VARIABLE, "1")
        load_checkpoint(file)
        assert ran.is_dir()


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04", None, [1, 2]])
def test_what_is_no_checkpoint(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "c.pth"
    if isinstance(content, list):
        torch.save(content, file)
    elif content is None:
        torch.save({"a": torch.zeros(1000)}, file)
        file.write_bytes(file.read_bytes()[:-500])
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.pth") as error:
        load_checkpoint(file, mmap=True)
    assert "\n" not in str(error.value)


def test_files_of_other_programs_are_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"network_weights": {}}))
    (tmp_path / "c.gz").write_bytes(b"\x1f\x8b\x08")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("Dataset001_A/plans.json", "{}")
    for name in ("c.json", "c.gz", "c.zip"):
        for trust in (False, True):
            with pytest.raises(ValueError, match=rf"{name} is no PyTorch checkpoint.*checkpoint_final") as error:
                load_checkpoint(tmp_path / name, trust)
            assert "--trust_checkpoint" not in str(error.value)


def test_commands_without_the_flag_advise_the_variable(tmp_path: Path) -> None:
    torch.save({"network_weights": {}, "more": Program(tmp_path)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=f"holds more than weights.*set {TRUST_VARIABLE}=1") as error:
        load_checkpoint(tmp_path / "c.pth", flag=False)
    assert "--trust_checkpoint" not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"c\.pth does not exist"):
        load_checkpoint(tmp_path / "c.pth")


def test_other_errors_pass_and_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(RuntimeError, match="mine"), loading("file"):
        raise RuntimeError("mine")
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
