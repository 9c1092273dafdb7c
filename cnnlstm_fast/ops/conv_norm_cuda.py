"""The block op with a batch norm on CUDA; statistics from products of taps are the CPU's alone."""

from cnnlstm_fast.ops.cuda import register

register("fold_norm", "conv_norm", "fold", x_at=0)
register("conv_norm_block", "conv_norm", "forward", x_at=0)
register("conv_norm_block_backward", "conv_norm", "backward", x_at=1)
