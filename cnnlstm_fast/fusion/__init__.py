"""How blocks are found in any running program, and run as one call.

Each convolution of an accelerated model has a :class:`~cnnlstm_fast.fusion.site.ConvSite` in the place of
its ``_conv_forward``. The site gets the tensors that PyTorch's own method would get.

1. *Observe* (:mod:`~cnnlstm_fast.fusion.observe`). The first call of a convolution in each mode runs as
   PyTorch's. Its result notes which function reads it. A norm, an activation or a pool in the order of a
   block extends the observed chain. Any other reader ends it.
2. *Speculate* (:mod:`~cnnlstm_fast.fusion.speculate`). A later call runs the whole block where the
   convolution stands, on its operands' values at that moment. The program gets placeholders. Each observed
   step that it takes again confirms the speculation, and the last step returns the block's result. If the
   program does anything else with a placeholder, the placeholder becomes PyTorch's value, as the same
   Python object, and the site observes again. Before the program writes to an operand, the placeholders
   that are computed from it get their values (:mod:`~cnnlstm_fast.fusion.writes`).
   Steps in another order than a block's (a sum with another tensor, a norm behind an activation) are a
   *program*: a first call runs the convolution, and an epilogue the other steps
   (:mod:`cnnlstm_fast.ops.epilogue`). It waits for the program's sum, whose other operand may not exist
   before. A block that does not pay may pay as a program.
3. *Carry* (:mod:`~cnnlstm_fast.fusion.carry`). In a session that carries, maps lie channels-last from
   convolution to convolution. One gets PyTorch's layout when anything else looks at it.

Costs decide which way a site runs (:mod:`~cnnlstm_fast.fusion.plan`), as PyTorch's operators or as a block,
and whether a session carries. Costs are predicted, or timed where :class:`cnnlstm_fast.tune` asks for it
(:mod:`~cnnlstm_fast.fusion.timing`).

All this happens only in a *session*, which is the outermost ``forward`` of the model. When the session ends,
every special tensor that the program still holds becomes a plain one
(:mod:`~cnnlstm_fast.fusion.session`).

The files, lowest first: ``match`` (what a block is), ``calls`` (function calls as parts of a block),
``layout`` (where PyTorch would put a result), ``run`` (one call of the block function), ``context`` (modes
and operands of a call), ``tensors`` (what the Tensor subclasses share), ``carry``, ``ways`` (the ways to run
a site), ``plan`` (what is known of one chain), ``writes`` (watching for writes to operands), ``observe``,
``graph`` (a speculated call for autograd), ``speculate``, ``timing`` (of the ways), ``site``.
"""
