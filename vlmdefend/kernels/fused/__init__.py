"""The kernels in Triton. Only ``dispatch`` leads here: importing a file of this folder imports Triton."""
