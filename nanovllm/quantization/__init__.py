"""Weight formats: how the matrix of a linear layer is stored, loaded and multiplied.

The linear layers know how a matrix is split over the tensor-parallel ranks; they leave everything
else to a `WeightFormat`: `unquantized.py`, and beside it a file for each quantised format. Which
layer of a checkpoint is in which format is read in `read_scheme.py`.
"""
