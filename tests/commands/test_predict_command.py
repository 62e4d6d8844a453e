"""The command: nnU-Net's arguments and ours, exit codes, and stock behaviour without our flags."""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from inference_cases import SHAPE, predictor, report, run, segmentations, write_case, write_image, write_model
from nnunetv2.inference import predict_from_raw_data as upstream

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.commands.arguments import TWO_MODELS
from nnunetv2_mgml.commands.predict import main
from nnunetv2_mgml.upstream.registration import EXT_VARIABLE, _hand_over, _Loader

MODEL = Path("Dataset900_Phantom") / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres"
STOCK = Path("Dataset900_Phantom") / "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_model(folder / MODEL)
    write_model(folder / STOCK, "nnUNetTrainer")
    return folder


@pytest.fixture
def command(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the command in this process, without worker processes; returns the exit code."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("nnUNet_results", str(results))
    threads = torch.get_num_threads()

    def call(*arguments: object, trainer: str = "nnUNetTrainerMGML", entry: str = "predict_entry_point") -> int:
        standard = [
            "-i",
            tmp_path / "in",
            "-o",
            tmp_path / "out",
            "-device",
            "cpu",
            "--disable_tta",
            "--disable_progress_bar",
            "-f",
            0,
        ]
        if entry == "predict_entry_point":
            standard += ["-d", "Dataset900_Phantom", "-c", "3d_fullres", "-tr", trainer, "-npp", 0, "-nps", 0]
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_predict", *map(str, [*standard, *arguments])])
        with pytest.raises(SystemExit) as exit_:
            main(entry)
        return exit_.value.code

    yield call
    torch.set_num_threads(threads)
    assert argparse.ArgumentParser.parse_args.__module__ == "argparse"
    assert upstream.nnUNetPredictor.__module__ == upstream.__name__


def test_predicts_as_the_python_api(command, tmp_path: Path, results: Path) -> None:
    write_case(tmp_path / "in", "p")
    write_case(tmp_path / "in", "q", [1, 2])
    assert command("--missing_modalities", "auto", "T1Gd") == 0
    reference = run(predictor(results / MODEL, ["auto", "t1ce"]), tmp_path / "in", tmp_path / "api")
    assert segmentations(tmp_path / "out") == reference
    written = report(tmp_path / "out")
    assert {name: case["present"] for name, case in written["cases"].items()} == {
        "p": ["t1", "t2", "flair"],
        "q": ["t2"],
    }
    assert "--missing_modalities auto T1Gd" in written["command"]
    assert written["model"]["folds"] == [0]
    assert written["model"]["folder"] == str(results / MODEL)
    assert set(written["versions"]) == {"nnunetv2_mgml", "nnunetv2", "torch", "numpy", "python"}


def test_a_failed_case_makes_exit_code_1_and_is_listed_last(
    command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "in", "good", [0, 3])
    write_case(tmp_path / "in", "bad", [0, 3])[3].write_bytes(b"")
    assert command("--missing_modalities", "auto") == 1
    output = capsys.readouterr()
    assert set(segmentations(tmp_path / "out")) == {"good.nii.gz"}
    assert "Predicting good from t1+flair" in output.out
    assert output.err.split("error: ")[-1].startswith("1 cases were not predicted:\n  Case bad: ")


def test_sequential_parts_are_not_forgotten(command, tmp_path: Path) -> None:
    for name in "abc":
        write_case(tmp_path / "in", name, [2])
    assert command("--missing_modalities", "auto", "-num_parts", 2, "-part_id", 1) == 0
    assert set(segmentations(tmp_path / "out")) == {"b.nii.gz"}
    kept = write_image(tmp_path / "out" / "b.nii.gz", np.zeros(SHAPE, np.uint8)).read_bytes()
    assert command("--missing_modalities", "auto", "--c") == 0
    assert segmentations(tmp_path / "out")["b.nii.gz"] == kept
    assert set(segmentations(tmp_path / "out")) == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--missing_modalities", "dwi"], "error: Unknown modality 'dwi'. This model has: t1 (also t1n/t1w)"),
        (["--missing_modalities", "t1,t1ce,t2,flair"], "error: All modalities are named as missing"),
        (["--missing_modalities", "auto", "-i", "/nowhere"], "error: Input folder /nowhere does not exist."),
        (["--missing_modalities", "auto", "-f", 4], "no checkpoint_final.pth for fold 4"),
        (["--missing_modalities", "auto", "-d", "901"], "Could not find a dataset with the ID 901"),
        (["--missing_modalities", "auto", "-p", "other"], "No trained model in"),
        (["--missing_modalities", "auto", "-f", "0", "x"], "error: -f takes fold numbers (0 1 2) or 'all', got x."),
        (["--missing_modalities", "auto", "-step_size", "0"], "above 0 and at most 1, got 0. The default is 0.5."),
        (["--missing_modalities", "auto", "-device", "mps"], "error: -device mps, but PyTorch finds no Apple GPU."),
        (["--missing_modalities", "auto", "-device", "cuda"], "error: -device cuda, but PyTorch finds no CUDA device."),
        (["--missing_modalities", "auto", "-device", "tpu"], "-device must be either cpu, mps or cuda"),
        (["--cpu_bfloat16", "-device", "cuda"], "error: cpu_bfloat16 is for device cpu"),
        (["--backend", "openvino"], "error: --backend needs --missing_modalities"),
        (
            ["--backend", "openvino", "--missing_modalities", "t1", "-device", "cuda"],
            "error: The backend openvino is for",
        ),
        (["--missing_modalities", "auto", "-num_parts", 2, "-part_id", 2], "error: part_id must be 0 to 1 with num_p"),
        (["-num_parts", 2, "-part_id", 2], "error: part_id must be 0 to 1 with num_parts 2, got 2."),
        (["-num_parts", 0], "error: num_parts must be at least 1, got 0."),
        (["-f", "x"], "error: -f takes fold numbers (0 1 2) or 'all', got x."),
        (["-d", "901"], "error: Could not find a dataset with the ID 901"),
        (["--missing_modalities"], "expected at least one argument"),
        (["--missing_modalitie", "auto", "--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda _: None)  # a process may call it once only
    write_case(tmp_path / "in", "p", [0])
    assert command(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not segmentations(tmp_path / "out")


@pytest.mark.parametrize("flags", [[], ["--missing_modalities", "auto"]])
def test_what_is_refused_leaves_no_output_folder(
    command, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    out = tmp_path / "new" / "out"
    (tmp_path / "empty").mkdir()
    write_case(tmp_path / "in", "p")
    images = sorted(os.listdir(tmp_path / "in"))
    wrong: list[tuple[list[object], str]] = [
        (["-i", tmp_path / "nowhere", "-o", out], "Input folder"),
        (["-i", tmp_path / "in", "-o", tmp_path / "in"], "is the input folder"),
        (["-p", "other", "-o", out], "No trained model in"),
    ]
    if flags:
        wrong.append((["-i", tmp_path / "empty", "-o", out], "No case in"))
    for arguments, words in wrong:
        assert command(*flags, *arguments) == 2
        assert f"{words}" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert sorted(os.listdir(tmp_path / "in")) == images


def test_without_a_flag_every_case_has_to_be_complete(
    command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "in", "p")
    write_case(tmp_path / "in", "q", [0, 1, 3])
    assert command() == 2
    told = "error: 1 of 2 case(s) lack modalities: q (t2). Nothing has been predicted. --missing_modalities auto goes"
    assert told in capsys.readouterr().err
    assert not segmentations(tmp_path / "out")


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("empty", "holds no file that ends in .nii.gz"),
        ("brats", "holds no file that ends in .nii.gz"),
        ("flat", "has no channel number in p_flair.nii.gz, p_t1.nii.gz, "),
        ("sheet.csv", "is no folder"),
    ],
)
def test_mgml_predict_says_what_it_reads_without_a_flag(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    words: str,
    sequential: bool,
) -> None:
    monkeypatch.setattr(sys, "argv", [])  # both are put back behind the test
    monkeypatch.setenv(EXT_VARIABLE, "")
    for folder in ("empty", "flat", "brats/p"):
        (tmp_path / folder).mkdir(parents=True)
    for channel, file in write_case(tmp_path / "in", "p").items():
        for folder in ("flat", "brats/p"):
            shutil.copy(file, tmp_path / folder / f"p_{('t1', 't1ce', 't2', 'flair')[channel]}.nii.gz")
    (tmp_path / "sheet.csv").write_text("case,t1\np,in/p_0000.nii.gz\n")
    call = ["predict", "-i", str(tmp_path / source), "-o", str(tmp_path / "out"), "-m", str(results / MODEL)]
    workers = ["-npp", "0", "-nps", "0"] if sequential else []
    with pytest.raises(SystemExit) as stopped:
        cli.main([*call, "-f", "0", "-device", "cpu", "--disable_tta", "--disable_progress_bar", *workers])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / source} {words}")
    assert "--missing_modalities auto also takes" in said
    assert not (tmp_path / "out").exists()


def test_nnunets_own_command_stays_as_it_is(command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert command() == 0, "nnU-Net predicts nothing, and says nothing"


@pytest.mark.parametrize("option", ["-d", "-c", "-tr", "-p=nnUNetPlans"])
def test_a_model_is_named_in_one_way(
    command, tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """nnU-Net's parser would take -d for -device, -c for -chk and -p for -prev_stage_predictions."""
    write_case(tmp_path / "in", "p", [1])
    given = ["-m", results / MODEL, "--missing_modalities", "auto", option, *([] if "=" in option else ["137"])]
    assert command(*given, entry="predict_entry_point_modelfolder") == 2
    assert capsys.readouterr().err == f"error: {TWO_MODELS}\n"


def test_the_help_of_mgml_predict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [])  # both are put back behind the test
    monkeypatch.setenv(EXT_VARIABLE, "")
    with pytest.raises(SystemExit):
        cli.main(["predict", "-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Predict the cases of a folder with a trained model" in text
    assert "was used for training? Default: nnUNetTrainerMGML" in text
    assert "-m M Instead of -d, -c, -tr, -p: the folder TRAINER__PLANS__CONFIGURATION itself" in text
    assert "manually specify a folder" not in text
    with pytest.raises(SystemExit):
        cli.main(["predict", "-m", "x", "-h"])
    assert "Predict the cases of a folder" in " ".join(capsys.readouterr().out.split())


def test_a_stock_model_is_refused(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path / "in", "p")
    assert command("--missing_modalities", "t1", trainer="nnUNetTrainer") == 2
    error = capsys.readouterr().err
    assert "error: This model was trained with nnUNetTrainer" in error
    assert "-tr nnUNetTrainerMGML" in error


def test_interrupting_exits_with_130(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2_mgml.inference.predictor import MGMLPredictor

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MGMLPredictor, "_logits", interrupted)
    write_case(tmp_path / "in", "p")
    assert command("--missing_modalities", "t1") == 130
    assert report(tmp_path / "out")["cases"]["p"]["status"] == "pending"


@pytest.mark.parametrize("entry", ["predict_entry_point", "predict_entry_point_modelfolder"])
def test_help_shows_upstreams_arguments_and_ours(command, entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("-h", entry=entry) == 0
    text = capsys.readouterr().out
    for flag in (
        "--missing_modalities NAME [NAME ...]",
        "--cpu_bfloat16",
        "--backend {pytorch,openvino}",
        "--save_probabilities",
        "-prev_stage_pred",
        "--missing_modalities t1ce",
    ):
        assert flag in text
    assert ("-m M" in text) == (entry == "predict_entry_point_modelfolder")


def test_a_model_folder(command, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results")
    write_case(tmp_path / "in", "p", [1])
    assert (
        command(
            "-m",
            results / MODEL,
            "-npp",
            0,
            "-nps",
            0,
            "--missing_modalities",
            "auto",
            "--cpu_bfloat16",
            entry="predict_entry_point_modelfolder",
        )
        == 0
    )
    assert report(tmp_path / "out")["model"]["cpu_bfloat16"] is True
    assert set(segmentations(tmp_path / "out")) == {"p.nii.gz"}


@pytest.mark.parametrize(("processes", "code"), [((0, 0), 0), ((1, 0), 2), ((0, 1), 2)])
def test_a_model_folder_without_worker_processes(
    command, tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str], processes: tuple[int, int], code: int
) -> None:
    """nnU-Net's own command for folders fails with 0 after it has loaded the model."""
    write_case(tmp_path / "in", "p")
    counts = ["-npp", processes[0], "-nps", processes[1]]
    assert command("-m", results / MODEL, *counts, entry="predict_entry_point_modelfolder") == code
    assert ("both 0 for no worker processes" in capsys.readouterr().err) == (code == 2)
    assert set(segmentations(tmp_path / "out")) == (set() if code else {"p.nii.gz"})


def test_without_our_flags_a_stock_model_gives_the_files_of_stock_nnunet(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path / "in", "p")
    assert command("--save_probabilities", trainer="nnUNetTrainer") == 0
    ours = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    upstream.predict_entry_point()  # sys.argv is still that of our call
    stock = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert sorted(ours) == sorted(stock)
    assert "mgml_prediction.json" not in ours
    for name in ("p.nii.gz", "p.pkl", "plans.json", "dataset.json", "predict_from_raw_data_args.json"):
        assert ours[name] == stock[name], name


def test_the_start_up_line_and_the_command_do_not_call_each_other_for_ever() -> None:
    """Registration puts a function that calls `main` in the place of the one `main` has to run."""

    class Loader:
        def exec_module(self, module: ModuleType) -> None:
            module.predict_entry_point = upstream.predict_entry_point

    module = ModuleType("stand_in")
    module.__spec__ = ModuleSpec("stand_in", None)
    _Loader(Loader(), lambda loaded: _hand_over(loaded, "predict_entry_point")).exec_module(module)
    assert module.predict_entry_point is not upstream.predict_entry_point
    assert inspect.unwrap(module.predict_entry_point) is upstream.predict_entry_point


@pytest.mark.slow
def test_as_a_module_in_a_process_of_its_own(results: Path, tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_case(tmp_path / "in", name, [0, 1, 3], seed)
    write_case(tmp_path / "in", "d", [0])[0].write_bytes(b"")
    environment = {
        **os.environ,
        "nnUNet_results": str(results),
        "nnUNet_raw": "",
        "nnUNet_preprocessed": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("nnUNet_extTrainer", None)
    call = [
        sys.executable,
        "-m",
        "nnunetv2_mgml.commands.predict",
        "-i",
        str(tmp_path / "in"),
        "-o",
        str(tmp_path / "out"),
        "-m",
        str(results / MODEL),
        "-f",
        "0",
        "-device",
        "cpu",
        "--disable_tta",
        "-npp",
        "1",
        "-nps",
        "1",
        "--missing_modalities",
        "auto",
    ]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: 1 cases were not predicted:" in done.stderr
    reference = run(predictor(results / MODEL), tmp_path / "in", tmp_path / "api")
    assert segmentations(tmp_path / "out") == reference
    assert set(reference) == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}
