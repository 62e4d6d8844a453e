"""Figures: functions that take plain data or arrays and return a `matplotlib.figure.Figure`.

They use no pyplot, keep no global state and need neither torch nor nnU-Net. `style.save` writes a figure to disk.

* `subsets`: score per modality subset and region, score against the number of modalities
* `shapley`: what each modality is worth
* `differences`: methods against a baseline, with intervals
* `qualitative`: modalities, ground truth and predictions of cases
* `internals`: what the network does inside (single-modality predictions, soft label, confidence, features)
* `training`: losses and meta-parameters over the epochs
* `slices`: volumes in display orientation, the most telling slice, the crop around the head
"""
