"""What runs thousands of times a second, in terms of tensors and lists alone.

A minibatch goes through them in this order: `routing` assigns samples to experts by their gate's logits; `mlp` takes
rows sorted by expert through all layers, forward and backward; `mixture` is gate, routing and experts in one call;
`distributions` has log probabilities of actions; `gram` the penalty's matrix; `backward` finds gradients of few rows
without ever storing them and hands each to `adam`; `gradients` keeps stored ones cheap where most experts saw no
sample. `threads` runs two things side by side, and `script` says where TorchScript is used. Where it is not, the loops
run as the plain Python they are, but for those of `backward`, whose place autograd takes then.
"""
