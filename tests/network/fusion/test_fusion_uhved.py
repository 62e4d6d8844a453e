from __future__ import annotations

import itertools

import pytest
import torch
from builders import network, options_with
from fusion_cases import make_design, make_pass, make_spec, run, take_modalities
from torch.distributions import Normal, kl_divergence

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.image_decoder import reconstruction_error
from nnunetv2_mgml.network.fusion.uhved import gaussian_kl, product_of_gaussians, subset_kl, subset_patterns
from nnunetv2_mgml.network.interface import Needs, View


def test_two_identical_experts() -> None:
    """Two experts N(mu, v) and the prior: mean 2 mu / v / (1 + 2 / v), variance 1 / (1 + 2 / v)."""
    mu, v = 1.7, 0.4
    mean, variance = product_of_gaussians(torch.full((1, 2, 1), mu), torch.full((1, 2, 1), 1 / v))
    assert mean.item() == pytest.approx(2 * mu / v / (1 + 2 / v))
    assert variance.item() == pytest.approx(1 / (1 + 2 / v))


def test_absent_experts_leave_prior_and_others() -> None:
    mean, variance = product_of_gaussians(torch.tensor([[3.0, -5.0]]), torch.tensor([[4.0, 0.0]]))
    assert mean.item() == pytest.approx(12 / 5)
    assert variance.item() == pytest.approx(1 / 5)


def test_gaussian_kl() -> None:
    m1, m2 = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    v1, v2 = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) + 0.1
    reference = kl_divergence(Normal(m1, v1.sqrt()), Normal(m2, v2.sqrt()))
    torch.testing.assert_close(gaussian_kl(m1, v1, m2, v2), reference)


def slow_subset_kl(
    mean: torch.Tensor, precision: torch.Tensor, visible: torch.Tensor, available: torch.Tensor
) -> float:
    """Subset by subset with torch.distributions, sample by sample."""
    total = 0.0
    for b, row in enumerate(available):
        have = [m for m, p in enumerate(row) if p]

        def posterior(subset: tuple[int, ...], b: int = b) -> Normal:
            variance = 1 / (1 + sum(precision[b, m] for m in subset))
            return Normal(variance * sum(precision[b, m] * mean[b, m] for m in subset), variance.sqrt())

        subsets = [s for n in range(1, len(have) + 1) for s in itertools.combinations(have, n)]
        given = posterior(tuple(m for m, p in enumerate(visible[b]) if p))
        between = sum(kl_divergence(given, posterior(s)).mean() for s in subsets)
        prior = sum(kl_divergence(posterior(s), Normal(0.0, 1.0)).mean() for s in subsets)
        total += between / max(1, len(subsets) - 1) + prior / len(subsets)
    return float(total / len(available))


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_subset_kl_against_enumeration(modalities: int) -> None:
    """All subsets of what each sample has against what is visible, for every such pair; 1/14 and 1/15 for four."""
    pairs = [(v, a) for a in all_subsets(modalities) for v in all_subsets(modalities) if all(map(bool.__le__, v, a))]
    visible, available = (torch.tensor(masks) for masks in zip(*pairs, strict=True))
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(len(pairs), modalities, 3, 6, generator=generator)
    precision = 5 * torch.rand(mean.shape, generator=generator) * available[:, :, None, None]
    patterns = subset_patterns(modalities, 15, visible.device)
    assert len(patterns) == 2**modalities - 1
    assert subset_kl(mean, precision, visible, available, patterns).item() == pytest.approx(
        slow_subset_kl(mean, precision, visible, available), rel=1e-5
    )


def test_random_subsets_of_many_modalities() -> None:
    """For more than four modalities eight random subsets; on average they give the enumeration."""
    torch.manual_seed(0)
    available = torch.tensor([[True, True, False, True, True]])
    visible = torch.tensor([[True, False, False, True, False]])
    mean, precision = torch.randn(1, 5, 2, 4), 3 * torch.rand(1, 5, 2, 4) * available[:, :, None, None]
    patterns = [subset_patterns(5, 15, available.device) for _ in range(2000)]
    draws = [subset_kl(mean, precision, visible, available, drawn) for drawn in patterns]
    assert {len(drawn) for drawn in patterns} == {8}
    expected = slow_subset_kl(mean, precision, visible, available)
    assert torch.stack(draws).mean().item() == pytest.approx(expected, rel=0.03)


def test_kl_on_random_voxels_is_the_mean_over_all() -> None:
    spec = make_spec()
    few, everything = (make_design("uhved", make_spec(options={"kl_voxels": n})) for n in (64, 10**6))
    torch.manual_seed(0)
    mean, precision = torch.randn(2, 3, 4, 500), torch.rand(2, 3, 4, 500)
    mask = torch.ones(2, 3).bool()
    reference = everything.divergence(mean, precision, mask, mask)
    patterns = subset_patterns(3, 15, mask.device)
    expected = 0.1 / spec.num_scales * subset_kl(mean, precision, mask, mask, patterns).item()
    assert reference.item() == pytest.approx(expected)
    draws = torch.stack([few.divergence(mean, precision, mask, mask) for _ in range(200)])
    assert draws.std() > 0
    assert draws.mean().item() == pytest.approx(reference.item(), rel=0.02)


def test_samples_in_training_only() -> None:
    """Mean and spread of the samples are those of the product; evaluation and the teacher pass give its mean."""
    spec = make_spec()
    design = make_design("uhved", spec).train()
    inputs = make_pass(spec, [[1, 0, 1]])
    scale = spec.num_scales - 1
    mean, variance = product_of_gaussians(*design.experts(scale, inputs.features[scale], inputs.mask))
    torch.manual_seed(0)
    results = [design.fuse_scale(scale, inputs.features[scale], inputs.mask, None, None) for _ in range(400)]
    samples = torch.stack([result.fused for result in results])
    assert ((samples.mean(0) - mean).abs() < 5 * variance.sqrt() / 20).all()
    assert (samples.var(0) / variance).mean().item() == pytest.approx(1, abs=0.05)
    assert results[0].loss is not None
    with torch.no_grad():
        assert torch.equal(design.fuse_scale(scale, inputs.features[scale], inputs.mask, None, None).fused, mean)
    evaluated = design.eval().fuse_scale(scale, inputs.features[scale], inputs.mask, None, None)
    assert torch.equal(evaluated.fused, mean)
    assert evaluated.loss is None


def test_hidden_modalities_learn_from_the_divergence() -> None:
    """What the case has takes part in the term, also where one modality alone is visible; what it lacks does not."""
    spec = make_spec()
    design = make_design("uhved", spec).train()
    inputs = make_pass(spec, [[1, 1, 0]])
    features = [f.requires_grad_() for f in inputs.features]
    visible = torch.tensor([[True, False, False]])
    state = design.begin_training(inputs.mask)
    results = [design.fuse_scale(s, features[s], visible, None, state) for s in (2, 1, 0)]
    sum(result.loss for result in results).backward()
    for feature in features:
        size = feature.grad.abs().flatten(2).amax(2)[0]
        assert (size[:2] > 0).all()
        assert size[2] == 0


def test_the_network_tells_what_the_case_has() -> None:
    """The same mask, another availability: another term; and the fused prediction stays."""
    net = network(options_with(fusion="uhved", width_factor=1.0), modalities=3).train()
    x = torch.randn(1, 3, 16, 16, 16)
    visible = torch.tensor([[True, False, False]])
    outputs = []
    for available in (visible, torch.tensor([[True, True, False]])):
        torch.manual_seed(1)
        outputs.append(net(x, View(visible, available), Needs()))
    assert torch.equal(outputs[0].student[0], outputs[1].student[0])
    assert outputs[0].fusion_loss.item() != outputs[1].fusion_loss.item()


def test_log_variance_starts_below_the_prior() -> None:
    """Also after the network's own weight initialisation."""
    net = network(options_with(fusion="uhved", width_factor=1.0))
    for head in net.fusion.scales:
        mean_bias, log_variance_bias = head.bias.unflatten(0, (4, 2, -1)).unbind(1)
        assert (mean_bias == 0).all()
        assert (log_variance_bias == -2).all()


def test_extreme_log_variances_stay_finite() -> None:
    spec = make_spec()
    design = make_design("uhved", spec)
    for extreme in (-1e4, 1e4):
        with torch.no_grad():
            for head in design.scales:
                head.bias.fill_(extreme)
        results = run(design, make_pass(spec, [[1, 1, 1]]))
        sum(r.fused.sum() + r.loss for r in results).backward()
        assert all(r.fused.isfinite().all() and r.loss.isfinite() for r in results)
        assert all(p.grad.isfinite().all() for p in design.parameters())


def test_removal() -> None:
    """Masking a modality equals never having had it."""
    spec = make_spec()
    design, smaller = make_design("uhved", spec).eval(), make_design("uhved", make_spec(modalities=2)).eval()
    keep = [0, 2]
    smaller.load_state_dict({k: take_modalities(v, keep, 3, 0) for k, v in design.state_dict().items()})
    inputs = make_pass(spec, [[1, 0, 1]])
    removed = run(smaller, inputs._replace(features=[f[:, keep] for f in inputs.features], mask=inputs.mask[:, keep]))
    for one, two in zip(run(design, inputs), removed, strict=True):
        torch.testing.assert_close(one.fused, two.fused, atol=1e-5, rtol=1e-5)


def test_number_of_parameters() -> None:
    widths = (32, 64, 128, 256, 320, 320)
    spec = make_spec(modalities=4, channels=widths, strides=((1,) * 3, *((2,) * 3,) * 5), kernel_sizes=((3,) * 3,) * 6)
    count = sum(p.numel() for p in build_fusion("uhved", spec).parameters())
    assert count == sum(4 * (2 * c**2 + 2 * c) for c in widths)
    assert round(count / 1e6, 2) == 2.34


@pytest.mark.parametrize("patch", [(16, 12), (8, 12, 12)])
def test_reconstruction_trains_and_costs_nothing_when_off(patch: tuple[int, ...]) -> None:
    """Every parameter has a gradient; off, it has none; the images of modalities the case lacks do not count."""
    torch.manual_seed(0)
    on, off = (
        network(
            options_with(fusion="uhved", fusion_options={"reconstruction_weight": weight}, width_factor=1.0),
            modalities=3,
            patch=patch,
            deep_supervision=True,
        ).train()
        for weight in (0.1, 0.0)
    )
    assert off.fusion.images is None
    assert not any("images" in key for key in off.state_dict())
    assert (off.fusion.wants_images, on.fusion.wants_images, len(on.fusion.images)) == (False, True, 3)
    x = torch.randn(2, 3, *patch)
    available = torch.tensor([[True, True, True], [True, True, False]])
    mask = torch.tensor([[True, False, False], [False, True, False]])
    losses = []
    for absent in (0.0, 1e3, float("nan")):
        x[1, 2] = absent
        torch.manual_seed(1)
        output = on(x, View(mask, available), Needs(complete="target", modality=True))
        losses.append(output.fusion_loss)
    assert losses[0].item() == losses[1].item() == losses[2].item()
    sum(part.square().mean() for part in (*output.student, output.modality, output.fusion_loss)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in on.parameters())
    assert all(decoder.head.weight.grad.abs().max() > 0 for decoder in on.fusion.images)


def test_reconstruction_error_by_hand() -> None:
    """The mean over voxels and over what a case has, its hidden modalities included."""
    predicted, images = torch.zeros(2, 2, 3), torch.tensor([[[1.0] * 3, [2.0] * 3], [[3.0] * 3, [50.0] * 3]])
    available = torch.tensor([[True, True], [True, False]])
    assert reconstruction_error(predicted, images, available).item() == pytest.approx(((1 + 4) / 2 + 9) / 2)
    design = build_fusion("uhved", make_spec(modalities=2, options={"reconstruction_weight": 0.1}))
    fused = [torch.randn(2, c, *make_spec().feature_size(s)) for s, c in enumerate(design.spec.channels)]
    target = torch.randn(2, 2, *make_spec().patch_size)
    predicted = torch.cat([decoder(fused) for decoder in design.images], 1)
    assert design.image_loss(fused, target, available).item() == pytest.approx(
        0.1 * reconstruction_error(predicted, target, available).item()
    )


def test_image_decoders_learn_to_show_the_image() -> None:
    """From features that hold the image: a quarter of the error of the best constant, in 150 steps."""
    torch.manual_seed(0)
    design = build_fusion("uhved", make_spec("2d", modalities=2, options={"reconstruction_weight": 1.0}))
    images = torch.randn(2, 2, 10, 14)
    fused = [torch.randn(2, c, *design.spec.feature_size(s)) for s, c in enumerate(design.spec.channels)]
    fused[0][:, :2] = images
    optimizer = torch.optim.Adam(design.images.parameters(), 1e-2)
    for _ in range(150):
        loss = design.image_loss(fused, images, torch.ones(2, 2).bool())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 * images.var().item()
