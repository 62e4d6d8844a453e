"""What a run leaves behind is enough: to resume it exactly, to predict, and to refuse what does not belong to it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY, make_trainer, plans, write_dataset
from loss_cases import meta_network_of
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from training_cases import run_until_epoch

from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.training import nnUNetTrainerMGML
from nnunetv2_mgml.training.compatibility import network_differences
from nnunetv2_mgml.training.epoch_log import LOG_NAME, TrainingLog, read_log
from nnunetv2_mgml.upstream.plain_errors import PlainError


def test_inference_rebuilds_the_network_from_the_folder_alone(
    nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 1, "fusion": "mean"})
    trainer.run_training()
    saved = json.loads((Path(trainer.output_folder_base) / "plans.json").read_text())
    assert Options.from_plans(saved) == trainer.options
    monkeypatch.delenv("nnUNet_preprocessed")
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parents[2] / "nnunetv2_mgml" / "ext"))
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    x = torch.randn(1, 4, 16, 16, 16)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(x), trainer.network(x))


def test_a_fold_is_not_drawn_from_test_cases(nnunet_folders: Path) -> None:
    """After ``mgml convert split`` the test cases are still in imagesTr, and preprocessed."""
    plans_dict = write_dataset(nnunet_folders, cases=5)
    folder = nnunet_folders / "preprocessed" / plans_dict["dataset_name"]
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_0", "case_1"], "val": ["case_2"]}]))
    (folder / "test_cases.json").write_text(json.dumps(["case_3", "case_4"]))
    for fold in (1, "all"):
        with pytest.raises(PlainError, match=f"Fold {fold} would be drawn .* test cases .case_3, case_4.* fold 0 only"):
            make_trainer(nnUNetTrainerMGML, plans_dict, fold=fold).run_training()
    for fold, warned in ((0, False), (1, True), ("all", False)):
        trainer = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1}, fold=fold)
        trainer.on_train_start()
        assert ("WARNING: " in Path(trainer.log_file).read_text()) is warned
        (folder / "test_cases.json").write_text("[]")


def test_checkpoint_keeps_training_state_apart(nnunet_folders: Path) -> None:
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 1})
    trainer.run_training()
    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert set(checkpoint["network_weights"]) == set(trainer.network.state_dict())
    assert sum(v.numel() for v in checkpoint["mgml"]["meta_network"].values()) == sum(
        p.numel() for p in meta_network_of(trainer.learner.objective).parameters()
    )
    assert sum(p.numel() for p in meta_network_of(trainer.learner.objective).parameters()) < 3000


def test_resume_equals_an_uninterrupted_run(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans_dict = write_dataset(nnunet_folders)
    whole = make_trainer(nnUNetTrainerMGML, plans_dict, {"save_every": 1})
    whole.run_training()
    log = [list(row.values()) for row in read_log(Path(whole.output_folder) / LOG_NAME)]
    monkeypatch.setenv("nnUNet_results", str(nnunet_folders / "again"))
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"save_every": 1})
    run_until_epoch(first, 2, monkeypatch)
    second = make_trainer(nnUNetTrainerMGML, plans_dict, {"save_every": 1}, resume=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
    assert second.current_epoch == 2
    second.run_training()
    for ours, theirs in ((second.network, whole.network), (second.learner.objective, whole.learner.objective)):
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


@pytest.mark.parametrize(("before", "now"), [("adam", "sgd"), ("sgd", "adam")])
def test_resume_with_another_optimizer_is_refused_but_not_validation(
    before: str, now: str, nnunet_folders: Path
) -> None:
    """nnU-Net's --c loads and trains, its --val only loads and predicts."""
    plans_dict = write_dataset(nnunet_folders)
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1, "optimizer": before})
    first.run_training()
    files = {path: path.read_bytes() for path in Path(first.output_folder_base).rglob("*.json")}
    other = make_trainer(
        nnUNetTrainerMGML, plans_dict, {"num_epochs": 2, "optimizer": now, "validate_subsets": False}, resume=True
    )
    other.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    with pytest.raises(ValueError, match=rf"with optimizer={before}, this trainer has optimizer={now}; use the same"):
        other.run_training()
    assert {path: path.read_bytes() for path in Path(first.output_folder_base).rglob("*.json")} == files
    other.perform_actual_validation()
    same = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 2, "optimizer": before}, resume=True)
    same.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    same.run_training()
    assert same.current_epoch == 2


def test_resuming_reads_the_file_into_memory_once(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net does, onto the training's device; what we look up stays on the disk."""
    plans_dict = write_dataset(nnunet_folders)
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1})
    first.run_training()
    second = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 2}, resume=True)
    loads: list[dict[str, Any]] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **kwargs: (loads.append(kwargs), load(file, **kwargs))[1])
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    whole = [kwargs for kwargs in loads if not kwargs.get("mmap")]
    assert len(loads) > len(whole) == 1
    assert all(kwargs["map_location"] == "cpu" for kwargs in loads if kwargs.get("mmap"))


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


@pytest.mark.parametrize(("fusion", "follows"), [("mmformer", True), ("concat", False)])
def test_a_patch_that_a_design_is_sized_by_makes_another_network(fusion: str, follows: bool) -> None:
    """Of the same architecture: position encodings have an entry per voxel of the bottleneck."""
    small, large = ({**plans(), "mgml": {"config": {**TINY, "fusion": fusion}}} for _ in range(2))
    large["configurations"]["3d_fullres"]["patch_size"] = [16, 16, 24]
    found = network_differences(small, large, "3d_fullres")
    assert found == (
        ["patch_size of 3d_fullres was [16, 16, 16], is now [16, 16, 24], and the fusion follows it"] if follows else []
    )


def test_an_inherited_architecture_is_compared() -> None:
    before, now = plans(), plans()
    now["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 64]
    for each in (before, now):
        each["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres"}
    assert "3d_cascade_fullres differs" in network_differences(before, now, "3d_cascade_fullres")[0]
    assert network_differences(before, before, "3d_cascade_fullres") == []


def test_a_retrained_fold_does_not_keep_the_old_report(nnunet_folders: Path) -> None:
    trainer = make_trainer(
        nnUNetTrainerMGML, write_dataset(nnunet_folders), {"num_epochs": 1, "validate_subsets": False}
    )
    trainer.run_training()
    report = Path(trainer.output_folder_base) / "subset_report.json"
    status = (Path(trainer.output_folder) / "checkpoint_final.pth").stat()
    content = {
        "folds": ["0"],
        "checkpoint": "checkpoint_final.pth",
        "subsets": {},
        "channels": [],
        "checkpoint_size_and_time_ns": [[status.st_size, status.st_mtime_ns]],
    }
    report.write_text(json.dumps(content))
    trainer.perform_actual_validation()
    assert report.is_file()
    report.write_text(json.dumps({**content, "checkpoint_size_and_time_ns": [[1, 2]]}))
    trainer.perform_actual_validation()
    assert not report.exists()
    assert "Deleted subset_report.json" in Path(trainer.log_file).read_text()


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
