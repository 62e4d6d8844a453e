"""``mgml check``: what it sees in data sets in which something is put."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from cohort_cases import CHANNELS, SHAPE, label, save, volume, write_raw

from nnunetv2_mgml.commands.check import describe
from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.dataset_conversion.splits import random_split
from nnunetv2_mgml.workflows.check import CheckRequest, check_dataset, outlying

DATASET = "Dataset045_Tiny"
CASES = tuple("abcdefghij")
REQUEST = CheckRequest(dataset=45, num_processes=1, show_progress=False)


@pytest.fixture
def raw(nnunet_folders: Path) -> Path:
    """Ten cases, three without t1."""
    return write_raw(nnunet_folders / "raw" / DATASET, {case: ["t1"] for case in "abc"}, CASES)


def findings_of(raw: Path) -> dict[str, tuple[str, ...]]:
    return check_dataset(REQUEST).findings


def test_counts_splits_and_proposals(raw: Path, nnunet_folders: Path) -> None:
    save(volume(99), raw / "imagesTs" / "t_0002.nii.gz")
    (nnunet_folders / "preprocessed" / DATASET).mkdir()
    split = [{"train": list("defghij"), "val": list("abc")}]
    (nnunet_folders / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(split))
    check = check_dataset(REQUEST)
    assert check.findings == {}
    assert check.count("training") == {"ct": 10, "t1": 7, "flair": 10}
    assert check.count("fold 0 validation") == {"ct": 3, "t1": 0, "flair": 3}
    assert check.count("imagesTs") == {"ct": 0, "t1": 0, "flair": 1}
    assert check.combinations() == {"ct+t1+flair": 7, "ct+flair": 3}
    commands = [proposal.command for proposal in check.proposals]
    assert commands[0] == "mgml plan -d 45 --set mask_sampling=fixed"
    seed = next(int(c.split("--seed ")[1].split()[0]) for c in commands if c.startswith("mgml convert split -d 45"))
    proposed = random_split(CASES, (4, 1, 0), seed)
    assert all(any(case not in "abc" for case in part) for part in (proposed.train, proposed.val))
    assert not any("passion" in command for command in commands)
    text = "\n".join(describe(check))
    assert "10 training cases, 3 of them incomplete" in text
    assert "nothing that these cases show" in text
    assert "Proposals (mgml plan: once nnUNetv2_plan_and_preprocess -d 45 is done):" in text
    (nnunet_folders / "preprocessed" / DATASET / "nnUNetPlans.json").write_text("{}")
    assert "\nProposals:" in "\n".join(describe(check_dataset(REQUEST)))
    for case in "defg":
        (raw / "imagesTr" / f"{case}_0001.nii.gz").unlink()
    assert any("rebalancing=passion" in p.command for p in check_dataset(REQUEST).proposals)


def test_the_proposed_commands_are_ours(raw: Path, nnunet_folders: Path) -> None:
    """What is proposed for the sampler is accepted as options."""
    import shlex

    from nnunetv2_mgml.objective import Options
    from nnunetv2_mgml.plans.options import parse_assignments

    for case in "defg":
        (raw / "imagesTr" / f"{case}_0001.nii.gz").unlink()
    plans = [p.command for p in check_dataset(REQUEST).proposals if p.command.startswith("mgml plan")]
    assert len(plans) == 2
    for command in plans:
        words = shlex.split(command)
        Options().updated(parse_assignments(words[words.index("--set") + 1 :]))


def test_the_proposal_shows_modalities_as_often_as_cases_have_them(raw: Path, nnunet_folders: Path) -> None:
    import shlex

    from nnunetv2_mgml.dataloading.masking import build_sampler
    from nnunetv2_mgml.objective import Options
    from nnunetv2_mgml.plans.options import parse_assignments

    check = check_dataset(REQUEST)
    words = shlex.split(check.proposals[0].command)
    options = Options().updated(parse_assignments(words[words.index("--set") + 1 :]))
    available = np.repeat(np.array(list(check.subsets.values())), 200, axis=0)
    seen = build_sampler(options.sampling, check.channels).sample(available, np.random.default_rng(0))
    assert seen.mean(axis=0) == pytest.approx([1.0, 0.7, 1.0], abs=0.03)


def test_strangers_and_files_of_another_form(
    raw: Path, nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "imagesTs").mkdir()
    for name in (".DS_Store", "Thumbs.db"):
        (raw / "imagesTs" / name).touch()
    assert check_dataset(REQUEST).test_subsets == {}
    folder = nnunet_folders / "preprocessed" / DATASET
    folder.mkdir()
    for text, message in (
        ('[{"train": ["a", "b"]}]', "must hold a list of folds"),
        ('[{"train": ["a"], "val": "b"}]', "must hold a list of folds"),
        ('[{"train": ["a"', "is not valid JSON"),
    ):
        (folder / "splits_final.json").write_text(text)
        assert main(["check", "45", "-np", "0"]) == 2
        assert f"{folder / 'splits_final.json'} {message}" in capsys.readouterr().err
    (folder / "splits_final.json").unlink()
    (raw / "case_sites.json").write_text('["A"]')
    assert main(["check", "45", "-np", "0"]) == 2
    assert f"{raw / 'case_sites.json'} must map cases to sites" in capsys.readouterr().err


def test_a_modality_that_no_case_has(nnunet_folders: Path) -> None:
    """No command of ours takes it out of a data set, so none is printed."""
    channels = ("ct", "t1", "apparentdiffusion")
    write_raw(nnunet_folders / "raw" / DATASET, dict.fromkeys("ab", channels[2:]), "ab", channels)
    check = check_dataset(REQUEST)
    (proposal,) = check.proposals
    assert "no training case has apparentdiffusion" in proposal.why
    assert not proposal.command
    lines = describe(check)
    assert lines[-1] == f"  {proposal.why}"
    header, counts = lines[2], lines[3]
    assert len(header) == len(counts)


def test_copies_coverage_placeholders_and_outliers(raw: Path) -> None:
    images = raw / "imagesTr"
    short = volume(500)
    short[:, :7] = 0
    save(short, images / "d_0002.nii.gz")
    save(volume(31, 140.0), images / "e_0001.nii.gz")
    save(volume(31, 140.0), images / "e_0002.nii.gz")
    save(volume(42, 40.0), images / "f_0000.nii.gz")
    copy = volume(42, 40.0)
    copy[copy != 0] = 2 * copy[copy != 0] + 100
    save(copy, images / "f_0001.nii.gz")
    save(np.full(SHAPE, -1000, np.float32), images / "g_0000.nii.gz")
    save(volume(70, 4000.0), images / "h_0000.nii.gz")
    save(volume(82, 240.0), images / "j_0002.nii.gz")
    save(np.zeros(SHAPE, np.uint8), raw / "labelsTr" / "i.nii.gz")
    findings = findings_of(raw)
    assert sorted(findings) == ["d", "e", "f", "g", "h", "i", "j"]
    assert findings["d"][0].startswith("flair covers less than the other sequences")
    assert findings["e"][0] == "t1 and flair are the same volume, voxel for voxel"
    assert findings["f"][0].startswith("ct and t1 are one volume up to brightness and contrast")
    assert findings["g"][0] == "ct has one value everywhere and counts as absent"
    assert findings["h"][0].startswith("unusual intensities, in robust standard deviations from the median: ct +")
    assert findings["i"][0] == "the label map is empty"
    assert findings["j"][0] == "flair is the same volume as flair of i"
    check = check_dataset(REQUEST)
    assert check.placeholders == {"g": ("ct",)}
    assert check.count("training")["ct"] == 9
    assert check.proposals[0].command == "mgml convert raw -d 45"


def test_headers_and_damage(raw: Path) -> None:
    path = raw / "imagesTr" / "d_0000.nii.gz"
    image = nibabel.load(path)
    other = image.affine.copy()
    other[0, 3] += 5
    image.header.set_sform(other, code=1)
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), None, image.header), path)
    skewed = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(volume(3).T, skewed), raw / "imagesTr" / "e_0001.nii.gz")
    (raw / "imagesTr" / "f_0001.nii.gz").write_bytes(b"")
    save(label(shape=SHAPE), raw / "labelsTr" / "g.nii.gz", spacing=(1.0, 1.0, 2.0))
    findings = findings_of(raw)
    assert any("sform and qform disagree (up to 5 mm)" in text for text in findings["d"])
    assert any("skewed axes" in text for text in findings["e"])
    assert any("f_0001.nii.gz" in text for text in findings["f"])
    assert any(text.startswith("the label map is not on the grid of the images") for text in findings["g"])


def test_what_missingness_goes_with(nnunet_folders: Path) -> None:
    """T1 is there at site A only, where lesions are large and have a second label."""
    cases = [f"c{i:02d}" for i in range(20)]
    raw = write_raw(nnunet_folders / "raw" / DATASET, {case: ["t1"] for case in cases[10:]}, cases)
    for case in cases[:10]:
        big = label(1)
        big[4:10, 4:12, 4:13] = 1
        big[6, 6, 6] = 2
        save(big, raw / "labelsTr" / f"{case}.nii.gz")
    (raw / "case_sites.json").write_text(json.dumps({c: "AB"[i >= 10] for i, c in enumerate(cases)}))
    check = check_dataset(REQUEST)
    assert {(a.modality, a.variable) for a in check.associations} == {
        ("t1", "label 2"),
        ("t1", "volume"),
        ("t1", "site"),
    }
    text = "\n".join(describe(check))
    assert "label 2 is in 100% of the cases with t1 and in 0% of those without (p < 0.001)" in text
    assert "site: A 100%, B 0%" in text


def test_cases_without_label_map_and_label_maps_without_case(raw: Path) -> None:
    """nnU-Net stops at the first of them."""
    (raw / "labelsTr" / "d.nii.gz").unlink()
    (raw / "labelsTr" / "e.nii.gz").rename(raw / "labelsTr" / "zz.nii.gz")
    found = findings_of(raw)
    assert set(found) == {"d", "e", "zz"}
    assert "no label map" in found["d"][0]
    assert "no image in imagesTr" in found["zz"][0]
    (raw / "imagesTr" / "f_0000.nii.gz").unlink()
    (raw / "imagesTr" / "f_0001.nii.gz").unlink()
    (raw / "imagesTr" / "f_0002.nii.gz").unlink()
    assert any("numTraining 10, but there are 9" in p.why for p in check_dataset(REQUEST).proposals)


def test_spacing_of_tiff_is_in_the_file_of_the_case(nnunet_folders: Path) -> None:
    """Of its images as well as of its label map, as nnU-Net reads them."""
    folder = nnunet_folders / "raw" / DATASET
    raw = write_raw(folder, cases=("a", "b"), file_ending=".tif")
    for file in [*raw.glob("*Tr/*.nii.gz")]:
        tifffile.imwrite(
            file.with_name(file.name.replace(".nii.gz", ".tif")), sitk.GetArrayFromImage(sitk.ReadImage(file))
        )
        file.unlink()
    for case in ("a", "b"):
        for part in ("imagesTr", "labelsTr"):
            (raw / part / f"{case}.json").write_text('{"spacing": [3, 0.5, 0.5]}')
    check = check_dataset(REQUEST)
    assert check.findings == {}
    assert check.cases[0].label_ml == {1: pytest.approx(64 * 0.75 / 1000)}


def test_an_ignore_label_is_no_tissue_and_an_unread_label_map_no_absence(nnunet_folders: Path) -> None:
    """The cases without T1 have an ignore label, then label maps that cannot be read, and the same lesion as all."""
    cases = [f"c{i:02d}" for i in range(20)]
    labels = {"background": 0, "lesion": 1, "ignore": 2}
    raw = write_raw(nnunet_folders / "raw" / DATASET, {case: ["t1"] for case in cases[10:]}, cases, labels=labels)
    for case in cases[10:]:
        sparse = label(1)
        sparse[:4] = 2
        save(sparse, raw / "labelsTr" / f"{case}.nii.gz")
    check = check_dataset(REQUEST)
    assert check.associations == ()
    assert check.cases[10].label_ml is not None
    assert set(check.cases[10].label_ml) == {1, 2}
    for case in cases[10:]:
        (raw / "labelsTr" / f"{case}.nii.gz").write_bytes(b"")
    check = check_dataset(REQUEST)
    assert check.cases[10].label_ml is None
    assert check.associations == ()


def test_the_command_writes_json_and_a_page(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "45", "-o", str(tmp_path / "out"), "-np", "1"]) == 0
    assert "combinations" in capsys.readouterr().out.lower()
    content = json.loads((tmp_path / "out" / "check.json").read_text())
    assert content["channels"] == list(CHANNELS)
    assert content["cases"]["a"]["modalities"] == ["ct", "flair"]
    assert (tmp_path / "out" / "check.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["check", DATASET, "--json", "-np", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == content
    assert main(["check", "46"]) == 2
    assert "There is no dataset 46" in capsys.readouterr().err


def test_outlying() -> None:
    values = [10.0, 11, 9, 10, 10.5, 9.5, 10.2, 300]
    assert [abs(x) > 6 for x in outlying(values)] == [False] * 7 + [True]
    assert not outlying(values[:7]).any()
    assert not outlying([5.0] * 20).any()
    assert outlying([-1.0, 0, 1, 0.5, -0.5, 0.2, 0.1, -400])[-1] < -6


def test_a_modality_nobody_has_and_more_findings_than_are_shown(nnunet_folders: Path) -> None:
    raw = write_raw(nnunet_folders / "raw" / DATASET, dict.fromkeys(CASES, ("t1",)), CASES)
    for case in CASES:
        save(np.zeros(SHAPE, np.uint8), raw / "labelsTr" / f"{case}.nii.gz")
    check = check_dataset(REQUEST)
    assert [p.why for p in check.proposals] == [
        "no training case has t1, so nothing can be learned of it: convert again without it (fewer --modalities)"
    ]
    text = describe(check, most=4)
    assert "Findings (10):" in text
    assert "  and 6 more (-o writes all of them to check.json)" in text
