"""An op given as two functions, forward and backward, made one that autograd and gradcheck can call."""

import torch


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, *tensors):
        ctx.backward_function = backward
        ctx.save_for_backward(*tensors)
        return forward(*tensors)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *ctx.backward_function(gradient, *ctx.saved_tensors)


def attached(forward, backward):
    """A function of tensors: `forward(*tensors)`, whose gradients are `backward(gradient, *tensors)`."""
    return lambda *tensors: _Pair.apply(forward, backward, *tensors)


def draw(*shape, seed=0, dtype=torch.float64):
    """Random numbers of a shape that want a gradient."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
