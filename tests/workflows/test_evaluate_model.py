"""Evaluating a model: all subsets from one encoder pass, exactly what prediction from each subset gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_cases import CHANNELS, SHAPE, image, load, predictor, write_case, write_image, write_model

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.inference.inputs import Case, CaseError
from nnunetv2_mgml.inference.preprocessing import Item
from nnunetv2_mgml.inference.subsets.groups import prepare_subset_groups
from nnunetv2_mgml.inference.subsets.label_maps import SubsetLabelMaps
from nnunetv2_mgml.inference.subsets.predictor import ManySubsets, SubsetPredictor
from nnunetv2_mgml.modalities import all_subsets, subset_name
from nnunetv2_mgml.presentation.internals import load_model
from nnunetv2_mgml.scoring.results import load_evaluation
from nnunetv2_mgml.workflows.evaluate import ModelRequest, _predictor
from nnunetv2_mgml.workflows.report import fold_of_case

SUBSETS = all_subsets(4)
ROUNDING = {"atol": 1e-3, "rtol": 2**-10}
"""For logits, which are kept as float16."""
NAMES = [subset_name(s, CHANNELS) for s in SUBSETS]


def subset_predictor(model: Path, **kwargs) -> SubsetPredictor:
    result = SubsetPredictor(use_mirroring=False, allow_tqdm=False, device=torch.device("cpu"), **kwargs)
    result.initialize_from_trained_model_folder(str(model), (0,))
    return result


def test_an_evaluation_starts_as_many_threads_as_it_may_use(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _predictor(ModelRequest(model_folder=model, device="cpu"))
    assert threads == [1]


def write_unequal_case(folder: Path, name: str) -> None:
    """Channel 2 has a hole at the border of the brain and channel 3 reaches further: three masks among 15 subsets."""
    for channel in range(4):
        volume = image(channel, seed=3, margin=3)
        if channel == 2:
            volume[3, 3:9, 3:9] = 0
        if channel == 3:
            volume[1, 5, 5] = 50
        write_image(folder / f"{name}_{channel:04d}.nii.gz", volume)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_case(tmp_path / "images", "a", seed=1)
    write_unequal_case(tmp_path / "images", "b")
    return tmp_path / "images"


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    (tmp_path / "labels").mkdir()
    for name, centre in (("a", 9), ("b", 11)):
        distance = np.abs(np.indices(SHAPE) - centre).max(axis=0)
        truth = (distance < 6).astype(np.uint8) + (distance < 4) + (distance < 2)
        write_image(tmp_path / "labels" / f"{name}.nii.gz", truth)
    return tmp_path / "labels"


def evaluate(model: Path, images: Path, labels: Path, out: Path, *extra: str) -> int:
    return cli.main(
        [
            "evaluate",
            "-i",
            str(images),
            "-l",
            str(labels),
            "-m",
            str(model),
            "-o",
            str(out),
            "-device",
            "cpu",
            "--disable_tta",
            "-np",
            "0",
            "-npp",
            "0",
            "-nps",
            "0",
            "--disable_progress_bar",
            *extra,
        ]
    )


def test_every_subset_equals_its_own_prediction_to_the_voxel(model, images, labels, tmp_path):
    assert evaluate(model, images, labels, tmp_path / "out") == 0
    single = predictor(model)
    for name in NAMES:
        single.missing_modalities = [c for c in CHANNELS if c not in name.split("+")] or ["auto"]
        single.predict_from_files_sequential(str(images), str(tmp_path / "single" / name))
        for file in ("a.nii.gz", "b.nii.gz"):
            expected = load(tmp_path / "single" / name / file)
            assert expected.any()
            own = load(tmp_path / "out" / "predictions" / name / file)
            np.testing.assert_array_equal(own, expected, err_msg=f"{name} {file}")


def test_mirroring_and_folds_are_those_of_prediction(tmp_path):
    model = write_model(tmp_path / "D" / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres", folds=(0, 1))
    data = np.random.default_rng(0).normal(size=(4, 16, 16, 20)).astype(np.float32)
    subsets = [SUBSETS[1], SUBSETS[6]]
    many = SubsetPredictor(use_mirroring=True, allow_tqdm=False, device=torch.device("cpu"))
    many.initialize_from_trained_model_folder(str(model), (0, 1))
    single = predictor(model, folds=(0, 1), use_mirroring=True)
    for subset, own in zip(subsets, many.predict_subsets(data, subsets), strict=True):
        alone = data.copy()
        alone[[c for c in range(4) if not subset[c]]] = np.nan
        np.testing.assert_allclose(own, single._logits(Item("a", alone, {}, subset)), **ROUNDING)


def test_encoders_run_once_per_patch(model, images):
    many = subset_predictor(model)
    calls = {"encode": 0, "decode_subsets": 0}
    for name in calls:
        original = getattr(many.network, name)

        def counted(*args, _name=name, _original=original):
            calls[_name] += 1
            return _original(*args)

        setattr(many.network, name, counted)
    many.predict_subsets(np.random.default_rng(0).normal(size=(4, 16, 16, 24)).astype(np.float32), SUBSETS)
    assert calls == {"encode": 2, "decode_subsets": 2}


def test_every_sample_of_a_batch_gets_its_own_subsets(model):
    network = subset_predictor(model).network.eval()
    x = torch.randn(2, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = ManySubsets(network, SUBSETS)(x)
        for subset, logits in zip(SUBSETS, together.unflatten(1, (15, -1)).unbind(1), strict=True):
            mask = torch.tensor([subset] * 2)
            torch.testing.assert_close(logits, network(x, modality_mask=mask), atol=1e-4, rtol=1e-4)


def test_network_without_shared_features_gets_zeroed_channels(images, tmp_path):
    model = write_model(
        tmp_path / "nnUNetTrainerModalityDropout__nnUNetPlans__3d_fullres", "nnUNetTrainerModalityDropout"
    )
    many, single = subset_predictor(model), predictor(model)
    data = np.random.default_rng(0).normal(size=(4, 16, 16, 16)).astype(np.float32)
    subset = (True, False, True, False)
    logits = many.predict_subsets(data, [SUBSETS[0], subset])
    data[[1, 3]] = 0
    np.testing.assert_array_equal(logits[1], single._logits(Item("a", data, {}, subset)))


def test_subsets_with_one_mask_share_their_preprocessing(model, images):
    groups = {}
    for name in ("a", "b"):
        files = {c: str(images / f"{name}_{c:04d}.nii.gz") for c in range(4)}
        item = prepare_subset_groups(Case(name, files), SUBSETS, subset_predictor(model).model, shared=False)
        groups[name] = item.groups
        assert sorted(s for g in groups[name] for s in g.subsets) == sorted(SUBSETS)
    assert len(groups["a"]) == 1
    by_subset = {s: i for i, g in enumerate(groups["b"]) for s in g.subsets}
    assert len(groups["b"]) == 3
    t2, with_flair = (False, False, True, False), [s for s in SUBSETS if s[3]]
    assert len({by_subset[s] for s in with_flair}) == 1
    assert [s for s, i in by_subset.items() if i == by_subset[t2]] == [t2]
    shared = prepare_subset_groups(Case("b", files), SUBSETS, subset_predictor(model).model, shared=True)
    assert len(shared.groups) == 1


def test_a_channel_the_model_does_not_have_is_an_error(model, images):
    """As in prediction: the number may be part of the case's name."""
    files = {c: str(images / f"a_{c:04d}.nii.gz") for c in range(4)} | {7: str(images / "a_0000.nii.gz")}
    with pytest.raises(CaseError, match="has channel number 0007, but the model has 4 channels"):
        prepare_subset_groups(Case("a", files), SUBSETS, subset_predictor(model).model, shared=False)


def test_shared_preprocessing_does_not_depend_on_the_subsets_left_to_do(model, images):
    case = Case("b", {c: str(images / f"b_{c:04d}.nii.gz") for c in range(4)})
    subset = (True, False, False, False)
    [whole] = prepare_subset_groups(case, SUBSETS, subset_predictor(model).model, shared=True).groups
    [rest] = prepare_subset_groups(case, [subset], subset_predictor(model).model, shared=True).groups
    assert (rest.subsets, rest.channels) == ([subset], [0])
    np.testing.assert_array_equal(rest.data, whole.data[:1])
    assert str(rest.properties) == str(whole.properties)


def test_shared_preprocessing_is_exact_only_where_the_masks_agree(model, images, labels, tmp_path):
    names = ("t1", "t1ce+flair")
    assert evaluate(model, images, labels, tmp_path / "exact", "--subsets", *names, "all") == 0
    assert (
        evaluate(model, images, labels, tmp_path / "shared", "--subsets", *names, "all", "--shared_preprocessing") == 0
    )
    for name in names:
        for case in ("a", "b"):
            exact, shared = (
                load(tmp_path / kind / "predictions" / name / f"{case}.nii.gz") for kind in ("exact", "shared")
            )
            assert np.array_equal(exact, shared) == (case == "a" or "flair" in name)


def test_finished_cases_are_not_predicted_again(model, images, labels, tmp_path, monkeypatch):
    """An unfinished case is predicted from all its subsets, as without a break, and only what is missing is written."""
    out = tmp_path / "out"
    assert evaluate(model, images, labels, out, "--subsets", "t1", "t2+flair") == 0
    before = load_evaluation(out).table
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("predictions/*/*")}
    for ending in (".nii.gz", ".probabilities.json"):
        (out / "predictions" / "t1" / f"b{ending}").unlink()
    (out / "cases" / "a.json").unlink()
    predicted = []
    original = SubsetLabelMaps._predict_item

    def spy(self, item, exporting):
        predicted.append((item.case, [s for g in item.groups for s in g.subsets]))
        return original(self, item, exporting)

    monkeypatch.setattr(SubsetLabelMaps, "_predict_item", spy)
    assert evaluate(model, images, labels, out, "--subsets", "t1", "t2+flair") == 0
    assert predicted == [("b", [(True, False, False, False), (False, False, True, True)])]
    assert load_evaluation(out).table.equals(before)
    again = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("predictions/*/*")}
    assert {path: content for path, (content, _) in again.items()} == {p: content for p, (content, _) in files.items()}
    written = {path.name for path, (_, moment) in again.items() if moment != files[path][1]}
    assert written == {"b.nii.gz", "b.probabilities.json"}
    assert {path.parent.name for path, (_, moment) in again.items() if moment != files[path][1]} == {"t1"}


def test_a_case_whose_images_changed_is_predicted_again(model, images, labels, tmp_path, caplog):
    out = tmp_path / "out"
    names = ("t1", "t2+flair", "flair")
    assert evaluate(model, images, labels, out, "--subsets", *names) == 0
    before = {(name, case): load(out / "predictions" / name / f"{case}.nii.gz") for name in names for case in "ab"}
    write_image(images / "a_0003.nii.gz", image(3, seed=9))
    (out / "summary.json").unlink()  # as if that run had been killed: finished results are not left out
    assert evaluate(model, images, labels, out, "--subsets", "t1", "t2+flair", "t2") == 0
    assert not (out / "predictions" / "flair" / "a.nii.gz").exists()  # not asked for now, and outdated
    for (name, case), old in before.items():
        if (name, case) != ("flair", "a"):
            same = np.array_equal(load(out / "predictions" / name / f"{case}.nii.gz"), old)
            assert same == ((name, case) != ("t2+flair", "a"))
    assert [record.args[0] for record in caplog.records if "predicted again" in record.message] == ["a"]
    single = predictor(model, ["t1", "t1ce"])
    single.predict_from_files_sequential(str(images), str(tmp_path / "single"))
    np.testing.assert_array_equal(
        load(out / "predictions" / "t2+flair" / "a.nii.gz"), load(tmp_path / "single" / "a.nii.gz")
    )


def test_other_scoring_rules_need_no_new_prediction(model, images, labels, tmp_path, monkeypatch, capsys):
    arguments = (model, images, labels, tmp_path / "out", "--subsets", "all")
    assert evaluate(*arguments) == 0
    monkeypatch.setattr(SubsetLabelMaps, "_predict_item", lambda *_: pytest.fail("predicted again"))
    assert evaluate(*arguments, "--policy", "nan", "--remove_small", "WT=100000") == 2
    assert "--overwrite to score again what is predicted" in capsys.readouterr().err
    assert evaluate(*arguments, "--policy", "nan", "--remove_small", "WT=100000", "--overwrite") == 0
    assert load_evaluation(tmp_path / "out").policy == "nan"
    assert (load_evaluation(tmp_path / "out").values("dice", "whole_tumor") == 0).all(axis=None)


def test_a_case_without_any_wanted_modality_is_left_out(model, images, labels, tmp_path, capsys):
    (images / "b_0001.nii.gz").unlink()
    out = tmp_path / "out"
    assert evaluate(model, images, labels, out, "--subsets", "t1ce", "--allow_missing") == 0
    assert load_evaluation(out).cases == ["a"]
    assert json.loads((out / "summary.json").read_text())["not_evaluated"] == {"b": ["t1ce"]}
    (images / "a_0001.nii.gz").unlink()
    assert evaluate(model, images, labels, tmp_path / "none", "--subsets", "t1ce", "--allow_missing") == 2
    assert "No case has the modalities of any of t1ce" in capsys.readouterr().err


def test_other_settings_are_refused(model, images, labels, tmp_path, capsys):
    assert evaluate(model, images, labels, tmp_path / "out", "--subsets", "all") == 0
    assert evaluate(model, images, labels, tmp_path / "out", "--subsets", "all", "-step_size", "1") == 2
    assert "model.tile_step_size was 0.5, is now 1.0" in capsys.readouterr().err
    assert evaluate(model, images, labels, tmp_path / "out", "--subsets", "all", "-step_size", "1", "--overwrite") == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("-step_size", "0"), "-step_size is a share of the patch, above 0 and at most 1, got 0."),
        (("-step_size", "1.5"), "above 0 and at most 1, got 1.5."),
        (("-device", "mps"), "-device mps, but PyTorch finds no Apple GPU. Use -device cpu (slow) or cuda."),
        (("-device", "cuda"), "-device cuda, but PyTorch finds no CUDA device. Use -device cpu (slow) or mps."),
    ],
)
def test_wrong_options_are_found_before_the_model_is_loaded(
    model, images, labels, tmp_path, capsys, monkeypatch, extra, message
):
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    monkeypatch.setattr(SubsetPredictor, "initialize_from_trained_model_folder", lambda *_: pytest.fail("loaded"))
    assert evaluate(model, images, labels, tmp_path / "out", *extra) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="-device mps, but"):
        load_model(model, 0, "checkpoint_final.pth", "mps")


def test_incomplete_case_is_refused_or_left_out(model, images, labels, tmp_path, capsys, monkeypatch):
    (images / "b_0001.nii.gz").unlink()
    assert evaluate(model, images, labels, tmp_path / "out") == 2
    assert "b (t1ce)" in capsys.readouterr().err
    assert evaluate(model, images, labels, tmp_path / "out", "--allow_missing") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    counts = {name: summary["results"]["dice"]["whole_tumor"][name]["n"] for name in NAMES}
    assert all(counts[name] == (1 if "t1ce" in name else 2) for name in NAMES)
    assert all("t1ce" in name for name in summary["not_evaluated"]["b"])
    monkeypatch.setattr(SubsetPredictor, "predict_subsets", lambda *_: pytest.fail("what is finished is predicted"))
    assert evaluate(model, images, labels, tmp_path / "out", "--allow_missing") == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["results"] == summary["results"]


def test_one_broken_case_does_not_lose_the_others(model, images, labels, tmp_path, capsys):
    (images / "a_0000.nii.gz").write_bytes(b"not an image")
    assert evaluate(model, images, labels, tmp_path / "out", "--subsets", "all") == 2
    error = capsys.readouterr().err
    assert "1 of 2 cases could not be evaluated" in error
    assert "a_0000.nii.gz" in error
    assert (tmp_path / "out" / "cases" / "b.json").is_file()


def test_validation_cases_of_folds(nnunet_folders, images, labels, capsys):
    dataset = "Dataset900_Phantom"
    raw, preprocessed = nnunet_folders / "raw" / dataset, nnunet_folders / "preprocessed" / dataset
    model = write_model(
        nnunet_folders / "results" / dataset / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres", folds=(0, 1)
    )
    raw.mkdir()
    preprocessed.mkdir()
    images.rename(raw / "imagesTr")
    labels.rename(raw / "labelsTr")
    (raw / "dataset.json").write_text((model / "dataset.json").read_text())
    (preprocessed / "splits_final.json").write_text(
        json.dumps([{"train": ["b"], "val": ["a"]}, {"train": ["a"], "val": ["b"]}])
    )
    arguments = [
        "evaluate",
        "-d",
        "900",
        "-c",
        "3d_fullres",
        "-device",
        "cpu",
        "--disable_tta",
        "-np",
        "0",
        "-npp",
        "0",
        "-nps",
        "0",
        "--disable_progress_bar",
    ]
    everything, arguments = [*arguments, "--write_subset_report"], [*arguments, "--subsets", "t1", "all"]
    for refused, message in ((["--subsets", "t1"], "only t1"), (["--metrics", "hd95"], "Add dice")):
        assert cli.main([*everything, "-f", "0", *refused]) == 2
        assert message in capsys.readouterr().err
    assert not list(model.glob("fold_0/subset_evaluation*"))
    assert cli.main([*arguments, "-f", "0"]) == 0
    first = load_evaluation(model / "fold_0" / "subset_evaluation_no_mirroring")
    assert first.cases == ["a"]
    assert first.subset_names == ["t1", "t1+t1ce+t2+flair"]
    assert cli.main([*arguments, "-f", "0", "1"]) == 0
    both = load_evaluation(model / "subset_evaluation_no_mirroring_folds_0_1")
    assert both.cases == ["a", "b"]
    ours = load(model / "subset_evaluation_no_mirroring_folds_0_1" / "predictions" / "t1" / "b.nii.gz")
    alone = predictor(model, ["t1ce", "t2", "flair"], folds=(1,)).predict_case({"t1": raw / "imagesTr/b_0000.nii.gz"})
    np.testing.assert_array_equal(ours, alone)
    assert cli.main([*everything, "-f", "0", "1"]) == 0
    report = json.loads((model / "subset_report.json").read_text())
    assert report["number_of_cases"] == 2
    assert report["evaluated"]["kind"] == "validation"
    assert report["case_quality"] is None, "of two cases nothing is fitted"
    kept = model / "subset_evaluation_no_mirroring_folds_0_1" / "predictions" / "t1" / "b.probabilities.json"
    assert json.loads(kept.read_text())["whole_tumor"]["voxels"] == np.isin(ours, (1, 2, 3)).sum()
    assert [
        fold_of_case(load_evaluation(output.parent), case)
        for output in model.glob("subset_evaluation*folds_0_1/summary.json")
        for case in "ab"
    ] == ["0", "1"]
    (model / "fold_0" / "mgml_training_log.csv").write_text("epoch,lr,train_total\n0,0.01,2.0\n1,0.009,1.5\n")
    capsys.readouterr()
    assert cli.main(["report", str(model / "subset_evaluation_no_mirroring_folds_0_1")]) == 0
    assert "with images of patients" in capsys.readouterr().out
    page = (model / "subset_evaluation_no_mirroring_folds_0_1" / "report.html").read_text()
    assert 'id="viewer"' in page
    assert "Training of fold 0" in page
    assert cli.main([*arguments, "-f", "2"]) == 2
    assert "fold 2" in capsys.readouterr().err


def test_kept_summaries_count_the_voxels_of_the_label_maps(model, tmp_path):
    """The images' voxels are twice as wide as the network's."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for channel in range(4):
        write_image(tmp_path / "images" / f"a_{channel:04d}.nii.gz", image(channel), spacing=2.0)
    write_image(tmp_path / "labels" / "a.nii.gz", np.ones(SHAPE, np.uint8), spacing=2.0)
    assert evaluate(model, tmp_path / "images", tmp_path / "labels", tmp_path / "out", "--subsets", "t1", "all") == 0
    for subset in ("t1", "t1+t1ce+t2+flair"):
        folder = tmp_path / "out" / "predictions" / subset
        kept = json.loads((folder / "a.probabilities.json").read_text())
        written = load(folder / "a.nii.gz")
        for region, labels in (("whole_tumor", (1, 2, 3)), ("tumor_core", (2, 3)), ("enhancing_tumor", (3,))):
            assert kept[region]["voxels"] == np.isin(written, labels).sum()


def test_a_cascade_predicts_its_first_stage_from_the_same_subset(images, tmp_path, capsys):
    model = write_model(tmp_path / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres", cascade=True)
    (tmp_path / "labels").mkdir()
    for case in "ab":
        write_image(tmp_path / "labels" / f"{case}.nii.gz", np.ones(SHAPE, np.uint8))
    arguments = (model, images, tmp_path / "labels", tmp_path / "out", "--subsets", "t1+flair", "t2")
    assert evaluate(*arguments) == 2
    assert "second stage of a cascade" in (said := capsys.readouterr().err)
    assert "nnUNetTrainerMGML__nnUNetPlans__3d_lowres" in said
    first = write_model(tmp_path / "nnUNetTrainerMGML__nnUNetPlans__3d_lowres")
    assert evaluate(*arguments) == 0
    for missing, subset in ((["t1ce", "t2"], "t1+flair"), (["t1", "t1ce", "flair"], "t2")):
        alone = predictor(first, missing)
        alone.predict_from_files_sequential(str(images), str(tmp_path / subset / "first"))
        alone = predictor(model, missing)
        alone.predict_from_files_sequential(
            str(images), str(tmp_path / subset), folder_with_segs_from_prev_stage=str(tmp_path / subset / "first")
        )
        for case in ("a.nii.gz", "b.nii.gz"):
            ours = load(tmp_path / "out" / "predictions" / subset / case)
            np.testing.assert_array_equal(ours, load(tmp_path / subset / case), err_msg=f"{subset} {case}")
    assert evaluate(*arguments) == 0, "resumed"


def test_what_five_cases_tell_is_used_by_a_prediction(nnunet_folders, tmp_path):
    dataset = "Dataset900_Phantom"
    raw, preprocessed = nnunet_folders / "raw" / dataset, nnunet_folders / "preprocessed" / dataset
    model = write_model(nnunet_folders / "results" / dataset / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres")
    (raw / "labelsTr").mkdir(parents=True)
    preprocessed.mkdir()
    (raw / "dataset.json").write_text((model / "dataset.json").read_text())
    names = [f"case_{number}" for number in range(5)]
    for number, name in enumerate(names):
        write_case(raw / "imagesTr", name, seed=number)
        distance = np.abs(np.indices(SHAPE) - 8 - number).max(axis=0)
        write_image(raw / "labelsTr" / f"{name}.nii.gz", (distance < 6).astype(np.uint8) + 2 * (distance < 3))
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": [], "val": names}]))
    arguments = ["evaluate", "-d", "900", "-c", "3d_fullres", "-device", "cpu", "--disable_tta", "--no_figures"]
    arguments += ["-np", "0", "-npp", "0", "-nps", "0", "--disable_progress_bar", "--write_subset_report"]
    assert cli.main([*arguments, "--metrics", "dice"]) == 0
    report = json.loads((model / "subset_report.json").read_text())
    assert report["case_quality"]["cases"] == 5
    whole = report["case_quality"]["regions"]["whole_tumor"]
    assert whole["used"] == (
        whole["left_out"]["mean_absolute_error"] < whole["left_out"]["mean_absolute_error_of_subset_mean"]
    )
    whole["used"] = True  # random weights may say nothing
    (model / "subset_report.json").write_text(json.dumps(report))
    predictor(model).predict_from_files_sequential(str(raw / "imagesTr"), str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "mgml_prediction.json").read_text())["cases"]["case_0"]
    told = found["estimated_dice"]["whole_tumor"]
    assert told["low"] <= told["estimate"] <= told["high"]
    assert set(found["doubtful_regions"]) <= set(found["estimated_dice"])


def test_model_without_missing_modality_training_is_refused(images, labels, tmp_path, capsys):
    model = write_model(tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres", "nnUNetTrainer")
    assert evaluate(model, images, labels, tmp_path / "out") == 2
    assert "never seen a case with a missing modality" in capsys.readouterr().err


def test_constant_modality_counts_as_absent(model, images, labels, tmp_path, capsys):
    write_image(images / "a_0002.nii.gz", np.zeros(SHAPE, dtype=np.int16))
    assert evaluate(model, images, labels, tmp_path / "out", "--subsets", "t1", "t2") == 2
    assert "Case a: a modality is empty" in capsys.readouterr().err


@pytest.mark.parametrize("shared", [False, True])
def test_a_modality_that_normalisation_empties_is_lacking_as_in_prediction(model, images, shared):
    files = {c: str(images / f"a_{c:04d}.nii.gz") for c in range(4)}
    write_image(Path(files[1]), np.where(image(0, seed=1) > 0, 7, 0).astype(np.int16))
    item = prepare_subset_groups(Case("a", files), SUBSETS, subset_predictor(model).model, shared)
    assert item.lacking == [s for s in SUBSETS if s[1]]
    assert [s for g in item.groups for s in g.subsets] == [s for s in SUBSETS if not s[1]]
    assert all(g.channels == [0, 2, 3] for g in item.groups)
    alone = prepare_subset_groups(Case("a", {1: files[1]}), SUBSETS[:4], subset_predictor(model).model, shared)
    assert (alone.groups, alone.lacking) == ([], SUBSETS[:4])
