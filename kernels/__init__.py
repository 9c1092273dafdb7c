"""Triton kernels, installed as ``cnnlstm_fast.kernels``. Importing this package imports no Triton."""
