"""What people ask for in one call: a request in, files and a result out. Commands, trainers and scripts call the same.

`evaluate` (a model, or finished predictions), `compare` (evaluations), `report` (an HTML page), `demo` (all of it).
Nothing here parses arguments or prints. Importing the package imports neither torch nor nnU-Net.
"""
