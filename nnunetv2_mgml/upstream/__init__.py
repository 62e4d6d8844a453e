"""Every place where nnU-Net, or a library under it, is bent: one file each.

What replaces or wraps a function, class or attribute of theirs, reads a private one, or repeats the body of one with a
change lies here, and nowhere else; tests/upstream/test_list.py holds it to that. Each file says at its top what it
bends, why, and which test fails when a new release changes it:

- `registration`: nnU-Net's search path for trainers, its predict and preprocessing commands, by the start-up line.
- `incomplete_data`: fingerprint and preprocessing of data sets in which modalities are missing.
- `predict_command`: the parser and the predictor inside nnU-Net's predict commands, the parser of its training command.
- `sliding_window`: the number of output channels nnU-Net's sliding window allocates.
- `checkpoints`: ``torch.load`` while nnU-Net loads a model, so that no file runs code.
- `export`: the writer inside nnU-Net's export of a prediction.
- `decoder`: the steps of nnU-Net's decoder.
- `distributed`: the wrapper for several processes, in a training that ``torchrun`` has started.
- `first_epoch`: the steps of nnU-Net's trainer by which a training has begun.
- `pretrained_weights`: the function nnU-Net's training calls for ``-pretrained_weights``.
- `cpu_layers`: the kernels of PyTorch's 3d convolutions and instance norms on a CPU.
- `raised_convolution`: two layers of nnU-Net's decoder as one, where a CPU predicts.
- `live_bytes`: PyTorch on shapes without data, and what would be alive.
- `allocator`: two limits of glibc's allocator while a network predicts on a CPU.
- `loss`: nnU-Net's training loss without a trainer.
- `plain_errors`: what nnU-Net's commands print of a user's mistake, ``sys.excepthook``.
- `loaders`: the body of the trainer's hook that makes nnU-Net's loaders.
- `training_step`: the body of the trainer's hook for one step.
- `validation_cases`: the class of data sets nnU-Net's final validation loads its cases from.
- `optimizer_state`: the optimizer whose state nnU-Net loads from a checkpoint.
- `best_checkpoint`: the moving average by which nnU-Net's trainer chooses the best checkpoint.
- `blur`: the choice of nnU-Net's blur between two methods.
- `wrappers`: the network behind ``torch.compile`` and DistributedDataParallel.

Subclasses that override hooks of nnU-Net stay with what they are for: `training.trainer`, `dataloading.loader`,
`inference.predictor` and `inference.subsets.predictor`. tests/upstream/test_upstream_drift.py and
tests/upstream/test_inference_drift.py pin their signatures, and the bodies they repeat or rely on: those that
`inference.predictor` names, `nnUNetPredictor.predict_logits_from_preprocessed_data`, which it calls, and
`DefaultPreprocessor.run_case` and `preprocess_fromfiles_save_to_queue`, whose order `inference.preprocessing` keeps,
and `DatasetFingerprintExtractor.run`, `analyze_case`, which `incomplete_data` repeats.
"""
