"""One file per op: schema, fake kernel, autograd, and where its kernels are registered."""
