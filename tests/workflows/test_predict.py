"""What our flags of nnU-Net's predict commands ask for."""

from __future__ import annotations

import re

import pytest
import torch

from nnunetv2_mgml.workflows.predict import (
    Additions,
    PredictionRequest,
    build_predictor,
    check_request,
    write_additions,
)


def test_only_our_flags_make_it_more_than_nnunet_does() -> None:
    assert not PredictionRequest(trust_checkpoint=True, device="cpu", step_size=1.0).uses_our_flags
    for flag in (
        {"missing_modalities": ["auto"]},
        {"cpu_bfloat16": True},
        {"backend": "openvino"},
        {"preview": True},
        {"save_uncertainty": True},
    ):
        assert PredictionRequest(**flag).uses_our_flags, flag


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (PredictionRequest(preview=True), "--preview needs --missing_modalities"),
        (PredictionRequest(save_uncertainty=True), "--save_uncertainty needs --missing_modalities"),
        (PredictionRequest(backend="openvino"), "--backend needs --missing_modalities"),
        (PredictionRequest(missing_modalities=["auto"], folds=("0", "x")), "got x"),
        (PredictionRequest(missing_modalities=["auto"], step_size=0), "got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(request_: PredictionRequest, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_request(request_)


def test_the_predictor_has_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    request = PredictionRequest(missing_modalities=["auto", "t1"], device="cpu", part=(1, 3), trust_checkpoint=True)
    check_request(request)
    predictor = build_predictor(request, device=torch.device("cpu"))
    assert predictor.missing_modalities == ["auto", "t1"]
    assert predictor.sequential_part == (1, 3)
    assert predictor.trust_checkpoint
    assert threads == [1]
    assert write_additions(request, predictor) == Additions()  # it has written no file
