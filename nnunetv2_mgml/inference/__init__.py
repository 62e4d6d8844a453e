"""Prediction with missing modalities: from the files of a case to its segmentation.

Data flow: `inputs` (which files exist, which modalities count) -> `reading` (whole files on one grid) ->
`preprocessing` (nnU-Net's own, absent channels empty) -> `predictor` (the sliding window, told what is absent) ->
`export` (complete files only) and `report` (``mgml_prediction.json``). `predict` is ``nnUNetv2_predict`` with our
flags.
"""
