"""The block op on CUDA."""

from cnnlstm_fast.ops.cuda import register

register("conv_block", "conv_block", "forward", x_at=0)
register("conv_block_backward", "conv_block", "backward", x_at=1)
