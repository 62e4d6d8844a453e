from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import BRATS_JSON, configuration, make_trainer, plans, write_dataset
from fusion_cases import own_designs
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_mgml.config import MGMLConfig
from nnunetv2_mgml.training import TRAINERS, nnUNetTrainerMGML
from nnunetv2_mgml.training.base import zero_absent
from nnunetv2_mgml.training.subset_validation import validate_subsets
from nnunetv2_mgml.training.training_log import LOG_NAME, TrainingLog, read_log
from nnunetv2_mgml.training.variants import (
    nnUNetTrainerMGML_baseline,
    nnUNetTrainerMGML_fixedSoftLabels,
    nnUNetTrainerMGML_noConsistency,
    nnUNetTrainerMGML_noMetaAMF,
    nnUNetTrainerModalityDropout,
)

VARIANTS = (nnUNetTrainerMGML, nnUNetTrainerMGML_baseline, nnUNetTrainerMGML_fixedSoftLabels,
            nnUNetTrainerMGML_noConsistency, nnUNetTrainerMGML_noMetaAMF)
LABELS_JSON: dict[str, Any] = {**BRATS_JSON, "labels": {"background": 0, "edema": 1, "core": 2, "enhancing": 3}}
LABELS_JSON.pop("regions_class_order")


def synthetic_batch(trainer: Any, spatial: tuple[int, ...] | None = None) -> dict[str, Any]:
    """A batch as our loader yields it, targets at the resolutions of deep supervision."""
    gen = torch.Generator().manual_seed(0)
    spatial = spatial or tuple(trainer.configuration_manager.patch_size)
    labels = torch.randint(0, 4, (2, 1, *spatial), generator=gen)
    if trainer.label_manager.has_ignore_label:
        labels[:, :, :2] = trainer.label_manager.ignore_label
    target = labels
    if trainer.label_manager.has_regions:
        regions = list(trainer.label_manager.foreground_regions)
        if trainer.label_manager.has_ignore_label:
            regions.append(trainer.label_manager.ignore_label)
        target = torch.cat([torch.isin(labels, torch.tensor(r)) for r in regions], 1)
    scales = trainer._get_deep_supervision_scales()
    targets = [target[(..., *[slice(None, None, round(1 / f)) for f in scale])] for scale in scales]
    count = trainer.num_input_channels
    return {"data": torch.randn(2, count, *spatial, generator=gen), "target": targets,
            "available": torch.ones(2, trainer.num_modalities, dtype=torch.bool),
            "modality_mask": torch.tensor([[True, False, True, True], [False, True, False, False]]),
            "keys": ["a", "b"]}


def test_a_run_writes_what_a_user_looks_for(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders, absent={"case_1": 3}))
    trainer.run_training()
    folder = Path(trainer.output_folder)
    assert {"checkpoint_best.pth", "checkpoint_final.pth", "progress.png", "mgml_progress.png", LOG_NAME} <= \
        {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.tmp"))
    rows = read_log(folder / LOG_NAME)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    terms = ("segmentation", "modality", "soft_label", "consistency", "meta", "total")
    dice = ("whole_tumor", "tumor_core", "enhancing_tumor", "mean")
    needed = {"lr", "t1", "t2", "w_f", "beta", "alpha", "val_loss", "seconds", *(f"train_{t}" for t in terms),
              *(f"pseudo_dice_{d}" for d in dice)}
    assert needed <= set(rows[-1])
    assert all(np.isfinite(row[name]) for row in rows for name in ("train_total", "train_soft_label", "w_f", "beta"))
    assert "1 of 2 training cases are incomplete" in Path(trainer.log_file).read_text()


def test_inference_rebuilds_the_network_from_the_folder_alone(nnunet_folders: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 1, "fusion": "mean"})
    trainer.run_training()
    saved = json.loads((Path(trainer.output_folder_base) / "plans.json").read_text())
    assert MGMLConfig.from_plans(saved) == trainer.config
    monkeypatch.delenv("nnUNet_preprocessed")
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parents[1] / "nnunetv2_mgml" / "ext"))
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    x = torch.randn(1, 4, 16, 16, 16)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(x), trainer.network(x))


def test_checkpoint_keeps_training_state_apart(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 1})
    trainer.run_training()
    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert set(checkpoint["network_weights"]) == set(trainer.network.state_dict())
    assert sum(v.numel() for v in checkpoint["mgml"]["meta_network"].values()) == \
        sum(p.numel() for p in trainer.meta_network.parameters())
    assert sum(p.numel() for p in trainer.meta_network.parameters()) < 3000


def test_resume_equals_an_uninterrupted_run(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans_dict = write_dataset(nnunet_folders)
    whole = make_trainer(nnUNetTrainerMGML, plans_dict, {"save_every": 1})
    whole.run_training()
    log = [list(row.values()) for row in read_log(Path(whole.output_folder) / LOG_NAME)]
    monkeypatch.setenv("nnUNet_results", str(nnunet_folders / "again"))

    class InterruptedRunError(RuntimeError):
        pass

    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"save_every": 1})
    epoch_end = first.on_epoch_end

    def interrupt() -> None:
        epoch_end()
        if first.current_epoch == 2:
            raise InterruptedRunError

    monkeypatch.setattr(first, "on_epoch_end", interrupt)
    with pytest.raises(InterruptedRunError):
        first.run_training()
    second = make_trainer(nnUNetTrainerMGML, plans_dict, {"save_every": 1}, resume=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    assert second.current_epoch == 2
    second.run_training()
    for ours, theirs in ((second.network, whole.network), (second.meta_network, whole.meta_network)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    names = list(read_log(Path(second.output_folder) / LOG_NAME)[0])
    seconds = names.index("seconds")
    again = [list(row.values()) for row in read_log(Path(second.output_folder) / LOG_NAME)]
    for row, expected in zip(again, log, strict=True):
        del row[seconds], expected[seconds]
        assert row == expected


def test_resume_with_another_soft_label_is_refused(nnunet_folders: Path) -> None:
    plans_dict = write_dataset(nnunet_folders)
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1})
    first.run_training()
    other = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1, "soft_label": "mean"})
    with pytest.raises(ValueError, match="soft_label=meta_amf"):
        other.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))


@pytest.mark.parametrize("cls", VARIANTS)
def test_variants_fix_their_options(cls: type[nnUNetTrainerMGML], nnunet_folders: Path) -> None:
    trainer = make_trainer(cls, write_dataset(nnunet_folders))
    trainer.initialize()
    result = trainer.train_step(synthetic_batch(trainer))
    assert np.isfinite(result["loss"])
    expected = {
        nnUNetTrainerMGML: (True, True, True), nnUNetTrainerMGML_baseline: (False, False, False),
        nnUNetTrainerMGML_fixedSoftLabels: (True, False, False),
        nnUNetTrainerMGML_noConsistency: (True, False, True), nnUNetTrainerMGML_noMetaAMF: (False, True, False)}[cls]
    assert (trainer.config.uses_soft_label, trainer.config.uses_teacher, trainer.meta_network is not None) == expected


def test_every_fusion_design_has_a_baseline_and_an_mgml_trainer() -> None:
    by_design: dict[str, set[bool]] = {}
    for trainer in TRAINERS.values():
        if issubclass(trainer, nnUNetTrainerMGML) and "fusion" in trainer.config_overrides:
            config = trainer.resolve_config({})
            by_design.setdefault(config.fusion, set()).add(config.uses_soft_label and config.uses_teacher)
    published = set(own_designs()) - {"mean", "concat"}
    assert by_design == {design: {True, False} for design in published}


@pytest.mark.parametrize("layout", ["2d", "residual", "anisotropic", "labels", "ignore", "label_ignore", "cascade",
                                    "teacher_view", "bfloat16", "adam", "no_deep_supervision"])
def test_layouts_train(layout: str, nnunet_folders: Path) -> None:
    """One step on each kind of dataset and plan: finite loss, and every weight of the network moves."""
    dataset_json, options = copy.deepcopy(BRATS_JSON), {}
    plans_dict = plans()
    if layout == "2d":
        plans_dict = plans(patch=(16, 16))
    elif layout == "residual":
        plans_dict = plans(residual=True)
    elif layout == "anisotropic":
        plans_dict = plans(patch=(6, 16, 16), strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]],
                           kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])
    elif layout in ("labels", "label_ignore"):
        dataset_json = copy.deepcopy(LABELS_JSON)
    elif layout == "teacher_view":
        options = {"teacher_augmentation": True}
    elif layout == "bfloat16":
        options = {"cpu_bfloat16": True}
    elif layout == "adam":
        options = {"optimizer": "adam", "initial_lr": 2e-4}
    if layout in ("ignore", "label_ignore"):
        dataset_json["labels"]["ignore"] = 4
    if layout == "cascade":
        (config,) = plans_dict["configurations"].values()
        plans_dict["configurations"] = {"3d_cascade_fullres": {**config, "previous_stage": "3d_lowres"},
                                        "3d_lowres": {**configuration(), "next_stage": "3d_cascade_fullres"}}
    write_dataset(nnunet_folders, plans_dict=plans() if layout == "cascade" else copy.deepcopy(plans_dict),
                  dataset_json=dataset_json)
    trainer = make_trainer(nnUNetTrainerMGML, plans_dict, options, dataset_json)
    if layout == "no_deep_supervision":
        trainer.enable_deep_supervision = False
    trainer.initialize()
    trainer.current_epoch = 2  # past the warm-up
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    if layout == "no_deep_supervision":
        trainer.enable_deep_supervision = True
        batch = synthetic_batch(trainer)
        trainer.enable_deep_supervision = False
        batch["target"] = batch["target"][0]
    else:
        batch = synthetic_batch(trainer)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    weights = [name for name, p in trainer.network.named_parameters() if p.ndim > 1]
    untrained = {"decoder.seg_layers.0.weight"}  # nnU-Net's lowest deep supervision output has weight 0
    assert {name for name in weights if torch.equal(dict(trainer.network.named_parameters())[name], before[name])} <= \
        untrained
    trainer.network.eval()
    result = trainer.validation_step(batch)
    assert np.isfinite(result["loss"])
    assert len(result["tp_hard"]) == 3


def test_validation_sees_only_the_subset(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders))
    trainer.initialize()
    trainer.network.eval()
    losses = []
    for content in (0.0, 100.0):
        batch = synthetic_batch(trainer)
        batch["data"][0, 1] = content
        batch["data"][1, [0, 2, 3]] = content
        with torch.no_grad():
            losses.append(trainer.validation_step(batch)["loss"])
    assert losses[0] == losses[1]
    assert trainer.bare_network._availability is None


def test_modality_dropout_trains_the_stock_network_on_visible_channels(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerModalityDropout, write_dataset(nnunet_folders), {"num_epochs": 1})
    trainer.run_training()
    assert type(trainer.network).__name__ == "PlainConvUNet"
    assert np.isfinite(read_log(Path(trainer.output_folder) / LOG_NAME)[0]["train_total"])
    x, mask = torch.randn(2, 5, 3, 3, 3), torch.tensor([[True, False], [False, True]])
    shown = zero_absent(x, mask)
    assert torch.equal(shown[0, 0], x[0, 0])
    assert not shown[0, 1].any()
    assert torch.equal(shown[:, 2:], x[:, 2:])


def test_final_validation_tells_the_network_what_each_case_has(nnunet_folders: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders, absent={"case_1": 2}), {"num_epochs": 1})
    trainer.run_training()
    told: list[Any] = []
    original = trainer.bare_network.set_availability
    monkeypatch.setattr(trainer.bare_network, "set_availability", lambda subset: (told.append(subset),
                                                                                 original(subset)))
    trainer.perform_actual_validation()
    assert [subset for subset in told if subset is not None] == [(True,) * 4, (True, True, False, True)]
    assert told[-1] is None
    summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"(1, 2, 3)", "(2, 3)", "(3,)"}


def test_one_modality_is_refused_with_the_reason(nnunet_folders: Path) -> None:
    dataset_json = {**BRATS_JSON, "channel_names": {"0": "T1"}}
    plans_dict = write_dataset(nnunet_folders, dataset_json, plans_dict=plans(modalities=1))
    trainer = make_trainer(nnUNetTrainerMGML, plans_dict, dataset_json=dataset_json)
    with pytest.raises(ValueError, match=r"needs at least two modalities.*Use nnUNetTrainer"):
        trainer.initialize()


def test_plans_no_trainer_has_completed_are_refused() -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    manager = PlansManager(plans())
    with pytest.raises(ValueError, match="num_classes"):
        nnUNetTrainerMGML.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 4, 3)


def test_nnunets_own_names_are_options(nnunet_folders: Path) -> None:
    options = {"num_epochs": 7, "num_iterations_per_epoch": 11, "num_val_iterations_per_epoch": 3, "initial_lr": 0.02,
               "weight_decay": 1e-3, "oversample_foreground_percent": 0.5, "save_every": 4}
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), options)
    assert {name: getattr(trainer, name) for name in options} == options
    stock = make_trainer(nnUNetTrainerMGML, plans(), dict.fromkeys(options))
    assert (stock.num_epochs, stock.num_iterations_per_epoch, stock.initial_lr) == (1000, 250, 0.01)


def test_another_fold_of_another_network_is_refused(nnunet_folders: Path) -> None:
    """plans.json is shared by the folds: overwriting it would make the earlier fold unloadable."""
    plans_dict = write_dataset(nnunet_folders)
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1})
    first.run_training()
    saved = (Path(first.output_folder_base) / "plans.json").read_text()
    other = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1, "fusion": "mean", "width_factor": 0.5})
    other.output_folder = str(Path(other.output_folder_base) / "fold_1")
    with pytest.raises(ValueError, match=r"fusion was 'concat', is now 'mean'; width_factor .*--plans_name"):
        other.on_train_start()
    assert (Path(first.output_folder_base) / "plans.json").read_text() == saved
    with pytest.raises(ValueError, match=r"trained with another network: fusion was 'concat'"):
        other.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    longer = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 2, "consistency_weight": 0.5})
    longer.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    assert longer.current_epoch == 1


def test_both_optimisers_under_one_gradient_scaler(nnunet_folders: Path) -> None:
    """A finite step moves network and MetaNetwork; a step with infinite gradients moves neither."""
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders))
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
    trainer.current_epoch = 2

    def weights() -> list[torch.Tensor]:
        return [p.detach().clone() for module in (trainer.network, trainer.meta_network) for p in module.parameters()]

    before = weights()
    trainer.train_step(synthetic_batch(trainer))
    after = weights()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.ndim > 1 and len(a) > 3)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    trainer.train_step(synthetic_batch(trainer))
    assert all(torch.equal(a, b) for a, b in zip(after, weights(), strict=True))


def test_no_table_over_subsets_without_raw_images_and_why(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 1})
    trainer.run_training()
    said = validate_subsets(trainer, trainer._weights_file)
    assert said.startswith("No table over all modality subsets:")
    assert "nnU-Net's own validation above is complete" in said
    assert "no checkpoint" in validate_subsets(trainer, None)
    trainer.fold = "all"
    assert "fold 'all'" in validate_subsets(trainer, "checkpoint_final.pth")


def test_a_retrained_fold_does_not_keep_the_old_report(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 1,
                                                                              "validate_subsets": False})
    trainer.run_training()
    report = Path(trainer.output_folder_base) / "subset_report.json"
    status = (Path(trainer.output_folder) / "checkpoint_final.pth").stat()
    content = {"folds": ["0"], "checkpoint": "checkpoint_final.pth", "subsets": {}, "channels": [],
               "checkpoint_size_and_time_ns": [[status.st_size, status.st_mtime_ns]]}
    report.write_text(json.dumps(content))
    trainer.perform_actual_validation()
    assert report.is_file()
    report.write_text(json.dumps({**content, "checkpoint_size_and_time_ns": [[1, 2]]}))
    trainer.perform_actual_validation()
    assert not report.exists()
    assert "Deleted subset_report.json" in Path(trainer.log_file).read_text()


def test_warm_up_is_linear(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 20})
    ramps = []
    for epoch, step in ((0, 0), (0, 1), (1, 0), (2, 0), (19, 1)):
        trainer.current_epoch, trainer._steps_in_epoch = epoch, step
        ramps.append(trainer.ramp)
    assert ramps == [0.0, 0.25, 0.5, 1.0, 1.0]


def test_log_is_rewritten_whole_and_resumes(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    for epoch in range(3):
        log.add({"a": 1.0})
        log.add({"a": 3.0})
        log.end_epoch({"epoch": epoch, **log.means()})
    log.end_epoch({"epoch": 3, "b": 5.0})
    resumed = TrainingLog(tmp_path)
    resumed.resume(2)
    assert resumed.rows == [{"epoch": 0, "a": 2.0}, {"epoch": 1, "a": 2.0}]
    with open(tmp_path / LOG_NAME) as file:
        assert next(csv.reader(file)) == ["epoch", "a", "b"]
