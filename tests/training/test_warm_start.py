"""Where a training starts: weights of other networks, matched by the names of modalities."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BRATS_JSON, configuration, make_trainer, network, options_with, plans, write_dataset
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.commands.warmstart import parse_use
from nnunetv2_mgml.network.conditioned_unet import ConditionedUNet
from nnunetv2_mgml.network.fusion import FusionDesign, base, fusion_designs
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionSpec
from nnunetv2_mgml.network.transfer import Donor, labels_of, transfer, unique_tensors
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML
from nnunetv2_mgml.training.variants import nnUNetTrainerModalityDropout, nnUNetTrainerModalityDropout_conditional
from nnunetv2_mgml.training.warm_start import read_donor

CHANNELS = ("t1", "t1ce", "t2", "flair")
OTHER_ORDER = ("flair", "t2", "t1", "t1ce")
LABELS = labels_of(BRATS_JSON)
OTHER_LABELS = labels_of({"labels": {"background": 0, "lesion": 1}})
WHOLE = {"width_factor": 1.0, "decoder_width_ratio": 1.0, "decoder_convs": None}


def dataset_json(channels: tuple[str, ...], labels: dict[str, Any] | None = None) -> dict[str, Any]:
    changed = copy.deepcopy(BRATS_JSON)
    changed["channel_names"] = {str(i): name for i, name in enumerate(channels)}
    if labels is not None:
        changed["labels"] = labels
        del changed["regions_class_order"]
    return changed


def stock_network(inputs: int = 4, heads: int = 3, residual: bool = False, convs: int = 1) -> torch.nn.Module:
    architecture = configuration(residual=residual)["architecture"]
    arguments = copy.deepcopy(architecture["arch_kwargs"])
    if convs > 1:
        arguments["n_conv_per_stage"] = [convs] * 3
        arguments["n_conv_per_stage_decoder"] = [convs] * 2
    return get_network_from_plans(
        architecture["network_class_name"],
        arguments,
        architecture["_kw_requires_import"],
        inputs,
        heads,
        allow_init=True,
        deep_supervision=False,
    )


def ours(fusion: str = "concat", modalities: int = 4, classes: int = 4, heads: int = 3, **options: Any) -> Any:
    return network(
        options_with(fusion=fusion, **{"width_factor": 1.0, "network_form": "multi_encoder", **options}),
        modalities=modalities,
        classes=classes,
        heads=heads,
    )


def donor(net: torch.nn.Module, channels: tuple[str, ...] | None = CHANNELS, labels: Any = LABELS) -> Donor:
    fusion = getattr(net, "fusion", None)
    return Donor(net.state_dict(), channels, labels, fusion and fusion.name)


def start(net: torch.nn.Module, given: Donor, channels: Any = CHANNELS, labels: Any = LABELS, **pairs: str) -> Any:
    taken = transfer(net, channels, labels, given, pairs)
    taken.apply(net)
    return taken


def of(taken: Any, part: str) -> Any:
    return next(entry for entry in taken.parts if entry.name == part)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_each_encoder_is_the_stock_encoder_with_the_column_of_its_modality(residual: bool) -> None:
    stock = stock_network(residual=residual)
    options = options_with(fusion="mean", width_factor=1.0, network_form="multi_encoder")
    ourselves = network(options, residual=residual)
    taken = start(ourselves, donor(stock, OTHER_ORDER))
    stock, ourselves = stock.double(), ourselves.double()  # our layers add in another order in float32
    x = torch.randn(1, 4, 16, 16, 16, dtype=torch.float64)
    for m, name in enumerate(CHANNELS):
        alone = torch.zeros_like(x)
        alone[:, OTHER_ORDER.index(name)] = x[:, m]
        with torch.no_grad():
            expected = stock.encoder(alone)
            found = ourselves.encoders[m].encoder(x[:, m : m + 1])
        for theirs, mine in zip(expected, found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert of(taken, f"encoder of {name}").source == f"its column {name}"
    assert of(taken, "decoder").taken == 0, "the decoder is half as wide"
    assert any("decoder_width_ratio=1" in note for note in taken.notes)


def test_a_modality_the_stock_model_does_not_know_starts_from_the_mean_of_its_columns() -> None:
    stock, ourselves = stock_network(2), ours("mean", 2)
    taken = start(ourselves, donor(stock, ("t1", "t2")), ("t1", "flair"))
    columns = stock.encoder.stages[0][0].convs[0].conv.weight
    torch.testing.assert_close(
        ourselves.encoders[1].encoder.stages[0][0].convs[0].conv.weight, columns.mean(1, keepdim=True)
    )
    assert of(taken, "encoder of flair").source == "the mean of its columns"


def test_a_decoder_of_the_same_width_is_taken_too_and_heads_with_the_same_labels() -> None:
    stock, ourselves = stock_network(), ours("mean", **WHOLE)
    before = unique_tensors(ourselves)["decoder.seg_layers.0.weight"].clone()
    taken = start(ourselves, donor(stock, labels=OTHER_LABELS))
    of_modalities = sum(p.numel() for name, p in ourselves.decoder.named_parameters() if name.endswith("of_modalities"))
    assert of(taken, "decoder").taken == of(taken, "decoder").total - of_modalities > 0
    assert of(taken, "heads").taken == 0
    assert torch.equal(ourselves.decoder.seg_layers[0].weight, before)
    again = start(ourselves, donor(stock))
    assert torch.equal(ourselves.decoder.seg_layers[0].weight, stock.decoder.seg_layers[0].weight)
    assert of(again, "heads").taken > 0


@pytest.mark.parametrize("design", [name for name, design in fusion_designs().items() if not design.order_matters])
def test_a_model_in_another_order_of_channels_stays_the_same_model(design: str) -> None:
    """Every number is taken, and the network is the same function of the modalities by name."""
    torch.manual_seed(0)
    source, target = ours(design).eval(), ours(design).eval()
    taken = start(target, donor(source), OTHER_ORDER)
    assert all(part.taken == part.total for part in taken.parts), taken.lines()
    order = [CHANNELS.index(name) for name in OTHER_ORDER]
    x = torch.randn(2, 4, 16, 16, 16)
    mask = torch.tensor([[True, True, True, True], [True, False, True, False]])
    with torch.no_grad():
        torch.testing.assert_close(target(x[:, order], mask[:, order]), source(x, mask), rtol=1e-3, atol=1e-4)


def test_weights_that_have_not_moved_make_another_function() -> None:
    """The test above can fail."""
    torch.manual_seed(0)
    source = ours("concat").eval()
    x, order = torch.randn(1, 4, 16, 16, 16), [CHANNELS.index(name) for name in OTHER_ORDER]
    with torch.no_grad():
        assert (source(x[:, order]) - source(x)).abs().max() > 0.01


@pytest.mark.parametrize("design", sorted(fusion_designs()))
def test_fewer_and_more_modalities(design: str) -> None:
    source = ours(design, 3)
    target = ours(design, 4)
    before = {key: tensor.clone() for key, tensor in unique_tensors(target).items()}
    taken = start(target, donor(source, ("t2", "t1", "flair")))
    for m, name in enumerate(CHANNELS):
        part = of(taken, f"encoder of {name}")
        if name == "t1ce":
            assert part.taken == 0
            own = target.encoders[m].state_dict()
            assert all(torch.equal(before[f"encoders.{m}.{key}"], own[key]) for key in own if "all_mod" not in key)
            continue
        assert part.taken == part.total
        own = target.encoders[m].state_dict()
        theirs = source.encoders[("t2", "t1", "flair").index(name)].state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in own)
    assert any("--use t1ce=" in note for note in taken.notes)


def test_what_belongs_to_a_modality_in_the_fusion_goes_by_name() -> None:
    source, target = ours("concat", 2), ours("concat", 3)
    before = target.fusion.scales[0][0][0].weight.detach().clone()
    start(target, donor(source, ("flair", "t1")), ("t1", "t2", "flair"))
    width = source.fusion.spec.channels[0]
    own = target.fusion.scales[0][0][0].weight.split(width, 1)
    theirs = source.fusion.scales[0][0][0].weight.split(width, 1)
    assert torch.equal(own[0], theirs[1])
    assert torch.equal(own[2], theirs[0])
    assert torch.equal(own[1], before.split(width, 1)[1])


def test_a_modality_can_stand_for_another() -> None:
    source, target = ours("mean", 2), ours("mean", 3)
    taken = start(target, donor(source, ("t1", "t2")), ("t1", "t1ce", "t2"), t1ce="T1w")
    assert of(taken, "encoder of t1ce").source == "its t1"
    assert torch.equal(target.encoders[1].projections[2].weight, source.encoders[0].projections[2].weight)
    with pytest.raises(ValueError, match="Unknown modality 'dwi'"):
        start(target, donor(source, ("t1", "t2")), ("t1", "t1ce", "t2"), t1ce="dwi")


@pytest.mark.parametrize("classes", [4, 5], ids=["as many labels", "more labels"])
def test_other_labels_start_what_belongs_to_classes_anew(classes: int) -> None:
    source, target = ours("region_aware"), ours("region_aware", classes=classes, heads=classes - 1)
    before = {key: tensor.clone() for key, tensor in unique_tensors(target).items()}
    taken = start(target, donor(source, labels=OTHER_LABELS))
    own, theirs = target.state_dict(), source.state_dict()
    of_classes = ("decoder.seg_layers.1.weight", "fusion.maps.1.head.1.weight", "modality_decoder.seg_layers.0.weight")
    for key in (*of_classes, *(key for key in own if ".weights.first." in key or ".weights.second." in key)):
        assert torch.equal(own[key], before[key]), f"{key} depends on the classes"
    for key in ("fusion.maps.1.embed.0.0.weight", "fusion.shortcut.0.0.weight", "decoder.stages.0.convs.0.conv.weight"):
        assert torch.equal(own[key], theirs[key]), f"{key} does not"
    assert any("labels are others" in note for note in taken.notes)


def test_another_design_keeps_encoders_and_decoder() -> None:
    source, target = ours("mean"), ours("hemis")
    taken = start(target, donor(source))
    assert of(taken, "fusion design").taken == 0
    assert of(taken, "decoder").taken == of(taken, "decoder").total


def test_one_self_supervised_channel_serves_every_modality(tmp_path: Path) -> None:
    """nnU-Net's pretraining names the parts of its network in an adaptation plan; there are no modalities."""
    pretrained = stock_network(1, residual=True)
    weights = {f"net.{key}": value for key, value in pretrained.state_dict().items() if key.startswith("encoder.")}
    plan = {"key_to_stem": "net.encoder.stem", "key_to_encoder": "net.encoder.stages", "pretrain_num_input_channels": 1}
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": plan}, tmp_path / "mae.pth")
    per_modality = options_with(fusion="mean", width_factor=1.0, network_form="multi_encoder")
    target = network(per_modality, residual=True)
    taken = start(target, read_donor(tmp_path / "mae.pth"))
    theirs = pretrained.encoder.state_dict()
    for m, name in enumerate(CHANNELS):
        own = target.encoders[m].encoder.state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in own)
        assert of(taken, f"encoder of {name}").source == "its one channel"
    of_all = network(options_with(fusion="mean", width_factor=1.0), residual=True)
    start(of_all, read_donor(tmp_path / "mae.pth"))
    own = of_all.encoders.of_all.encoder.state_dict()
    first = next(key for key in theirs if theirs[key].ndim == 5)
    assert torch.equal(own[first], theirs[first].repeat(1, 4, 1, 1, 1))
    assert all(torch.equal(own[key], theirs[key]) for key in theirs if theirs[key].shape == own[key].shape)
    with pytest.raises(ValueError, match=r"one channel, of no modality .*nothing to choose for t1ce \(--use\)"):
        start(target, read_donor(tmp_path / "mae.pth"), t1ce="t1")


def test_channels_that_the_file_says_itself_are_not_given_otherwise(tmp_path: Path) -> None:
    arguments = {"dataset_json": BRATS_JSON, "plans": plans()}
    torch.save({"network_weights": {"a": torch.zeros(1)}, "init_args": arguments}, tmp_path / "file.pth")
    same = read_donor(tmp_path / "file.pth", ["T1", "T1Gd", "T2", "FLAIR"])
    assert same.channels == read_donor(tmp_path / "file.pth").channels == ("t1", "t1ce", "t2", "flair")
    with pytest.raises(ValueError, match=r"its modalities are t1, t1ce, t2, flair\. Leave --channels out"):
        read_donor(tmp_path / "file.pth", ["flair", "t1", "t1ce", "t2"])


def test_early_fusion_takes_stems_and_the_whole_trunk() -> None:
    stock = stock_network(convs=2)
    target = network(options_with(fusion="mean", network_form="early_fusion", **WHOLE))
    taken = start(target, donor(stock, OTHER_ORDER))
    first = stock.encoder.stages[0][0].convs[0].conv.weight
    for m, name in enumerate(CHANNELS):
        j = OTHER_ORDER.index(name)
        assert torch.equal(target.encoders[m].convolution[0].weight, first[:, j : j + 1])
    assert torch.equal(target.decoder.down[0][1][0][0].weight, stock.encoder.stages[1][0].convs[1].conv.weight)
    assert torch.equal(target.decoder.up[0].weight, stock.decoder.transpconvs[-1].weight)
    assert torch.equal(target.decoder.merge[1][0][0].weight, stock.decoder.stages[0].convs[0].conv.weight)
    assert torch.equal(target.decoder.heads[0].weight, stock.decoder.seg_layers[-1].weight)
    convolutions = [key for key in unique_tensors(target) if key.startswith("decoder.") and ".gate." not in key]
    assert set(convolutions) - set(taken.weights) == {key for key in convolutions if ".1.1.norm." in key}, (
        "only the channel shuffles start anew"
    )


def test_early_fusion_from_early_fusion() -> None:
    def build() -> torch.nn.Module:
        return network(options_with(fusion="demoseg", network_form="early_fusion", **WHOLE))

    source, target = build(), build()
    taken = start(target, donor(source), OTHER_ORDER)
    assert torch.equal(target.encoders[0].convolution[0].weight, source.encoders[3].convolution[0].weight)
    assert all(part.taken == part.total for part in taken.parts)
    assert any("order of the modalities" in note for note in taken.notes)
    with pytest.raises(ValueError, match="early-fusion form, this network the multi-encoder form"):
        start(ours(), donor(source))


def test_conditional_norms_go_by_the_names_of_modalities() -> None:
    """In another order the same model, from a stock network a stock network, and a new modality adds nothing yet."""

    def conditional(modalities: int, taught: bool) -> ConditionedUNet:
        net = ConditionedUNet(stock_network(modalities), modalities).double()
        for name, parameter in net.named_parameters() if taught else ():
            if name.endswith("of_modalities"):
                torch.nn.init.normal_(parameter)
        return net.eval()

    trained, turned = conditional(4, taught=True), conditional(4, taught=True)
    taken = start(turned, donor(trained, OTHER_ORDER))
    assert taken.taken == sum(part.total for part in taken.parts)
    x = torch.randn(1, 4, 16, 16, 16, dtype=torch.float64)
    visible = torch.tensor([[True, False, True, True]])
    order = [CHANNELS.index(name) for name in OTHER_ORDER]
    with torch.no_grad():
        torch.testing.assert_close(turned(x, visible), trained(x[:, order], visible[:, order]))
    stock = stock_network().double().eval()
    fresh = conditional(4, taught=False)
    start(fresh, donor(stock))
    with torch.no_grad():
        torch.testing.assert_close(fresh(x, torch.ones_like(visible)), stock(x))
    more = conditional(5, taught=True)
    start(more, donor(trained), (*CHANNELS, "dwi"))
    norms = [module for module in more.modules() if hasattr(module, "of_modalities")]
    theirs = [module for module in trained.modules() if hasattr(module, "of_modalities")]
    for own, their in zip(norms, theirs, strict=True):
        assert torch.equal(own.of_modalities[:4], their.of_modalities)
        assert not own.of_modalities[4].any()


@pytest.mark.parametrize("fusion", ["concat", "region_aware"])
def test_conditional_norms_of_fusion_and_decoder_go_by_names_too(fusion: str) -> None:
    """In another order, and with other labels, the same model; without such norms what they add up to when all is
    visible."""

    def build(conditional: bool) -> torch.nn.Module:
        net = network(options_with(fusion=fusion, conditional_norms=conditional)).double()
        for name, parameter in net.named_parameters():
            if name.endswith("of_modalities"):
                torch.nn.init.normal_(parameter, std=0.3)
        return net.eval()

    trained, turned, plain = build(True), build(True), build(False)
    x = torch.randn(1, 4, 16, 16, 16, dtype=torch.float64)
    visible = torch.tensor([[True, False, True, True]])
    order = [CHANNELS.index(name) for name in OTHER_ORDER]
    taken = start(turned, donor(trained, OTHER_ORDER))
    assert taken.taken == sum(part.total for part in taken.parts)
    start(plain, donor(trained))
    everything = torch.ones_like(visible)
    with torch.no_grad():
        torch.testing.assert_close(turned(x, visible), trained(x[:, order], visible[:, order]))
        torch.testing.assert_close(plain(x, everything), trained(x, everything))
    other = build(True)
    start(other, donor(trained), labels=OTHER_LABELS)
    for name, parameter in other.named_parameters():
        if name.endswith("of_modalities"):
            assert torch.equal(parameter, trained.get_parameter(name))


def test_a_plain_checkpoint_gives_conditional_norms_all_but_their_parts() -> None:
    """Whole widths: the decoder is the stock one, as without such norms; what modalities add starts at zero."""
    stock = stock_network().double().eval()
    plain, conditional = (ours("mean", conditional_norms=norms, **WHOLE).double() for norms in (False, True))
    assert of(start(plain, donor(stock)), "decoder").taken == of(start(plain, donor(stock)), "decoder").total
    taken = start(conditional, donor(stock))
    own = plain.decoder.state_dict()
    for key, tensor in conditional.decoder.state_dict().items():
        assert not tensor.any() if key.endswith("of_modalities") else torch.equal(tensor, own[key])
    assert not any("decoder is narrower" in note for note in taken.notes)
    narrow = start(ours("mean", conditional_norms=True), donor(stock))
    assert of(narrow, "decoder").taken == 0
    assert any("decoder is narrower" in note for note in narrow.notes)


@pytest.mark.parametrize("norms", [False, True])
def test_a_decoder_without_conditional_norms_starts_as_with_all_visible(norms: bool) -> None:
    """That shared by all modalities has none; the checkpoint's go into its scales and shifts, and the note says so."""
    trained = ConditionedUNet(stock_network(), 4).double()
    for name, parameter in trained.named_parameters():
        if name.endswith("of_modalities"):
            torch.nn.init.normal_(parameter, std=0.3)
    target = ours("mean", conditional_norms=norms, **WHOLE).double()
    taken = start(target, donor(trained))
    norm, own = trained.decoder.stages[0].convs[0].norm, target.modality_decoder.stages[0].convs[0].norm
    scale, shift = (0.5 * norm.of_modalities).sum(0)
    torch.testing.assert_close(own.weight, norm.weight * (1 + scale))
    torch.testing.assert_close(own.bias, norm.bias * (1 + scale) + shift)
    assert len(taken.notes) == 1
    assert "alone visible" in taken.notes[0]
    assert "t1, t1ce, t2, flair visible" in taken.notes[0]


def test_parts_of_norms_in_a_list_go_by_the_names_of_modalities(monkeypatch: pytest.MonkeyPatch) -> None:
    """A design of another package with a norm per modality: the list's index and the rows of each."""

    class Listed(FusionDesign):
        """A norm per modality and scale, and the mean of what is visible."""

        name = "listed"
        conditions_norms = True

        def __init__(self, spec: FusionSpec) -> None:
            super().__init__(spec)
            self.norms = torch.nn.ModuleList(
                torch.nn.ModuleList(torch.nn.InstanceNorm3d(width, affine=True) for width in spec.channels)
                for _ in range(spec.num_modalities)
            )

        def fuse_scale(self, scale: int, features: Any, mask: Any, context: Any, state: Any) -> FusedScale:
            normed = torch.stack([norms[scale](features[:, m]) for m, norms in enumerate(self.norms)], 1)
            return FusedScale((normed * mask[:, :, None, None, None, None]).mean(1))

    monkeypatch.setitem(base._REGISTRY, "listed", Listed)
    trained, turned = (ours("listed", conditional_norms=True).double().eval() for _ in range(2))
    for name, parameter in trained.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    taken = start(turned, donor(trained, OTHER_ORDER))
    assert taken.taken == sum(part.total for part in taken.parts)
    x, visible = torch.randn(1, 4, 16, 16, 16, dtype=torch.float64), torch.tensor([[True, False, True, True]])
    order = [CHANNELS.index(name) for name in OTHER_ORDER]
    with torch.no_grad():
        torch.testing.assert_close(turned(x, visible), trained(x[:, order], visible[:, order]))


def test_nothing_that_fits_is_refused_with_the_option_to_set() -> None:
    with pytest.raises(ValueError, match=r"8 channels wide .* width_factor=1"):
        start(ours("mean", width_factor=2.0), donor(stock_network()))
    with pytest.raises(ValueError, match="not weights of a U-Net"):
        start(ours(), Donor({"layer.weight": torch.zeros(1)}, CHANNELS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": 1}, "no 'network_weights'"),
        ({"network_weights": stock_network(2).state_dict()}, "2 input channels .* --channels"),
        (
            {"network_weights": {"a": torch.zeros(1)}, "x": nnUNetTrainer},
            "more than weights, numbers and text .*nnUNetTrainer",
        ),
        ({"network_weights": {"a": torch.zeros(1)}, "init_args": {"plans": {}}}, "cannot be: 'the file' must be"),
        (
            {"network_weights": {"a": torch.zeros(1)}, "init_args": {"dataset_json": BRATS_JSON, "plans": 3}},
            "'plans' must be an object, found int",
        ),
    ],
    ids=["no weights", "unknown channels", "code", "no dataset.json", "no plans"],
)
def test_files_that_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        read_donor(tmp_path / "file.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        read_donor(tmp_path / "absent.pth")


# --- through nnU-Net's own training ---------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(nnunet_folders: Path) -> Path:
    """A checkpoint that nnU-Net itself wrote, of a stock training with its channels in another order."""
    write_dataset(nnunet_folders)
    trainer = nnUNetTrainer(
        {**plans(), "continue_training": False}, "3d_fullres", 0, dataset_json(OTHER_ORDER), torch.device("cpu")
    )
    trainer.initialize()
    for key, value in (("mean_fg_dice", 0.5), ("train_losses", 0.1)):
        trainer.logger.log(key, torch.tensor(value).numpy()[()], 0)
    path = nnunet_folders / "stock.pth"
    trainer.save_checkpoint(str(path))
    return path


@pytest.mark.parametrize(
    "cls", [nnUNetTrainerMGML, nnUNetTrainerModalityDropout, nnUNetTrainerModalityDropout_conditional]
)
def test_pretrained_weights_of_a_stock_training(checkpoint: Path, cls: Any, capsys: Any) -> None:
    trainer = make_trainer(cls, plans())
    run_training.maybe_load_checkpoint(trainer, False, False, str(checkpoint))
    stock = torch.load(checkpoint, weights_only=False)["network_weights"]
    first = stock["encoder.stages.0.0.convs.0.conv.weight"]
    order = [OTHER_ORDER.index(name) for name in CHANNELS]
    if cls is nnUNetTrainerMGML:
        own = trainer.network.encoders.of_all.encoder.stages[0][0].convs[0].conv.weight
        assert torch.equal(own, first[:, order])
    else:
        assert torch.equal(trainer.network.encoder.stages[0][0].convs[0].conv.weight, first[:, order])
        assert torch.equal(trainer.network.decoder.seg_layers[0].weight, stock["decoder.seg_layers.0.weight"])
    assert "matched by the names of modalities" in capsys.readouterr().out


def test_other_networks_are_left_to_nnunet(checkpoint: Path, capsys: Any) -> None:
    make_trainer(nnUNetTrainerMGML, plans()).initialize()
    trainer = nnUNetTrainer(
        {**plans(), "continue_training": False}, "3d_fullres", 0, dataset_json(CHANNELS), torch.device("cpu")
    )
    run_training.maybe_load_checkpoint(trainer, False, False, str(checkpoint))
    first = torch.load(checkpoint, weights_only=False)["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
    assert torch.equal(trainer.network.encoder.stages[0][0].convs[0].conv.weight, first)
    assert "Loading pretrained weights from file" in capsys.readouterr().out


def test_the_command_shows_what_is_taken_and_writes_a_start(
    checkpoint: Path, nnunet_folders: Path, capsys: Any
) -> None:
    folder = nnunet_folders / "preprocessed" / "Dataset900_Phantom"
    for name, factor in (("wide", 1.0), ("wider", 2.0)):
        own = {**plans(), "plans_name": name, "mgml": {"config": {"width_factor": factor, "fusion": "mean"}}}
        (folder / f"{name}.json").write_text(json.dumps(own))
    options = ["-d", "900", "-p", "wider", "--use", "t1ce=t1"]
    assert main(["warmstart", str(checkpoint), *options]) == 2
    assert "width_factor=1" in capsys.readouterr().err
    options[3] = "wide"
    file = nnunet_folders / "start.pth"
    assert main(["warmstart", str(checkpoint), *options, "-o", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "encoder of all modalities" in shown
    assert f"-p wide -pretrained_weights {file}" in shown
    trainer = make_trainer(nnUNetTrainerMGML, plans(), {"fusion": "mean"})
    run_training.maybe_load_checkpoint(trainer, False, False, str(file))
    start = torch.load(file, weights_only=True)["network_weights"]
    own = trainer.network.state_dict()
    assert all(torch.equal(own[key], value) for key, value in start.items())
    columns = torch.load(checkpoint, weights_only=False)["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
    j = OTHER_ORDER.index("t1")
    first = start["encoders.of_all.encoder.stages.0.0.convs.0.conv.weight"]
    assert torch.equal(first[:, CHANNELS.index("t1ce")], columns[:, j])


def test_the_command_never_writes_over_its_source_and_over_another_file_only_when_asked(
    checkpoint: Path, nnunet_folders: Path, capsys: Any
) -> None:
    own = {**plans(), "plans_name": "wide", "mgml": {"config": {"width_factor": 1.0, "fusion": "mean"}}}
    (nnunet_folders / "preprocessed" / "Dataset900_Phantom" / "wide.json").write_text(json.dumps(own))
    command = ["warmstart", str(checkpoint), "-d", "900", "-p", "wide", "-o"]
    before, link = checkpoint.read_bytes(), nnunet_folders / "link.pth"
    link.symlink_to(checkpoint)
    for name in (checkpoint, link):
        assert main([*command, str(name), "--overwrite"]) == 2
        assert "would be lost" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before
    start = nnunet_folders / "new" / "folder" / "start.pth"
    assert main([*command, str(start)]) == 0
    start.write_bytes(b"other")
    assert main([*command, str(start)]) == 2
    assert f"{start} exists. Give another name, or --overwrite" in capsys.readouterr().err
    assert start.read_bytes() == b"other"
    assert main([*command, str(start), "--overwrite"]) == 0
    assert "network_weights" in torch.load(start, weights_only=True)
    assert main([*command, str(start.parent)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_source_that_is_no_checkpoint_is_said_to_be_none(nnunet_folders: Path, capsys: Any) -> None:
    write_dataset(nnunet_folders)
    text = nnunet_folders / "plans.json"
    text.write_text("{}")
    assert main(["warmstart", str(text), "-d", "900", "-o", str(nnunet_folders / "new" / "start.pth")]) == 2
    told = capsys.readouterr().err
    assert f"{text} is no PyTorch checkpoint" in told
    assert "trust" not in told
    assert not (nnunet_folders / "new").exists()


def test_the_command_refuses_stock_trainers(nnunet_folders: Path, capsys: Any) -> None:
    write_dataset(nnunet_folders)
    assert main(["warmstart", "x.pth", "-d", "900", "-tr", "nnUNetTrainer"]) == 2
    assert "Give a trainer of this plugin" in capsys.readouterr().err
    assert main(["warmstart", "x.pth", "-d", "900", "-tr", "nnUNetTrainerMGLM"]) == 2
    assert "There is no trainer nnUNetTrainerMGLM. Of this package: nnUNetTrainerDeMoSeg" in capsys.readouterr().err
    with pytest.raises(ValueError, match="MODALITY=SOURCE"):
        parse_use(["t1"])


def test_nothing_of_ours_is_loaded_for_stock_trainings() -> None:
    code = "import sys, nnunetv2.run.run_training; print([m for m in sys.modules if m.startswith('nnunetv2_mgml')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
