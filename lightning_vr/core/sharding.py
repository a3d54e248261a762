"""Sharded parameters: each rank keeps the rows of a parameter that are its own.

What torch calls FSDP2 (``torch.distributed.fsdp.fully_shard``, Zhao et al. 2023, arXiv 2304.11277)
gathers the parameters of a block for its forward and backward pass, and sums the gradients so that
each rank is left with its own rows of their mean over the ranks. Parameters and gradients are
``DTensor`` otherwise. A forward pass is then a collective: all ranks make equally many, or hold
the weights whole (``whole_weights``) while they make as many as they like.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_vr.core.distributed import broadcast


def is_sharded(module: nn.Module) -> bool:
    """Return whether parameters of a module are sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def local(x: Tensor) -> Tensor:
    """Return the rows of a tensor that this rank has, all where it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def placed_like(x: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor that every rank has whole as this rank's rows, if ``parameter`` is sharded.

    Args:
        x: The tensor, of the shape of the parameter; a sharded one is returned as it is.
        parameter: A parameter.
    """
    if not isinstance(parameter, DTensor) or isinstance(x, DTensor):
        return x
    whole = x.to(parameter.device)
    # each rank has the whole: nothing need be sent
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard(module: nn.Module, mesh: DeviceMesh, block_size: int) -> None:
    """Shard all trained parameters of a module, after rank 0's values; all ranks call it.

    Each child with trained parameters is gathered as a whole, frozen ones included, but for its
    blocks: parts with at least ``block_size`` parameters, in lists or by themselves, of what a
    child wraps if all of it is one part. What trains nothing, as a teacher, stays whole on each
    rank. A module that is sharded stays as it is.

    Args:
        module: The module, on the device of the mesh. It need not be called itself; children that
            have a ``forward`` must be called through it.
        mesh: The ranks.
        block_size: Least number of parameters of a block.

    Raises:
        ValueError: If a trained parameter is in no module that is called, two of these share one,
            or one is a single number.
    """
    if is_sharded(module):
        return
    called = list(_called(module))
    _check(called)
    for x in [*module.parameters(), *module.buffers()]:
        x.detach().copy_(broadcast(x.detach().contiguous()))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    for child in called:
        for p in child.parameters():
            p.data = p.data.contiguous()  # rows are cut from contiguous ones
        for block in _blocks(child, block_size):
            fully_shard(block, **options)
        fully_shard(child, **options)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a module whole on each rank, for passes without gradients.

    All ranks must enter it. Within it they may call the module as often as each likes.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        yield  # not sharded, or whole already
        return
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def synchronize_gradients(module: nn.Module, *, enabled: bool) -> None:
    """Choose whether backward passes reduce gradients over the ranks, or keep them for the next."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled, recurse=False)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children that train something, of one without ``forward`` its own."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            raise ValueError(
                f"Trained parameters must be in a child of the module to be sharded, but `{name}` "
                f"is in the {type(module).__name__} itself: put it into a module that is called."
            )
    for child in module.children():
        if _trains(child):
            yield from [child] if _is_called(child) else _called(child)


def _check(called: list[nn.Module]) -> None:
    """Raise if a parameter would be whole in one child and sharded in another, or has no rows."""
    owners: dict[int, tuple[nn.Module, nn.Module]] = {}
    for child in called:
        for path, part in child.named_modules():
            for name, p in part.named_parameters(recurse=False):
                where = f"`{f'{path}.{name}'.strip('.')}` of the {type(child).__name__}"
                owner, first = owners.setdefault(id(p), (part, child))
                if owner is not part and first is not child:
                    raise ValueError(
                        f"A parameter to be sharded must be in one child of the module, but "
                        f"{where} is in the {type(first).__name__} too: put both into a module "
                        f"that is called, or train with 'ddp'."
                    )
                if p.ndim == 0:
                    raise ValueError(
                        f"A parameter to be sharded must have rows, but {where} is a single "
                        f"number: make it one of shape (1,), or train with 'ddp'."
                    )


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _blocks(module: nn.Module, size: int) -> Iterator[nn.Module]:
    """Yield the blocks of a module, which share no parameters with the rest."""
    named = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    for child in module.children():
        own = [id(p) for _, p in child.named_parameters(remove_duplicate=False)]
        # a sequence may be called by its parts
        is_opened = isinstance(child, nn.Sequential) or not _is_called(child)
        if is_opened or len(own) == len(named):
            yield from _blocks(child, size)
            continue
        is_shared = any(named.count(each) > own.count(each) for each in set(own))
        if sum(p.numel() for p in child.parameters()) >= size and not is_shared:
            yield child
