"""Tensor parallelism: several processes hold some heads of an attention module each, and what variants learn of them.

What is learnt is kept as torch's DTensor, as the model's own weights are: whole in a state dict, with an optimizer and
when it is saved. Variants compute with this process's part of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def own_tensor(module: nn.Module) -> Any:
    """A parameter of a module that several processes share, `None` if there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    return next((p for p in module.parameters() if isinstance(p, DTensor)), None)


def refuse_uneven(name: str, whole: nn.Module, part: nn.Module, ranks: int) -> None:
    """NotImplementedError if what a variant of all heads learns is not a row of what those of some heads learn.

    Args:
        name: of the variant.
        whole: made for all heads.
        part: the same, made for those of this process.
        ranks: how many processes there are.
    """
    own = part.state_dict()
    for key, tensor in whole.state_dict().items():
        shape = own[key].shape if key in own else None
        apart = [size for size in zip(tensor.shape, shape or (), strict=False) if size[0] != size[1]]
        is_share = len(apart) < 2 and all(every == ranks * mine for every, mine in apart)
        if shape is None or tensor.dim() != len(shape) or not is_share:
            raise NotImplementedError(
                f"The variant {name!r} has {key} {tuple(tensor.shape)} for all heads, and {shape and tuple(shape)} for "
                "those of one process of tensor parallelism: it cannot be split by head."
            )


def joined(whole: nn.Module, part: nn.Module, module: nn.Module) -> Any:
    """The variant of this process's heads, whose tensors are shares of those of all heads.

    Every process must call it at the same time. Where processes drew other numbers, those of the first are taken.

    Args:
        whole: made for all heads, with the values.
        part: the same, made for those of this process.
        module: the attention module.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = own_tensor(module).device_mesh
    tensors = dict(whole.state_dict(keep_vars=True))
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        holder = part.get_submodule(path)
        mine: torch.Tensor = getattr(holder, key)
        split = next((dim for dim, size in enumerate(tensor.shape) if size != mine.shape[dim]), None)
        placement = Replicate() if split is None else Shard(split)
        shared: Any = distribute_tensor(tensor.detach(), mesh, [placement])
        if isinstance(mine, nn.Parameter):
            holder._parameters[key] = nn.Parameter(shared, requires_grad=tensor.requires_grad)
        else:
            holder._buffers[key] = shared
    return part


def is_part(tensor: torch.Tensor) -> bool:
    """Whether processes hold parts of a tensor."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that processes hold parts of, all of which must call it at the same time; others as is."""
    found: Any = tensor.detach()
    whole: torch.Tensor = found.full_tensor() if is_part(found) else found
    return whole


def of_all_heads(tensor: torch.Tensor, dim: int, module: nn.Module) -> torch.Tensor:
    """What processes have of their heads, put together along a dimension; every one of them must call it.

    Args:
        tensor: of this process's heads.
        dim: the dimension that is of heads.
        module: the attention module.
    """
    found: torch.Tensor = _OfAll.apply(tensor, dim, own_tensor(module).device_mesh)
    return found


def alike(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """What each process computes alike of all heads, for a loss that each of them has: its gradient is shared out."""
    if not tensor.requires_grad:
        return tensor
    found: torch.Tensor = _Alike.apply(tensor, own_tensor(module).device_mesh.size())
    return found


def first_process(model: nn.Module) -> bool:
    """Whether this is the process that writes files: the first of those that share the model, or the only one."""
    like = own_tensor(model)
    return like is None or torch.distributed.get_rank() == 0


@contextmanager
def in_step(model: nn.Module, what: Any = None) -> Iterator[None]:
    """A block that all processes which share a model leave together, and in which one error is the error of all.

    Else those without it would wait for the others in the next exchange, for ever. Every process must come to it;
    inside they exchange nothing but in further such blocks, so that who fails meets the others at the end of theirs.

    Args:
        model: it may be a model that no other process shares: nothing is done then.
        what: what must be the same in all of them, to be compared when the block ends.

    Raises:
        ValueError: that differs.
        ValueError, TypeError, NotImplementedError, RuntimeError: what another process raised, the last for all else.
    """
    like = own_tensor(model)
    if like is None:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if getattr(error, _TOLD, False):  # at the end of a block inside
            raise
        own = error
    errors = _from_all(like, None if own is None else (type(own).__name__, str(own)), repr(what))
    if own is not None:
        setattr(own, _TOLD, True)
        raise own
    if errors:
        setattr(errors[0], _TOLD, True)
        raise errors[0]


_TOLD = "_patchattn_told_to_all"
_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, NotImplementedError)}


def _from_all(like: Any, error: tuple[str, str] | None, what: str) -> list[Exception]:
    """What other processes raised, or that they came with something else; empty if all is well everywhere."""
    mesh = like.device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else None
    told: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(told, (error, what), group=group)
    failed = [(rank, *failure) for rank, (failure, _) in enumerate(told) if failure is not None]
    if failed:
        rank, kind, text = failed[0]
        return [_KINDS.get(kind, RuntimeError)(f"Process {rank} of those that share the model raised {kind}: {text}")]
    other = next((rank for rank, (_, said) in enumerate(told) if said != told[0][1]), None)
    if other is None:
        return []
    return [
        ValueError(
            "The processes that share a model must all do the same with it. Process 0 came with "
            f"{told[0][1][:500]}, process {other} with {told[other][1][:500]}."
        )
    ]


@contextmanager
def own_parts(variant: nn.Module) -> Iterator[None]:
    """This process's part of a variant's tensors in their place, while one of its stages runs."""
    from torch.distributed.tensor import DTensor

    held = [
        (tensors, name, tensor)
        for module in variant.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if isinstance(tensor, DTensor)
    ]
    for tensors, name, tensor in held:
        tensors[name] = _local(tensor)  # type: ignore[assignment]
    try:
        yield
    finally:
        for tensors, name, tensor in held:
            tensors[name] = tensor  # type: ignore[assignment]


def _local(tensor: Any) -> torch.Tensor:
    """A process's part. Of what all hold alike, each process finds the gradient of its own heads: they are added up."""
    local: torch.Tensor = tensor.to_local()
    (placement,) = tensor.placements
    return added(local, tensor) if placement.is_replicate() else local


def added(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """A tensor that all processes hold alike, and whose gradient is the sum of theirs.

    Args:
        tensor: it.
        like: a parameter that the same processes share.
    """
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    found: torch.Tensor = _Added.apply(tensor, like.device_mesh.get_group())
    return found


class _Added(torch.autograd.Function):
    """The identity, whose gradient is summed over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class _OfAll(torch.autograd.Function):
    """Parts put together, whose gradients are summed over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dim: int, mesh: Any) -> torch.Tensor:
        ctx.dim, ctx.mesh, ctx.size = dim, mesh, tensor.shape[dim]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=mesh.get_group())
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.mesh.get_group())
        return total.narrow(ctx.dim, ctx.mesh.get_local_rank() * ctx.size, ctx.size), None, None


class _Alike(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of processes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, processes: int) -> torch.Tensor:
        ctx.processes = processes
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] / ctx.processes, None
