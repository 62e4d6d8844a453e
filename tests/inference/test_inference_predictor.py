"""`MGMLPredictor` on folders: bad cases, nnU-Net's options, other models; mostly without worker processes."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_cases import (
    SHAPE,
    image,
    item_of,
    load,
    predictor,
    report,
    run,
    segmentations,
    write_case,
    write_image,
    write_model,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_mgml.inference import predictor as predictor_module
from nnunetv2_mgml.inference.inputs import CaseError
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.upstream import export

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "mgml", folds=(0, 1))


@pytest.fixture(scope="module")
def auto(model: Path) -> MGMLPredictor:
    return predictor(model)


# --- one bad case does not lose the others ----------------------------------------------------------------------------
def test_bad_cases_are_listed_and_the_others_predicted(tmp_path: Path, auto: MGMLPredictor) -> None:
    for name in "abcd":
        files = write_case(tmp_path / "in", name, range(3))
        if name == "b":
            files[1].write_bytes(files[1].read_bytes()[:500])
    write_image(tmp_path / "in" / "c_0001.nii.gz", image(1), origin=5.0)
    (tmp_path / "in" / "e_0009.nii.gz").touch()
    written = run(auto, tmp_path / "in", tmp_path / "out")
    assert set(written) == {"a.nii.gz", "d.nii.gz"}
    assert set(auto.failures) == {"b", "c", "e"}
    for name, word in (("b", "cannot be read"), ("c", "origin"), ("e", "channel number 0009")):
        assert auto.failures[name].startswith(f"Case {name}: ")
        assert word in auto.failures[name]
    cases = report(tmp_path / "out")["cases"]
    assert {name: entry["status"] for name, entry in cases.items()} == {
        "a": "predicted",
        "b": "failed",
        "c": "failed",
        "d": "predicted",
        "e": "failed",
    }
    assert cases["b"]["error"] == auto.failures["b"]


def test_a_failing_network_or_export_leaves_no_partial_file(
    tmp_path: Path, auto: MGMLPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate("abc"):
        write_case(tmp_path / "in", name, seed=seed)
    real_export, real_logits = export.export_prediction_from_logits, auto.predict_logits_from_preprocessed_data
    calls = {"logits": 0}

    def half_export(*args: Any) -> None:
        if os.path.basename(args[5]) == "a":
            Path(args[5] + ".nii.gz").write_bytes(b"half a file")
            raise OSError("disk full")
        real_export(*args)

    def no_memory(data: torch.Tensor) -> torch.Tensor:
        calls["logits"] += 1
        if calls["logits"] == 2:
            raise RuntimeError("out of memory")
        return real_logits(data)

    monkeypatch.setattr(export, "export_prediction_from_logits", half_export)
    monkeypatch.setattr(auto, "predict_logits_from_preprocessed_data", no_memory)
    written = run(auto, tmp_path / "in", tmp_path / "out", save_probabilities=True)
    assert set(written) == {"c.nii.gz"}
    assert sorted(os.listdir(tmp_path / "out")) == [
        "c.nii.gz",
        "c.npz",
        "c.pkl",
        "dataset.json",
        "mgml_prediction.json",
        "plans.json",
        "predict_from_raw_data_args.json",
    ]
    assert "export failed (OSError: disk full)" in auto.failures["a"]
    assert "prediction failed (RuntimeError: out of memory)" in auto.failures["b"]
    assert auto.network._visible is None


def test_a_cpu_keeps_its_memory_for_one_case_and_its_threads_for_the_next(
    auto: MGMLPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def kept() -> Iterator[bool]:
        events.append("kept")
        yield True
        events.append("given back")

    def sliding_window(*_: Any) -> torch.Tensor:
        events.append("predicted")
        torch.set_num_threads(1)  # nnU-Net's setting for this time, which it would take back
        return torch.zeros(1)

    threads = torch.get_num_threads()
    monkeypatch.setattr(predictor_module, "freed_memory_kept", kept)
    monkeypatch.setattr(auto, "predict_sliding_window_return_logits", sliding_window)
    auto.predict_logits_from_preprocessed_data(torch.zeros(1))
    assert events == ["kept", "predicted", "given back"]
    monkeypatch.setattr(auto, "device", torch.device("cuda"))
    monkeypatch.setattr(auto, "predict_sliding_window_return_logits", lambda _: pytest.fail("no memory"))
    torch.set_num_threads(2)
    with pytest.raises(pytest.fail.Exception, match="no memory"):
        auto.predict_logits_from_preprocessed_data(torch.zeros(1))
    assert events == ["kept", "predicted", "given back"]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_an_old_prediction_is_replaced_only_by_a_complete_one(
    tmp_path: Path, auto: MGMLPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path / "in", "a")
    before = run(auto, tmp_path / "in", tmp_path / "out")

    def cut(*args: Any) -> None:
        Path(args[5] + ".nii.gz").write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export_prediction_from_logits", cut)
    with pytest.raises(KeyboardInterrupt):
        run(auto, tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == before["a.nii.gz"]
    assert report(tmp_path / "out")["cases"]["a"]["status"] == "pending"
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


# --- what nnU-Net's options do ----------------------------------------------------------------------------------------
def test_parts_continuing_and_probabilities(tmp_path: Path, auto: MGMLPredictor) -> None:
    for seed, name in enumerate("abc"):
        write_case(tmp_path / "in", name, [seed], seed)
    whole = run(auto, tmp_path / "in", tmp_path / "whole", save_probabilities=True)
    for part in (0, 1):
        auto.predict_from_files(tmp_path / "in", tmp_path / "parts", False, True, 0, 0, None, 2, part)
    assert segmentations(tmp_path / "parts") == whole
    assert set(report(tmp_path / "parts", "mgml_prediction_part0of2.json")["cases"]) == {"a", "c"}
    assert set(report(tmp_path / "parts", "mgml_prediction_part1of2.json")["cases"]) == {"b"}
    assert run(auto, tmp_path / "in", tmp_path / "parts", overwrite=False) == whole  # merges what the parts know
    assert {name: (case["status"], case["present"]) for name, case in report(tmp_path / "parts")["cases"].items()} == {
        name: ("predicted", [channel]) for name, channel in zip("abc", auto.channels, strict=False)
    }

    for name in "abc":
        probabilities = np.load(tmp_path / "whole" / f"{name}.npz")["probabilities"]
        assert probabilities.shape == (3, *SHAPE)
        label_map = np.zeros(SHAPE, np.uint8)
        for label, region in zip((1, 2, 3), probabilities, strict=True):  # regions_class_order: later ones win
            label_map[region > 0.5] = label
        np.testing.assert_array_equal(load(tmp_path / "whole" / f"{name}.nii.gz"), label_map)
    assert (tmp_path / "whole" / "a.pkl").is_file()

    kept = write_image(tmp_path / "whole" / "a.nii.gz", np.zeros(SHAPE, np.uint8)).read_bytes()
    (tmp_path / "whole" / "b.npz").unlink()
    (tmp_path / "whole" / "c.nii.gz").unlink()
    again = run(auto, tmp_path / "in", tmp_path / "whole", save_probabilities=True, overwrite=False)
    assert again == {**whole, "a.nii.gz": kept}
    assert (tmp_path / "whole" / "b.npz").is_file()
    assert {name: e["status"] for name, e in report(tmp_path / "whole")["cases"].items()} == dict.fromkeys(
        "abc", "predicted"
    )  # a keeps the entry of the first run


def test_what_was_made_from_a_segmentation_goes_with_it(tmp_path: Path, model: Path) -> None:
    write_case(tmp_path / "in", "a", [0, 1])
    out = tmp_path / "out"
    run(predictor(model), tmp_path / "in", out, save_probabilities=True)
    for made in (out / "uncertainty" / "a.nii.gz", out / "preview" / "a.png", out / "uncertainty" / "a.b.nii.gz"):
        made.parent.mkdir(exist_ok=True)
        made.touch()
    run(predictor(model, ["auto", "t1"]), tmp_path / "in", out)
    assert not list(out.glob("a.npz")) + list(out.glob("a.pkl"))
    assert [path.name for folder in ("uncertainty", "preview") for path in (out / folder).iterdir()] == ["a.b.nii.gz"]
    again = predictor(model, ["auto", "t1"])
    run(again, tmp_path / "in", out, save_probabilities=True, overwrite=False)
    assert again.report_cases == ["a"], "its probabilities are of no earlier prediction"
    assert (out / "a.npz").is_file()


def test_continuing_with_other_settings_is_refused_and_leaves_everything(tmp_path: Path, model: Path) -> None:
    for name in "ab":
        write_case(tmp_path / "in", name)
    before = run(predictor(model), tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "b.nii.gz").unlink()
    told = (tmp_path / "out" / "mgml_prediction.json").read_bytes()
    for other, words in (
        (predictor(model, ["t1"]), r"missing_modalities was \['auto'\], is now \['t1'\]"),
        (predictor(model, use_mirroring=True, tile_step_size=0.4), "tile_step_size was 0.5.*use_mirroring was False"),
    ):
        with pytest.raises(ValueError, match=f"holds predictions with other settings.*{words}.*--continue_prediction"):
            run(other, tmp_path / "in", tmp_path / "out", overwrite=False)
        assert (tmp_path / "out" / "mgml_prediction.json").read_bytes() == told
    assert run(predictor(model), tmp_path / "in", tmp_path / "out", overwrite=False) == before
    assert run(predictor(model, ["t1"]), tmp_path / "in", tmp_path / "out") != before


def test_continuing_with_weights_of_another_training_is_refused(tmp_path: Path, model: Path) -> None:
    own = Path(shutil.copytree(model, tmp_path / "model"))
    write_case(tmp_path / "in", "a")
    before = run(predictor(own), tmp_path / "in", tmp_path / "out")
    shutil.copy2(model / "dataset.json", own)
    assert run(predictor(own), tmp_path / "in", tmp_path / "out", overwrite=False) == before
    os.utime(own / "fold_0" / "checkpoint_final.pth", (1, 1))
    with pytest.raises(ValueError, match=r"\(case a\): the model's weights have been replaced since\. Use another"):
        run(predictor(own), tmp_path / "in", tmp_path / "out", overwrite=False)
    assert run(predictor(own), tmp_path / "in", tmp_path / "out") == before


def test_what_an_interrupted_run_was_to_replace_is_not_taken_for_its_own(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_case(tmp_path / "in", name)
    run(predictor(model), tmp_path / "in", tmp_path / "out")
    wanted = run(predictor(model, ["t1"]), tmp_path / "in", tmp_path / "wanted")
    stopped = predictor(model, ["t1"])
    real = stopped._logits
    monkeypatch.setattr(stopped, "_logits", lambda item: real(item) if item.case == "a" else interrupt())
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "in", tmp_path / "out")
    assert segmentations(tmp_path / "out").keys() == wanted.keys()
    assert run(predictor(model, ["t1"]), tmp_path / "in", tmp_path / "out", overwrite=False) == wanted
    assert {case["status"] for case in report(tmp_path / "out")["cases"].values()} == {"predicted"}


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_export_that_ends_while_an_interruption_is_handled_counts(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path / "in", "a")
    stopped = predictor(model)
    monkeypatch.setattr(stopped, "_finish", lambda *_: interrupt())  # the user's Ctrl-C, while it waits for the export
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "in", tmp_path / "out")
    assert set(segmentations(tmp_path / "out")) == {"a.nii.gz"}
    (case,) = report(tmp_path / "out")["cases"].values()
    assert (case["status"], case["present"]) == ("predicted", ["t1", "t1ce", "t2", "flair"])


@pytest.mark.parametrize("missing", [None, ["auto"]])
def test_a_refused_call_writes_nothing(tmp_path: Path, model: Path, missing: Any) -> None:
    write_case(tmp_path / "in", "a")
    one = predictor(model, missing)
    before = sorted(os.listdir(tmp_path / "in"))
    for call in (one.predict_from_files, one.predict_from_files_sequential):
        with pytest.raises(ValueError, match="is the input folder"):
            call(str(tmp_path / "in"), str(tmp_path / "in"))
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            call(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "in")) == before
    if missing:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="No case in"):
            one.predict_from_files(str(tmp_path / "empty"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_is_named_without_ending(tmp_path: Path, auto: MGMLPredictor) -> None:
    """To which the data set's is added; ITK would take one of the two off again."""
    files = [[str(file) for file in write_case(tmp_path / "in", "a").values()]]
    for call in (auto.predict_from_files, auto.predict_from_files_sequential):
        with pytest.raises(ValueError, match=r"out/a\.nii\.gz cannot be written: its name ends with \.nii\.gz"):
            call(files, [str(tmp_path / "out" / "a.nii.gz")])


def test_stock_prediction_without_worker_processes(tmp_path: Path, model: Path) -> None:
    """``num_processes_*`` may be 0 there too; one of them alone nobody can work with."""
    write_case(tmp_path / "in", "a")
    stock = predictor(model, None)
    places = (str(tmp_path / "in"), str(tmp_path / "out"), False, True)
    with pytest.raises(ValueError, match="both 0 for no worker processes, got 1 and 0"):
        stock.predict_from_files(*places, 1, 0)
    with pytest.raises(ValueError, match="would predict all 2 parts"):
        stock.predict_from_files(*places, 0, 0, None, 2, 0)
    stock.checks_input = True
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no file that ends in"):
        stock.predict_from_files(str(tmp_path / "none"), *places[1:], 0, 0)
    assert not (tmp_path / "out").exists(), "what is refused leaves no folder"
    stock.predict_from_files(*places, 0, 0)
    assert set(segmentations(tmp_path / "out")) == {"a.nii.gz"}


def test_the_sequential_call_can_be_given_a_part(tmp_path: Path, model: Path) -> None:
    for name in "ab":
        write_case(tmp_path / "in", name, [0])
    second = predictor(model)
    second.sequential_part = (1, 2)
    assert set(run(second, tmp_path / "in", tmp_path / "out")) == {"b.nii.gz"}


def test_lists_of_files_and_results_without_files(tmp_path: Path, auto: MGMLPredictor) -> None:
    files = write_case(tmp_path / "in", "p", [1, 2])
    lists = [[str(files[2]), str(files[1])], [str(tmp_path / "in" / "gone_0000.nii.gz")], [files[2]]]
    returned = auto.predict_from_files(lists, None, num_processes_preprocessing=0, num_processes_segmentation_export=0)
    assert returned[1] is None
    assert set(auto.failures) == {"gone"}
    auto.predict_from_files_sequential(lists[::2], [str(tmp_path / "out" / n) for n in ("both", "alone")])
    np.testing.assert_array_equal(load(tmp_path / "out" / "both.nii.gz"), returned[0])
    np.testing.assert_array_equal(load(tmp_path / "out" / "alone.nii.gz"), returned[2])
    assert set(report(tmp_path / "out")["cases"]) == {"p [0]", "p [1]"}


def test_folds_are_averaged_under_one_mask(model: Path) -> None:
    logits = []
    for folds in ((0,), (1,), (0, 1)):
        one = predictor(model, folds=folds)
        item = item_of(one, {"flair": image(3)})
        logits.append(one._logits(item).astype(np.float32))
    np.testing.assert_allclose((logits[0] + logits[1]) / 2, logits[2], atol=2e-2)
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_the_second_stage_of_a_cascade(tmp_path: Path) -> None:
    cascade = predictor(write_model(tmp_path / "m", cascade=True))
    for name in "ab":
        write_case(tmp_path / "in", name, [0, 3])
    (tmp_path / "previous").mkdir()
    labels = np.random.default_rng(0).integers(0, 3, size=SHAPE).astype(np.uint8)
    write_image(tmp_path / "previous" / "a.nii.gz", labels)
    with pytest.raises(ValueError, match="second stage of a cascade"):
        run(cascade, tmp_path / "in", tmp_path / "out")
    written = run(
        cascade, tmp_path / "in", tmp_path / "out", folder_with_segs_from_prev_stage=str(tmp_path / "previous")
    )
    assert set(written) == {"a.nii.gz"}
    assert "previous stage's segmentation" in cascade.failures["b"]
    by_name = cascade.predict_case({"t1": image(0), "flair": image(3)}, spacing=(1, 1, 1), previous_stage=labels)
    np.testing.assert_array_equal(load(tmp_path / "out" / "a.nii.gz"), by_name)
    for call in (
        lambda: cascade.predict_case({"t1": image(0)}, spacing=(1, 1, 1)),
        lambda: cascade.predict_single_npy_array((image(0), None, None, None), {"spacing": [1.0] * 3}),
    ):
        with pytest.raises(CaseError, match=r"second stage of a cascade .* Give them as previous_stage"):
            call()


def test_worker_processes_write_the_same_files(tmp_path: Path, auto: MGMLPredictor) -> None:
    for seed, name in enumerate("ab"):
        write_case(tmp_path / "in", name, [0, 1 + seed], seed)
    write_case(tmp_path / "in", "c", [0])[0].write_bytes(b"")
    sequential = run(auto, tmp_path / "in", tmp_path / "one")
    auto.predict_from_files(
        tmp_path / "in", tmp_path / "many", num_processes_preprocessing=1, num_processes_segmentation_export=1
    )
    assert segmentations(tmp_path / "many") == sequential
    assert set(sequential) == {"a.nii.gz", "b.nii.gz"}
    assert set(auto.failures) == {"c"}


# --- other models, wrappers, precision --------------------------------------------------------------------------------
def test_a_stock_model_is_refused_and_a_modality_dropout_model_is_not(tmp_path: Path) -> None:
    stock = write_model(tmp_path / "stock", "nnUNetTrainer")
    with pytest.raises(ValueError, match=r"trained with nnUNetTrainer, .*nnUNetTrainerMGML"):
        predictor(stock)
    plain = predictor(stock, None)
    with pytest.raises(ValueError, match="never seen a case with a missing"):
        plain.predict_case({"t1": image(0)}, spacing=(1, 1, 1))
    dropout = write_model(tmp_path / "dropout", "nnUNetTrainerModalityDropout")
    write_case(tmp_path / "in", "p", [0, 2])
    by_file = run(predictor(dropout), tmp_path / "in", tmp_path / "auto")
    for c in (1, 3):  # what the stock predictor needs: an empty volume in place of the missing file
        write_image(tmp_path / "in" / f"p_{c:04d}.nii.gz", np.zeros(SHAPE, np.int16))
    reference = nnUNetPredictor(device=CPU, use_mirroring=False, allow_tqdm=False)
    reference.initialize_from_trained_model_folder(str(dropout), (0,))
    (tmp_path / "stock_out").mkdir()
    reference.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "stock_out"))
    assert (tmp_path / "stock_out" / "p.nii.gz").read_bytes() == by_file["p.nii.gz"]


def test_without_missing_modalities_everything_is_upstreams(tmp_path: Path, model: Path) -> None:
    write_case(tmp_path / "in", "p")
    written = []
    for cls, name in ((nnUNetPredictor, "stock"), (MGMLPredictor, "ours")):
        one = cls(device=CPU, use_mirroring=True, allow_tqdm=False)
        one.initialize_from_trained_model_folder(str(model), (0,))
        (tmp_path / name).mkdir()
        one.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / name))
        array = one.predict_single_npy_array(np.stack([image(c) for c in range(4)]), {"spacing": [1.0] * 3})
        written.append(
            (sorted(os.listdir(tmp_path / name)), (tmp_path / name / "p.nii.gz").read_bytes(), array.tobytes())
        )
    assert written[0] == written[1]


@pytest.mark.parametrize("trainer", ["nnUNetTrainerMGML", "nnUNetTrainerModalityDropout_conditional"])
def test_a_compiled_network_is_told_too(trainer: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", trainer)
    plain, compiled = predictor(model), predictor(model)
    compiled.network = torch.compile(compiled.network, backend="eager")
    for images in ({"t1": image(0), "t2": image(2)}, {"flair": image(3)}):
        np.testing.assert_array_equal(
            compiled.predict_case(images, spacing=(1, 1, 1)), plain.predict_case(images, spacing=(1, 1, 1))
        )


@pytest.mark.parametrize(("form", "largest"), [("multi_encoder", 0.15), ("shared_encoder", 0.22)])
def test_bfloat16_on_a_cpu(form: str, largest: float, tmp_path: Path) -> None:
    """As far off as 16 random roundings to 8 bits are; random weights, whose logits spread over 16 and 11."""
    model = write_model(tmp_path / "mgml", folds=(0, 1), options={"network_form": form})
    seen: list[torch.dtype] = []
    auto, half = predictor(model), predictor(model, cpu_bfloat16=True)
    hook = next(iter(half.network.encoders.children())).register_forward_hook(
        lambda _m, _i, output: seen.append(output[0].dtype)
    )
    item = item_of(half, {"t1": image(0), "t2": image(2)})
    exact = auto._logits(item).astype(np.float32)
    difference = np.abs(half._logits(item).astype(np.float32) - exact)
    hook.remove()
    assert seen
    assert np.sqrt(np.square(difference).mean()) < 2**-8 * math.sqrt(16) * exact.std()
    assert 0 < difference.max() < largest
    assert not half.network._forward_hooks
    with pytest.raises(ValueError, match="cpu_bfloat16 is for device cpu, not cuda"):
        MGMLPredictor(device=torch.device("cuda"), cpu_bfloat16=True)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["dwi"], "Unknown modality 'dwi'.*t1ce .also t1c/t1gd/t1post.*'auto' goes by the files"),
        (["t1", "t1ce", "t2", "flair"], "All modalities are named"),
    ],
)
def test_wrong_modalities_are_found_before_any_work(model: Path, missing: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predictor(model, missing)


@pytest.mark.parametrize(
    ("folds", "checkpoint", "words"),
    [
        ((0, 3), "checkpoint_final.pth", r"no checkpoint_final.pth for fold 3. Found: fold_0/checkpoint_final.pth"),
        ((0,), "checkpoint_best.pth", "no checkpoint_best.pth for fold 0"),
        (None, "x.pth", "any numbered fold"),
    ],
)
def test_folds_and_checkpoints_that_do_not_exist(model: Path, folds: Any, checkpoint: str, words: str) -> None:
    with pytest.raises(FileNotFoundError, match=words):
        MGMLPredictor(device=CPU).initialize_from_trained_model_folder(str(model), folds, checkpoint)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No trained model in .*: dataset.json is missing"):
        MGMLPredictor(device=CPU).initialize_from_trained_model_folder(str(tmp_path), None)


def test_models_of_the_same_data_set_are_named(tmp_path: Path) -> None:
    """Options that were set live in plans of their own, and -p is easily forgotten."""
    trained = tmp_path / "nnUNetTrainerMGML__nnUNetMGMLPlans__3d_fullres"
    trained.mkdir()
    (trained / "dataset.json").write_text("{}")
    (tmp_path / "nnUNetTrainerMGML__never__2d").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"first\. Trained there: -tr nnUNetTrainerMGML -p nnUNetMGMLPlans -c 3d_fullres\.$"
    ):
        MGMLPredictor(device=CPU).initialize_from_trained_model_folder(
            str(tmp_path / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres"), (0,)
        )


def test_folds_are_found_by_themselves(model: Path) -> None:
    assert predictor(model, folds=None)._origin["folds"] == [0, 1]
