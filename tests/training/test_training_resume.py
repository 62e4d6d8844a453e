"""What a run leaves behind is enough: to resume it exactly, to predict, and to refuse what does not belong to it."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BRATS_JSON, REGIONS, TINY, make_trainer, plans, write_dataset
from loss_cases import meta_network_of
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from training_cases import run_until_epoch

from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans.options import NetworkOptions
from nnunetv2_mgml.training import nnUNetTrainerMGML, nnUNetTrainerModalityDropout
from nnunetv2_mgml.training.compatibility import changed_meaning, network_differences, options_of_model
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


@pytest.mark.parametrize("steps", [{}, {"num_iterations_per_epoch": 3, "complete_every": 2}])
def test_resume_equals_an_uninterrupted_run(
    steps: dict[str, int], nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans_dict, options = write_dataset(nnunet_folders), {"save_every": 1, **steps}
    whole = make_trainer(nnUNetTrainerMGML, plans_dict, options)
    whole.run_training()
    log = [list(row.values()) for row in read_log(Path(whole.output_folder) / LOG_NAME)]
    monkeypatch.setenv("nnUNet_results", str(nnunet_folders / "again"))
    first = make_trainer(nnUNetTrainerMGML, plans_dict, options)
    run_until_epoch(first, 2, monkeypatch)
    second = make_trainer(nnUNetTrainerMGML, plans_dict, options, resume=True)
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


def with_names(channels: list[str], labels: dict[str, Any]) -> dict[str, Any]:
    return {**BRATS_JSON, "channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": labels}


BACKWARDS = with_names(["Flair", "T2", "T1ce", "T1"], REGIONS)
OTHER_REGIONS = with_names(
    ["T1", "T1ce", "T2", "Flair"], {**dict([*REGIONS.items()][:2]), "core": [2], "tumor_core": [3]}
)
FEWER = {**with_names(["T1", "T1ce", "T2", "Flair"], dict([*REGIONS.items()][:-1])), "regions_class_order": [1, 2]}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (BACKWARDS, "the channels were t1, t1ce, t2, flair, are now flair, t2, t1ce, t1"),
        (
            OTHER_REGIONS,
            "the labels were whole_tumor, tumor_core, enhancing_tumor, are now whole_tumor, core, tumor_core",
        ),
        (FEWER, "are now whole_tumor, tumor_core"),
    ],
)
def test_other_channels_or_labels_are_another_network(nnunet_folders: Path, other: dict[str, Any], words: str) -> None:
    """By name: weights would be used for what they were not trained on."""
    plans_dict = write_dataset(nnunet_folders)
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1, "validate_subsets": False})
    first.run_training()
    saved = (Path(first.output_folder_base) / "dataset.json").read_text()
    now = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 2}, other)
    with pytest.raises(ValueError, match=f"trained with another network: .*{words}"):
        now.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    now.output_folder = str(Path(now.output_folder_base) / "fold_1")
    with pytest.raises(ValueError, match=f"holds fold_0 of another network: .*{words}.*another number"):
        now.on_train_start()
    assert (Path(first.output_folder_base) / "dataset.json").read_text() == saved


def test_a_renaming_means_the_same() -> None:
    before = with_names(["T1", "T1ce", "T2", "Flair"], {"background": 0, "edema": 1, "core": 2})
    for channels in (["t1n", "T1Gd", "T2w", "T2F"], ["T1", "T1ce", "T2", "DWI"]):
        assert changed_meaning(before, with_names(channels, {"background": 0, "ED": 1, "core": 2})) == []
    swapped = with_names(["T1", "T1ce", "T2", "Flair"], {"background": 0, "core": 1, "edema": 2})
    assert changed_meaning(before, swapped) == ["the labels were edema, core, are now core, edema"]


def test_a_resume_on_another_split_is_refused_and_a_validation_on_it_warned_of(nnunet_folders: Path) -> None:
    """What it would be validated on may be what it was trained on."""
    plans_dict = write_dataset(nnunet_folders, cases=4)
    splits = nnunet_folders / "preprocessed" / plans_dict["dataset_name"] / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["case_0", "case_1"], "val": ["case_2"]}]))
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1, "validate_subsets": False})
    first.run_training()
    final = str(Path(first.output_folder) / "checkpoint_final.pth")
    stored = torch.load(final, weights_only=False)["init_args"]["plans"]["mgml"]["training_cases"]
    assert stored["number"] == 2
    assert "case_" not in json.dumps(stored)
    assert "training_cases" not in (Path(first.output_folder_base) / "plans.json").read_text()
    splits.write_text(json.dumps([{"train": ["case_1", "case_2", "case_3"], "val": ["case_0"]}]))
    second = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 2}, resume=True)
    second.load_checkpoint(final)
    with pytest.raises(PlainError, match=r"Fold 0 has other training cases .* \(3 now, 2 then\).*splits_final\.json"):
        second.run_training()
    second.perform_actual_validation()
    log = Path(second.log_file).read_text()
    assert "WARNING: Fold 0 has other training cases" in log
    assert "No table over all modality subsets: the split has changed" in log
    splits.write_text(json.dumps([{"train": ["case_1", "case_0"], "val": ["case_3"]}]))
    again = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 2, "validate_subsets": False}, resume=True)
    again.load_checkpoint(final)
    again.run_training()
    assert again.current_epoch == 2
    assert "other training cases" not in Path(again.log_file).read_text()


def test_a_resume_takes_the_weight_decay_of_its_plans_and_keeps_them(nnunet_folders: Path) -> None:
    plans_dict = write_dataset(nnunet_folders)
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {"num_epochs": 1, "validate_subsets": False})
    first.run_training()
    changed = {"num_epochs": 2, "validate_subsets": False, "weight_decay": 0.5}
    second = make_trainer(nnUNetTrainerMGML, plans_dict, changed, resume=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    assert {group["weight_decay"] for group in second.optimizer.param_groups} == {0.5}
    second.run_training()
    written = torch.load(Path(second.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert Options.from_plans(written["init_args"]["plans"]).training.weight_decay == 0.5


def test_a_model_that_wrote_its_form_down_before_steps_differed_keeps_it(tmp_path: Path) -> None:
    """The form was an option before it was the default's that changed."""

    def of_model(**config: Any) -> dict[str, Any]:
        (tmp_path / "plans.json").write_text(json.dumps({"mgml": {"version": "0.2.0", "config": config}}))
        return options_of_model(tmp_path)

    written = {name: NetworkOptions().as_dict()[name] for name in ("fusion_revision", "modality_decoder_scale")}
    written |= {"network_form": "multi_encoder", "conditional_norms": None}
    assert of_model(**written) == {"network_form": "multi_encoder", "complete_every": 1}
    assert of_model(**written, complete_every=None) == {}
    assert of_model(temperature=4.0)["network_form"] == "multi_encoder"


def test_stock_plans_continue_what_was_trained_on_them_before(nnunet_folders: Path) -> None:
    """nnU-Net's plans cannot say what an older model is; its folder does, for ``--c``, ``--val`` and other folds."""
    plans_dict = write_dataset(nnunet_folders)
    short = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1}
    network = {name: NetworkOptions().as_dict()[name] for name in ("fusion", "width_factor")}
    of_before = {"modality_decoder_scale": 0, "validate_subsets": False, "seed": None}
    first = make_trainer(nnUNetTrainerMGML, plans_dict, {**short, **network, **of_before})
    first.run_training()
    folder, final = Path(first.output_folder_base), Path(first.output_folder) / "checkpoint_final.pth"
    content = torch.load(final, weights_only=False)
    stored = json.loads((folder / "plans.json").read_text())
    for written in (content["init_args"]["plans"], stored):
        del written["mgml"]["config"]["modality_decoder_scale"]
    torch.save(content, final)
    (folder / "plans.json").write_text(json.dumps(stored))

    def on_stock_plans(fold: int) -> nnUNetTrainerMGML:
        given = {**copy.deepcopy(plans_dict), "continue_training": fold == 0}
        return nnUNetTrainerMGML(given, "3d_fullres", fold, BRATS_JSON, torch.device("cpu"))

    again = on_stock_plans(0)
    again.load_checkpoint(str(final))
    assert again.bare_network.modality_scale == 0
    assert network_differences(stored, on_stock_plans(1).plans_manager.plans, "3d_fullres") == []
    del stored["mgml"]["config"]["fusion_revision"]
    (folder / "plans.json").write_text(json.dumps(stored))
    assert on_stock_plans(1).options.network.fusion_revision == 1
    (folder / "plans.json").unlink()
    assert on_stock_plans(1).options.network.modality_decoder_scale is None


def test_a_stock_network_goes_by_nothing_of_ours(nnunet_folders: Path) -> None:
    plans_dict = write_dataset(nnunet_folders)
    first = make_trainer(nnUNetTrainerModalityDropout, plans_dict, {"num_epochs": 1, "validate_subsets": False})
    first.run_training()
    changed = {"num_epochs": 2, "fusion": "mean", "width_factor": 0.25, "soft_label": "none"}
    second = make_trainer(nnUNetTrainerModalityDropout, plans_dict, changed, resume=True)
    second.load_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    assert second.current_epoch == 1


@pytest.mark.parametrize(("fusion", "same"), [("concat", True), ("region_aware", False)])
def test_a_revision_counts_where_it_changed_the_design(fusion: str, same: bool) -> None:
    before, now = (
        {**plans(), "mgml": {"config": {**TINY, "fusion": fusion, "fusion_revision": revision}}} for revision in (1, 2)
    )
    assert network_differences(before, now, "3d_fullres") == ([] if same else ["fusion_revision was 1, is now 2"])


def test_the_scale_of_the_modality_decoder_counts_where_there_is_one() -> None:
    def found(now: int | None, **options: Any) -> list[str]:
        plans_of = ({**plans(), "mgml": {"config": {**TINY, **options, "modality_decoder_scale": s}}} for s in (1, now))
        return network_differences(*plans_of, "3d_fullres")

    assert found(None) == [], "what null means in a network of three stages"
    assert found(0) == ["modality_decoder_scale was 1, is now 0"]
    assert found(0, soft_label="none", modality_decoder_weight=0.0) == []


def test_conditional_norms_count_as_what_null_means() -> None:
    def found(before: bool | None, now: bool | None, norm: str = "InstanceNorm3d") -> list[str]:
        both = []
        for value in (before, now):
            content = {**plans(), "mgml": {"config": {**TINY, "conditional_norms": value}}}
            content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op"] = f"torch.nn.{norm}"
            both.append(content)
        return network_differences(*both, "3d_fullres")

    assert found(None, True) == found(True, None) == []
    assert found(None, False) == ["conditional_norms was True, is now False"]
    assert found(None, False, "BatchNorm3d") == []


def test_the_wiring_of_m2ftrans_counts_where_it_acts() -> None:
    def found(**options: Any) -> list[str]:
        before, now = (
            {
                **plans(),
                "mgml": {"config": {**TINY, "fusion": "m2ftrans", "fusion_options": options, "fusion_revision": r}},
            }
            for r in (1, 2)
        )
        return network_differences(before, now, "3d_fullres")

    assert found() == []
    assert found(channel_attention=True) == ["fusion_revision was 1, is now 2"]


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
