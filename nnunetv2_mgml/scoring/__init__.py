"""Evaluation over modality subsets: from label maps to scores, tables, statistics and figures.

Data flow: `sources` (which files belong together) -> `scoring` (`metrics` under a `policy`, case by case) ->
`results` (the tidy table) -> `tables`, `statistics`, figures. `model_evaluation` makes the label maps first, all
subsets of a case from one pass of the encoders. Importing the package imports neither torch nor nnU-Net.
"""
