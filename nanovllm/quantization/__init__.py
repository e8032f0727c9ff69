"""Weight formats: how the matrix of a linear layer is stored, loaded and multiplied.

The linear layers know how a matrix is split over the tensor-parallel ranks; they leave everything
else to a `WeightFormat`. A new format (FP8, INT4) is one more file here.
"""
