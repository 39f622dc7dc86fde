"""What gloo lacks in older versions of torch (2.1), made of what it has: bf16, and collectives on one tensor for all ranks."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

DONE = SimpleNamespace(wait=lambda: None, is_completed=lambda: True)


def _wide(tensor):
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor.clone()


def _in_float32(collective):
    """A collective that changes its first argument in place."""

    def call(tensor, *args, async_op=False, **kwargs):
        wide = _wide(tensor)
        collective(wide, *args, **kwargs)
        tensor.detach().copy_(wide)
        return DONE if async_op else None

    return call


def _gather(output_tensor, input_tensor, group=None, async_op=False):
    parts = [_wide(input_tensor).flatten() for _ in range(dist.get_world_size(group))]
    gather(parts, parts[0].clone(), group)
    output_tensor.detach().copy_(torch.cat(parts).view_as(output_tensor))
    return DONE if async_op else None


def _gather_list(tensor_list, tensor, group=None, async_op=False):
    parts = [_wide(one) for one in tensor_list]
    gather(parts, _wide(tensor), group)
    for one, part in zip(tensor_list, parts, strict=True):
        one.detach().copy_(part)
    return DONE if async_op else None


def _reduce_scatter(output, tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
    whole = _wide(tensor).flatten()
    reduce(whole, op, group)
    output.detach().copy_(whole.chunk(dist.get_world_size(group))[dist.get_rank(group)].view_as(output))
    return DONE if async_op else None


gather, reduce = dist.all_gather, dist.all_reduce
IN_PLACE = {name: _in_float32(getattr(dist, name)) for name in ("broadcast", "all_reduce", "reduce")}


def install():
    """Put them in the place of torch.distributed's."""
    for module in (dist, dist.distributed_c10d):
        for name, collective in IN_PLACE.items():
            setattr(module, name, collective)
        module.all_gather = _gather_list
        module.all_gather_into_tensor = _gather
        module.reduce_scatter_tensor = _reduce_scatter
