"""How blocks are found in any running program, and run as one.

Every convolution of an accelerated model has a :class:`~cnnlstm_fast.fusion.site.ConvSite` in the place of
its ``_conv_forward``, which gets the very tensors that PyTorch's own would get.

1. *Observe.* The first call of a convolution in each mode runs as it is, but its result notes who
   consumes it (:mod:`~cnnlstm_fast.fusion.observe`). A norm, an activation or a pool in the order of a
   block makes the chain longer; anything else ends it.
2. *Speculate.* In later calls the whole block runs where the convolution stands, on what its operands
   are at that moment. The program gets placeholders, each expected step confirms, and the last one
   gets the result (:mod:`~cnnlstm_fast.fusion.speculate`). Whoever looks at a placeholder gets
   PyTorch's value, in the same Python object, and the site is observed again. Such values are computed
   before anybody writes to what they are computed from (:mod:`~cnnlstm_fast.fusion.writes`).
3. *Hand on.* A result that was seen to go to another convolution lies channels-last, until anybody else
   looks at it (:mod:`~cnnlstm_fast.fusion.handoff`).

All this happens only inside a *session*: the outermost ``forward`` of the model. What is still held when a
session ends becomes a plain tensor (:mod:`~cnnlstm_fast.fusion.session`).
"""
