"""Frozen models: weights packed and norms folded once, the program one call into C++.

- :mod:`.capture` gets a model's graph by ``torch.export``; :mod:`.passes` folds and fuses it; :mod:`.lower`
  makes plain data of it (:mod:`.nodes`), with :mod:`.layouts` for the order of maps in memory and
  :mod:`.sizes` for open sizes.
- :mod:`.plans` times plans of blocks; :mod:`.program` runs the nodes, and :mod:`.int8` says which of them
  multiply in int8.
- :mod:`.versions` is a program with what it holds for; :mod:`.module` the module that chooses among them, and
  :mod:`.pieces` what runs where there is no program of the whole. :mod:`.trials` finds whether a program does
  what the model does.
- :mod:`.archive` keeps it in a file; :mod:`.stream` runs it chunk by chunk.
"""

from cnnlstm_fast.freeze.module import Frozen, freeze, load_frozen

__all__ = ["Frozen", "freeze", "load_frozen"]
