"""What is shown of the inside of a network is what the network computes, turned as the images are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from inference_cases import CHANNELS, image, write_image, write_model
from loss_cases import meta_network_of, objective_of
from report_cases import write_evaluation

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.inference.inputs import Case
from nnunetv2_mgml.inference.preprocessing import prepare_case
from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.interface import View
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.adaptive_fusion import adaptive_fusion
from nnunetv2_mgml.objective.published import paper, reference
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.objective.terms import soft_label
from nnunetv2_mgml.presentation.figures.slices import read_axial, telling_slice
from nnunetv2_mgml.presentation.internals import LoadedModel, compute_internals, load_model, nearest
from nnunetv2_mgml.presentation.report.inside import patch_caption

PATCH = (16, 16, 16)
RAS = np.diag([-1.0, -1.0, 1.0])
REGIONS = {"whole_tumor", "tumor_core", "enhancing_tumor"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose checkpoint also holds a MetaNetwork, as the trainer writes it."""
    folder = write_model(tmp_path_factory.mktemp("model") / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres")
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    torch.manual_seed(5)
    meta = meta_network_of(objective_of(Options()))
    torch.nn.init.normal_(meta.layers[2].bias)
    torch.save({**checkpoint, "mgml": {"meta_network": meta.state_dict()}}, file)
    return folder


@pytest.fixture
def case(tmp_path: Path) -> tuple[Case, Path]:
    """A case of exactly one patch, stored in RAS, with its label map."""
    files = {
        channel: str(
            write_image(tmp_path / f"a_{channel:04d}.nii.gz", image(channel, 1, PATCH, margin=0), direction=RAS)
        )
        for channel in range(4)
    }
    truth = np.zeros(PATCH, np.uint8)
    truth[3:9, 2:8, 5:12] = 1
    truth[5:7, 3:5, 6:9] = 3
    (tmp_path / "labels").mkdir()
    return Case("a", files), write_image(tmp_path / "labels" / "a.nii.gz", truth, direction=RAS)


def preprocessed(loaded: LoadedModel, case: Case) -> torch.Tensor:
    predictor = loaded.predictor
    item = prepare_case(
        case,
        [c in case.files for c in range(4)],
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.dataset_json,
    )
    return torch.from_numpy(item.data)[None]


def test_shows_what_the_network_computes(model: Path, case: tuple[Case, Path], tmp_path: Path):
    loaded = load_model(model, 0, "checkpoint_final.pth", "cpu")
    inside = compute_internals(loaded, *case, all_subsets(4))
    truth, _ = read_axial(case[1])
    z = telling_slice(truth)
    np.testing.assert_array_equal(inside.reference, truth[z])
    assert set(inside.images) == set(inside.single) == set(inside.features) == set(CHANNELS)
    for channel, name in enumerate(CHANNELS):
        raw = read_axial(case[0].files[channel])[0][z].astype(float)
        assert np.corrcoef(inside.images[name].ravel(), raw.ravel())[0, 1] > 0.999

    # the ordinary prediction of this one-patch case, written and read as a user would
    predictor = loaded.predictor
    predictor.use_gaussian = False  # the corner's tiny weight costs float16 two digits
    labels, probabilities = predictor.predict_case(
        {name: case[0].files[c] for c, name in enumerate(CHANNELS)}, return_probabilities=True
    )
    np.testing.assert_array_equal(inside.fused, labels[z, ::-1, ::-1])
    assert len(inside.probabilities) == 15
    everything = inside.probabilities["+".join(CHANNELS)]
    assert set(everything) == REGIONS | {"confidence"}
    for head, region in enumerate(("whole_tumor", "tumor_core", "enhancing_tumor")):
        np.testing.assert_allclose(everything[region], probabilities[head][z, ::-1, ::-1], atol=2e-3)
    flair = predictor.predict_case({"flair": case[0].files[3]}, return_probabilities=True)[1]
    np.testing.assert_allclose(inside.probabilities["flair"]["tumor_core"], flair[1][z, ::-1, ::-1], atol=2e-3)


def test_captions_claim_a_convention_only_where_sides_are_known(model: Path, case: tuple[Case, Path], tmp_path: Path):
    """TIFF says where nobody's left is."""
    loaded = load_model(model, 0, "checkpoint_final.pth", "cpu")
    nifti = compute_internals(loaded, *case, [])
    image = tmp_path / "labels" / "a.tif"
    sitk.WriteImage(sitk.ReadImage(str(case[1])), str(image))
    tiff = compute_internals(loaded, case[0], image, [])
    assert [inside.sides_known for inside in (nifti, tiff)] == [True, False]
    assert "radiological" in patch_caption(nifti)
    assert "radiological" not in patch_caption(tiff)


def test_soft_label_is_the_one_of_training(model: Path, case: tuple[Case, Path]):
    loaded = load_model(model, 0, "checkpoint_final.pth", "cpu")
    inside = compute_internals(loaded, *case, [])
    with torch.no_grad():
        data = preprocessed(loaded, case[0])
        features = loaded.network.encode(data)
        logits = loaded.network.decode_modalities(features)
        meta = meta_network_of(objective_of(Options()))
        meta.load_state_dict(loaded.training_state["meta_network"])
        parameters = meta(logits.softmax(2).mean((3, 4, 5)), torch.ones(1, 4, dtype=torch.bool))
    for name in ("w_f", "beta", "alpha"):
        assert inside.meta_parameters[name] == pytest.approx(float(getattr(parameters, name)), rel=1e-4)
    assert inside.meta_parameters["w_f"] != pytest.approx(0.5, abs=1e-3)  # not the start value: the state was loaded
    expected = adaptive_fusion(logits, torch.ones(1, 4, dtype=torch.bool), parameters)[0].argmax(0).numpy()
    z = telling_slice(read_axial(case[1])[0])
    # regions_class_order is 1, 2, 3: class and label value agree
    np.testing.assert_array_equal(inside.soft_label, expected[z, ::-1, ::-1])
    for channel, name in enumerate(CHANNELS):
        np.testing.assert_array_equal(inside.single[name], logits[0, channel].argmax(0).numpy()[z, ::-1, ::-1])
    half = features[1][0, 2].numpy()
    middle = int((z + 0.5) * half.shape[1] / 16)
    np.testing.assert_allclose(inside.features["t2"], half[:, middle, ::-1, ::-1], atol=1e-5)
    assert inside.scale == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reading": "paper"},
        {"reading": "reference"},
        {"reading": "reference", "meta_form": "published"},
        {"soft_label": "mean"},
        {"soft_label": "fixed", "fixed_sharpness": 7.0, "fixed_confidence": 0.8},
    ],
    ids=lambda changes: "+".join(map(str, changes.values())) or "default",
)
def test_every_kind_of_soft_label_is_the_very_one_of_a_training_step(
    changes: dict[str, Any], case: tuple[Case, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for an incomplete case, of which the published code fuses the absent modality as well."""
    folder = write_model(tmp_path / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres", options=changes)
    torch.manual_seed(5)
    objective = objective_of(Options().updated(changes))
    meta = meta_network_of(objective)
    if meta is not None:
        torch.nn.init.normal_(meta.layers[2].bias)
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=False), "mgml": objective.training_state()}, file)
    loaded = load_model(folder, 0, "checkpoint_final.pth", "cpu")
    incomplete = Case("a", {channel: path for channel, path in case[0].files.items() if channel != 2})
    inside = compute_internals(loaded, incomplete, case[1], [])

    fusions: list[torch.Tensor] = []

    def noting(function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
            fusions.append(function(*args, **kwargs))
            return fusions[-1]

        return noted

    for module, name in (
        (soft_label, "adaptive_fusion"),
        (soft_label, "mean_fusion"),
        (paper, "raw_fusion"),
        (reference, "raw_fusion"),
    ):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    view = View(torch.tensor([[True, True, False, True]]))
    output = loaded.network(preprocessed(loaded, incomplete), view, objective.needs)
    step = Step(objective.spec, output, view, torch.zeros(1, 3, *PATCH))
    objective.terms["soft_label"](step)
    [scores] = fusions
    z = telling_slice(read_axial(case[1])[0])
    expected = scores[0].argmax(0).numpy()
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(inside.soft_label, expected[z, ::-1, ::-1])
    if changes.get("soft_label") == "mean":
        assert inside.meta_parameters == {}
    else:
        parameters = objective.terms["soft_label"].parameters_of(step)
        for name in ("w_f", "beta", "alpha"):
            assert inside.meta_parameters[name] == pytest.approx(float(getattr(parameters, name)[0]), rel=1e-5)


def log_mean_exp(values: np.ndarray, sharpness: float) -> np.ndarray:
    """Smooth maximum over the first axis; over a negative sharpness the smooth minimum."""
    scaled = sharpness * values
    top = scaled.max(0)
    return (top + np.log(np.exp(scaled - top).mean(0))) / sharpness


@pytest.mark.parametrize(
    "changes",
    [
        {"reading": "paper"},
        {"reading": "reference"},
        {"soft_label": "mean"},
        {"soft_label": "fixed", "fixed_sharpness": 3.0, "fixed_confidence": 0.2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_the_soft_label_is_that_of_the_reading(
    model: Path, case: tuple[Case, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Against its formula in float64, for a case that lacks two modalities (the published code fuses them as well)."""
    folder = shutil.copytree(model, tmp_path / model.name)
    plans = json.loads((folder / "plans.json").read_text())
    plans["mgml"]["config"].update(changes)
    (folder / "plans.json").write_text(json.dumps(plans))
    torch.manual_seed(3)
    meta = meta_network_of(objective_of(Options().updated(changes)))
    if meta is not None:
        torch.nn.init.normal_(meta.layers[2].bias)
    file = folder / "fold_0" / "checkpoint_final.pth"
    state = {} if meta is None else {"meta_network": meta.state_dict()}
    torch.save({**torch.load(file, weights_only=False), "mgml": state}, file)
    loaded = load_model(folder, 0, "checkpoint_final.pth", "cpu")
    inside = compute_internals(loaded, Case("a", {c: case[0].files[c] for c in (1, 3)}), case[1], [])

    data = preprocessed(loaded, case[0])
    data[:, [0, 2]] = 0
    available = (False, True, False, True)
    with torch.no_grad():
        logits = loaded.network.decode_modalities(loaded.network.encode(data))  # of all, as in training
        probabilities = logits.double().softmax(2).mean((3, 4, 5)).float()
        fused = torch.tensor([[True] * 4 if changes.get("reading") == "reference" else available])
        parameters = None if meta is None else meta(probabilities, fused)
    scores = logits[0].double().numpy()
    if "reading" not in changes:
        scores = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    scores = scores[fused[0].numpy()]
    if changes.get("soft_label") == "mean":
        expected = scores.mean(0)
    else:
        w, beta, alpha = (0.2, 3.0, 3.0) if parameters is None else (float(value) for value in parameters[2:])
        high, low = log_mean_exp(scores, beta), log_mean_exp(scores, -alpha)
        if "reading" in changes:  # sums, not means
            high, low = high + np.log(len(scores)) / beta, low - np.log(len(scores)) / alpha
        expected = w * high + (1 - w) * low
    z = telling_slice(read_axial(case[1])[0])
    np.testing.assert_array_equal(inside.soft_label, expected.argmax(0)[z, ::-1, ::-1])
    assert len(np.unique(inside.soft_label)) > 1
    assert bool(inside.meta_parameters) == (changes.get("soft_label") != "mean")


def test_absent_modalities_are_left_out(model: Path, case: tuple[Case, Path]):
    only = Case("a", {1: case[0].files[1], 3: case[0].files[3]})
    inside = compute_internals(load_model(model, 0, "checkpoint_final.pth", "cpu"), only, case[1], all_subsets(4))
    assert set(inside.images) == set(inside.single) == {"t1ce", "flair"}
    assert set(inside.probabilities) == {"t1ce", "flair", "t1ce+flair"}


def test_a_checkpoint_without_meta_network_has_no_soft_label(case: tuple[Case, Path], tmp_path: Path):
    folder = write_model(tmp_path / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres")
    inside = compute_internals(load_model(folder, 0, "checkpoint_final.pth", "cpu"), *case, [])
    assert inside.soft_label is None
    assert inside.meta_parameters == {}
    assert inside.single


def test_other_models_are_refused(tmp_path: Path):
    cascade = write_model(tmp_path / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres", cascade=True)
    with pytest.raises(ValueError, match="second stage of a cascade"):
        load_model(cascade, 0, "checkpoint_final.pth", "cpu")


def test_nearest_keeps_the_field_of_view():
    volume = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(nearest(volume, (3, 4)), volume)
    np.testing.assert_array_equal(nearest(volume, (6, 8)), volume.repeat(2, 0).repeat(2, 1))
    assert nearest(volume, (1, 2)).tolist() == [[5, 7]]


def test_report_shows_the_inside(model: Path, case: tuple[Case, Path], tmp_path: Path, capsys):
    dataset = {
        "channel_names": dict(enumerate(CHANNELS)),
        "regions_class_order": [1, 2, 3],
        "file_ending": ".nii.gz",
        "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": [3]},
    }
    write_evaluation(
        tmp_path / "e",
        ["a"],
        dataset,
        {"model": {"folder": str(model), "folds": ["0"]}, "source": {"labels": str(case[1].parent)}},
    )
    for name in ("t1", "+".join(CHANNELS)):
        folder = tmp_path / "e" / "predictions" / name
        folder.mkdir(parents=True)
        (folder / "a.nii.gz").write_bytes(case[1].read_bytes())
    assert (
        cli.main(
            [
                "report",
                str(tmp_path / "e"),
                "-i",
                str(tmp_path),
                "--internals",
                "--dataset_json",
                str(model / "dataset.json"),
            ]
        )
        == 0
    )
    info = {"model": {"folder": str(model), "folds": ["0"]}, "source": {"labels": str(case[1].parent)}}
    write_evaluation(tmp_path / "two", ["a", "b"], dataset, info)
    arguments = ["report", tmp_path / "two", "-i", tmp_path, "--cases", "a", "--internals", "b"]
    arguments += ["--predictions", tmp_path / "e" / "predictions", "--dataset_json", model / "dataset.json"]
    assert cli.main(list(map(str, arguments))) == 2
    assert f"error: --internals: {tmp_path} has no image of case b. Name another" in capsys.readouterr().err
    text = (tmp_path / "e" / "report.html").read_text()
    for heading in ("a: each modality alone, soft label, fused prediction", "a: confidence", "a: features"):
        assert f"<h3>{heading}</h3>" in text
    assert "w_f 0." in text
