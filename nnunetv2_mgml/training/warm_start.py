"""Start a training from weights there are: ``-pretrained_weights`` and ``mgml warmstart``.

What is taken from where is decided in `network.transfer`; here is how checkpoints are read, and networks built without
a training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_mgml import __version__
from nnunetv2_mgml.io.files import read_json, replacing
from nnunetv2_mgml.io.targets import check_output_file
from nnunetv2_mgml.modalities import canonical_name, channel_names
from nnunetv2_mgml.network.interface import bare
from nnunetv2_mgml.network.transfer import Donor, Transfer, labels_of, transfer
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans.folders import PREPROCESSED, dataset_folder
from nnunetv2_mgml.plans.model_files import check_dataset_json
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.upstream.checkpoints import load_checkpoint
from nnunetv2_mgml.upstream.registration import add_ext_dir


def read_donor(path: str | Path, channels: Sequence[str] | None = None) -> Donor:
    """Read a checkpoint of nnU-Net, of ours, or of nnU-Net's self-supervised pretraining, as data.

    Args:
        path: a ``.pth`` file.
        channels: the modalities it was trained with, where the file does not say so; no others where it does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, one that would run code (see `upstream.checkpoints.loading`), one of several
            channels that does not say which they are, or one that says others than ``channels``.
    """
    content = load_checkpoint(path, flag=False)
    weights = content.get("network_weights")
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(
            f"{path} has no 'network_weights'. Give a checkpoint that nnU-Net, this plugin or nnU-Net's pretraining "
            f"wrote (checkpoint_final.pth)."
        )
    weights = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in weights.items()}
    adaptation = content.get("nnssl_adaptation_plan")
    if isinstance(adaptation, dict):
        weights = _pretrained_encoder(weights, adaptation)
    arguments = content.get("init_args")
    if not isinstance(arguments, dict):
        names = None if channels is None else tuple(canonical_name(name) for name in channels)
        donor = Donor(weights, names)
        _check_channels(path, donor)
        return donor
    plans: Any = arguments.get("plans")
    dataset_json: Any = arguments.get("dataset_json")
    try:
        check_dataset_json(dataset_json)
        if not isinstance(plans, dict):
            raise ValueError(f"'plans' must be an object, found {type(plans).__name__}.")
        fusion = Options.from_plans(plans).network.fusion if PLANS_KEY in plans else None
    except ValueError as error:
        raise ValueError(f"{path} says of its training what cannot be: {error}") from error
    own = channel_names(dataset_json)
    if channels is not None and tuple(map(canonical_name, channels)) != own:
        raise ValueError(
            f"{path} says itself that its modalities are {', '.join(own)}. Leave --channels out; to start a modality "
            f"from another one, use --use."
        )
    return Donor(weights, own, labels_of(dataset_json), fusion)


def _pretrained_encoder(weights: dict[str, torch.Tensor], adaptation: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the encoder of a self-supervised checkpoint under the names of nnU-Net's encoder."""
    parts = {
        str(adaptation.get("key_to_stem")): "encoder.stem",
        str(adaptation.get("key_to_encoder")): "encoder.stages",
    }
    renamed: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        for old, new in parts.items():
            if key.startswith(f"{old}."):
                renamed[new + key.removeprefix(old)] = value
    return renamed or weights


def _check_channels(path: str | Path, donor: Donor) -> None:
    """Refuse a first convolution of another number of channels than modalities are known."""
    first = [value for key, value in donor.weights.items() if key.startswith("encoder.") and value.ndim >= 4]
    known = 1 if donor.channels is None else len(donor.channels)
    if donor.form == "stock" and first[0].shape[1] != known:
        raise ValueError(
            f"{path} has {first[0].shape[1]} input channels and does not say which modalities they are; "
            f"{known} {'is' if known == 1 else 'are'} known. Name them in channel order: mgml warmstart ... --channels."
        )


class Start:
    """A network that is to be trained, and what its inputs and heads mean.

    Args:
        network: wrapped or not.
        dataset_json: of the data it is to be trained on.
    """

    def __init__(self, network: nn.Module, dataset_json: dict[str, Any]) -> None:
        self.network = network
        self.channels = channel_names(dataset_json)
        self.labels = labels_of(dataset_json)

    def take(self, donor: Donor, stands_for: Mapping[str, str] | None = None) -> Transfer:
        """Overwrite what the donor has for the network, and return what that was; see `transfer`."""
        result = transfer(bare(self.network), self.channels, self.labels, donor, stands_for)
        result.apply(bare(self.network))
        return result


def warm_started(
    trainer_class: Any,
    plans: dict[str, Any],
    dataset_json: dict[str, Any],
    configuration: str,
    donor: Donor,
    stands_for: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], Transfer]:
    """Build the network a trainer of ours would train, without a training, and start it from a donor.

    Args:
        trainer_class: one of ours.
        plans: of the dataset to be trained on.
        dataset_json: the same.
        configuration: such as ``3d_fullres``.
        donor: where the weights come from.
        stands_for: modality -> the donor's modality it starts from, where that is not the one of its name.

    Returns:
        A checkpoint that ``-pretrained_weights`` takes as a whole, and what was taken.

    Raises:
        ValueError: no such configuration, or see `transfer`.
    """
    plans = copy.deepcopy(plans)
    if configuration not in plans["configurations"]:
        raise ValueError(f"The plans have no {configuration}, but {', '.join(plans['configurations'])}. Change -c.")
    manager = PlansManager(plans)
    configured, labels = manager.get_configuration(configuration), manager.get_label_manager(dataset_json)
    heads = labels.num_segmentation_heads
    plans[PLANS_KEY] = {
        "version": __version__,
        "config": trainer_class.resolve_options(plans).as_dict(),
        "channels": list(channel_names(dataset_json)),
        "num_classes": heads + 1 if labels.has_regions else heads,
    }
    network = trainer_class.build_network_architecture(
        manager, configured, determine_num_input_channels(manager, configured, dataset_json), heads, True
    )
    taken = Start(network, dataset_json).take(donor, stands_for)
    arguments = {"plans": plans, "configuration": configuration, "dataset_json": dataset_json}
    return {
        "network_weights": network.state_dict(),
        "init_args": arguments,
        "trainer_name": trainer_class.__name__,
    }, taken


@dataclass(frozen=True)
class WarmStartRequest:
    """What to start from what."""

    checkpoint: Path
    """Where the weights come from; see `read_donor`."""
    dataset: str
    """Id or name of the dataset to be trained on; it has been planned."""
    configuration: str = "3d_fullres"
    trainer: str = "nnUNetTrainerMGML"
    """Name of a trainer of ours."""
    plans: str = "nnUNetPlans"
    stands_for: Mapping[str, str] = field(default_factory=dict)
    """Modality -> the checkpoint's modality it starts from, where that is not the one of its name."""
    channels: Sequence[str] | None = None
    """Modalities of the checkpoint in channel order, where it does not say so itself."""
    output: Path | None = None
    """Checkpoint to write, another than ``checkpoint``; None writes nothing."""
    overwrite: bool = False
    """Replace a file of that name."""


def warm_start(request: WarmStartRequest) -> tuple[Path, Transfer]:
    """Start the network of a training from a checkpoint, without training it.

    Returns:
        The dataset's folder in nnUNet_preprocessed, and what was taken.

    Raises:
        FileNotFoundError: no such checkpoint, dataset or plans.
        FileExistsError: the output is there already.
        ValueError: no trainer of this name or one that is not ours, an output that is the checkpoint itself, or see
            `read_donor` and `warm_started`.
    """
    from nnunetv2_mgml.training.preflight import find_trainer  # it imports the trainers, which import this module

    if request.output is not None:
        check_output_file(request.output, overwrite=request.overwrite, reads=[request.checkpoint])
    add_ext_dir()
    folder = dataset_folder(request.dataset, PREPROCESSED)
    trainer = find_trainer(request.trainer)
    if not getattr(trainer, "supports_missing_modalities", False):
        raise ValueError(
            f"{request.trainer} is nnU-Net's own; nnUNetv2_train -tr {request.trainer} -pretrained_weights loads its "
            f"weights. Give a trainer of this plugin."
        )
    plans, dataset_json = (read_json(folder / name) for name in (f"{request.plans}.json", "dataset.json"))
    donor = read_donor(request.checkpoint, request.channels)
    if request.output is not None:
        request.output.parent.mkdir(parents=True, exist_ok=True)
    content, taken = warm_started(trainer, plans, dataset_json, request.configuration, donor, request.stands_for)
    if request.output is not None:
        write_checkpoint(content, request.output)
    return folder, taken


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint whole or not at all."""
    with replacing(path) as temporary:
        torch.save(content, temporary)
