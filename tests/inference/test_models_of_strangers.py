"""Model folders of strangers: nothing of them runs, and what is wrong with one is said in one line."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_cases import predictor, segmentations, write_case, write_model
from report_cases import write_evaluation

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.plans.model_files import read_model_files
from nnunetv2_mgml.presentation.internals import load_model


class Program:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.makedirs, (str(self.file), 0o777, True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_nothing_runs_what_a_checkpoint_holds(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, ran = model / "fold_0" / "checkpoint_final.pth", tmp_path / "ran"
    torch.save({**torch.load(file, weights_only=False), "more": Program(ran)}, file)
    with pytest.raises(ValueError, match="--trust_checkpoint"):
        predictor(model)
    with pytest.raises(ValueError, match="--trust_checkpoint"):
        load_model(model, 0, "checkpoint_final.pth", "cpu")
    write_case(tmp_path / "in", "a")
    write_case(tmp_path / "labels", "a", [])
    command = ["evaluate", "-m", str(model), "-i", str(tmp_path / "in"), "-l", str(tmp_path / "labels"), "-o", "out"]
    (tmp_path / "labels" / "a.nii.gz").touch()
    assert cli.main([*command, "-device", "cpu"]) == 2
    assert "--trust_checkpoint" in capsys.readouterr().err
    command = ["predict", "-m", str(model), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-f", "0"]
    for flags in ([], ["--missing_modalities", "auto"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, "-device", "cpu", *flags])
        assert stopped.value.code == 2
        assert "--trust_checkpoint" in capsys.readouterr().err
    assert not ran.exists()
    trusting = predictor(model, trust_checkpoint=True)
    assert ran.is_dir()
    trusting.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out"))
    assert set(segmentations(tmp_path / "out")) == {"a.nii.gz"}


def spoiled(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(content)
    *parents, last = path.split("/")
    place = content
    for name in parents:
        place = place[name]
    place[last] = value
    return content


CONFIGURATION = "configurations/3d_fullres"
ARCHITECTURE = f"{CONFIGURATION}/architecture"


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        (f"{ARCHITECTURE}/network_class_name", "subprocess.Popen"),
        (f"{ARCHITECTURE}/network_class_name", "dynamic_network_architectures.architectures.unet.np.save"),
        (f"{ARCHITECTURE}/network_class_name", "torch.nn.Linear"),
        (f"{ARCHITECTURE}/network_class_name", 3),
        (f"{ARCHITECTURE}/arch_kwargs/conv_op", "os.system"),
        (f"{ARCHITECTURE}/arch_kwargs/nonlin", "torch.nn.modules.module.torch.hub.load"),
        (f"{ARCHITECTURE}/arch_kwargs/norm_op", "builtins.exec"),
        (f"{ARCHITECTURE}/_kw_requires_import", 1),
        (f"{ARCHITECTURE}/arch_kwargs", []),
        (ARCHITECTURE, "x"),
        (f"{CONFIGURATION}/preprocessor_name", "isfile"),
        (f"{CONFIGURATION}/preprocessor_name", "os.system"),
        (f"{CONFIGURATION}/resampling_fn_data", "deepcopy"),
        (f"{CONFIGURATION}/resampling_fn_seg", 1),
        (f"{CONFIGURATION}/resampling_fn_data_kwargs", [1]),
        (f"{CONFIGURATION}/normalization_schemes", ["ZScoreNormalization"]),
        (f"{CONFIGURATION}/normalization_schemes", ["Path"] * 4),
        (f"{CONFIGURATION}/use_mask_for_norm", [1, 1, 1, 1]),
        (f"{CONFIGURATION}/patch_size", [16, 0, 16]),
        (f"{CONFIGURATION}/patch_size", [16, 16.5, 16]),
        (f"{CONFIGURATION}/patch_size", [10**9] * 3),
        (f"{CONFIGURATION}/spacing", [1.0, float("nan"), 1.0]),
        (f"{CONFIGURATION}/spacing", "1 1 1"),
        (f"{CONFIGURATION}/batch_size", True),
        (CONFIGURATION, None),
        ("configurations", []),
        ("image_reader_writer", "subprocess"),
        ("image_reader_writer", None),
        ("label_manager", "Path"),
        ("transpose_forward", [0, 1, 1]),
        ("transpose_backward", ["a"]),
    ],
)
def test_plans_that_are_refused(model: Path, entry: str, value: Any) -> None:
    file = model / "plans.json"
    file.write_text(json.dumps(spoiled(json.loads(file.read_text()), entry, value)))
    with pytest.raises(ValueError, match=entry.rpartition("/")[2]) as error:
        read_model_files(model)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"plans\.json"):
        predictor(model)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("channel_names", 3),
        ("channel_names", ["T1", "T2"]),
        ("channel_names", {"0": "T1", "2": "T2"}),
        ("channel_names", {"0": "T1"}),
        ("labels", []),
        ("labels", {"background": "0"}),
        ("labels", {"background": 0, "x": [1, "2"]}),
        ("labels", {"background": 0, "x": {}}),
        ("labels", {"background": 0, "x": -1}),
        ("file_ending", "/../../x"),
        ("file_ending", None),
    ],
)
def test_dataset_json_that_is_refused(model: Path, entry: str, value: Any) -> None:
    file = model / "dataset.json"
    file.write_text(json.dumps(spoiled(json.loads(file.read_text()), entry, value)))
    with pytest.raises(ValueError, match=r"\.json") as error:
        predictor(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("trainer_name", None),
        ("trainer_name", 3),
        ("init_args", {}),
        ("init_args", {"configuration": "2d"}),
        ("network_weights", {}),
        ("network_weights", {"a": 1}),
        ("network_weights", []),
        ("inference_allowed_mirroring_axes", "xyz"),
    ],
)
def test_checkpoints_that_are_refused(model: Path, entry: str, value: Any) -> None:
    file = model / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=False), entry: value}, file)
    with pytest.raises(ValueError, match=str(model)) as error:
        predictor(model)
    assert "\n" not in str(error.value)


def test_report_of_a_strangers_evaluation(model: Path, tmp_path: Path) -> None:
    """A summary.json may name a model folder: its checkpoint is data, too."""
    ran = tmp_path / "ran"
    file = model / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=False), "more": Program(ran)}, file)
    write_evaluation(tmp_path / "evaluation", ["a"], info={"model": {"folder": str(model), "folds": ["0"]}})
    (tmp_path / "images").mkdir()
    cli.main(["report", str(tmp_path / "evaluation"), "--internals", "-i", str(tmp_path / "images")])
    assert not ran.exists()
