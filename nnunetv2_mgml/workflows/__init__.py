"""What people ask for in one call: a request in, files and a result out. Commands, trainers and scripts call the same.

`check` (a raw data set), `plan`, `predict` (our flags of nnU-Net's commands), `evaluate` (a model, or finished
predictions), `compare` and `find_best` (evaluations), `report` (an HTML page), `share` and `export_network` (a model),
`demo` (all of it). Nothing here parses arguments or prints. Importing the package imports neither torch nor nnU-Net.
"""
