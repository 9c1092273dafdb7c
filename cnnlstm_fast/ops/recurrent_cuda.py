"""The recurrent layer op on CUDA."""

from cnnlstm_fast.ops.cuda import register

register("recurrent_layer", "recurrent", "forward", x_at=0)
register("recurrent_layer_backward", "recurrent", "backward", x_at=3)
