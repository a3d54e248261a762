"""Checkpoints of sharded weights: one file, or a folder with a file of each rank.

Both hold what a checkpoint of whole weights holds, optimizer states and averages included. One file
*is* such a checkpoint: rank 0 gathers tensor by tensor. A folder has ``meta.pt``, the checkpoint
with a note in place of each sharded tensor, and ``rank-<i>.pt`` with the rows of each rank; a mark
in all of them tells them from those of other folders. It is written beside its place and renamed,
so that it is whole or not there. Either is read on any number
of ranks, sharded or not: only rows that a rank keeps are read there. No file needs more than
``torch.load(weights_only=True)``, while the metadata of ``torch.distributed.checkpoint`` is a
pickle, which a stranger's checkpoint must not be.
"""

import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lightning_vr.core.distributed import gather_objects, rank, world_size
from lightning_vr.core.sharding import local
from lightning_vr.lifecycle.atomic_files import (
    hidden_folder,
    new_folder,
    recovered,
    replace_by_hidden_folder,
    replacing,
)

_META = "meta.pt"
_SHARDED = "lightning_vr.sharded"
"""Marks the note that stands for a sharded tensor: ``{_SHARDED: number, "shape": shape}``."""


def is_sharded_folder(path: Any) -> bool:
    """Return whether a path is a folder that ``save_folder`` has written."""
    return "://" not in str(path) and (recovered(Path(path)) / _META).is_file()


def gathered(checkpoint: Any) -> Any:
    """Return a checkpoint with whole tensors on the CPU of rank 0; all ranks call it."""
    # one tensor may stand in two places, as an average does
    found: dict[int, Tensor] = {}

    def whole(x: DTensor) -> Tensor:
        if id(x) not in found:
            full = x.full_tensor()
            found[id(x)] = full.cpu() if rank() == 0 else full.new_empty(0)
        return found[id(x)]

    return _mapped(checkpoint, whole)


def save_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder, whole or not at all; all ranks call it.

    Raises:
        OSError: On all ranks, if any of them could not write its file.
    """
    rows: list[Tensor] = []
    numbers: dict[int, int] = {}  # as in `gathered`

    def note(x: DTensor) -> dict[str, Any]:
        if id(x) not in numbers:
            numbers[id(x)] = len(rows)
            rows.append(local(x).detach().cpu())
        return {_SHARDED: numbers[id(x)], "shape": list(x.shape)}

    noted, partial = _mapped(checkpoint, note), hidden_folder(path)
    with ExitStack() as stack:
        _on_rank_zero(lambda: stack.enter_context(new_folder(path)))
        (mark, *_), error = gather_objects(secrets.token_hex(8)), None
        try:
            part = {"mark": mark, "rank": rank(), "rows": rows}
            _write(part, partial / _file(rank()))
            if rank() == 0:
                meta = {"mark": mark, "ranks": world_size(), "checkpoint": noted}
                _write(meta, partial / _META)
        except OSError as found:
            error = str(found)
        reasons = [each for each in gather_objects(error) if each is not None]
        if reasons:
            raise OSError(reasons[0])
        _on_rank_zero(lambda: _put_in_place(path))


def load_folder(path: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Return a checkpoint that ``save_folder`` has written.

    Args:
        path: The folder.
        mesh: The ranks to shard its tensors over as they were, in rows; whole if not given.

    Raises:
        ValueError: If a file of it is missing, damaged or of another folder.
    """
    path = recovered(path)
    meta = _read(path / _META, mark=str, ranks=int, checkpoint=dict)
    parts = [_part(path / _file(number), meta["mark"], number) for number in range(meta["ranks"])]

    def load(note: dict[str, Any]) -> Tensor:
        return _rows([part[note[_SHARDED]] for part in parts], torch.Size(note["shape"]), mesh)

    try:
        loaded: dict[str, Any] = _mapped(meta["checkpoint"], load, _is_note)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:  # or a list in itself
        raise ValueError(
            f"`ckpt_path` must be a checkpoint of this package, but what the files of the folder "
            f"{path} hold does not fit together ({type(error).__name__}): use another checkpoint."
        ) from error
    return loaded


def _part(file: Path, mark: str, number: int) -> list[Tensor]:
    """Return the rows of a rank."""
    if not file.is_file():
        raise ValueError(
            f"`ckpt_path` must be a whole checkpoint, but the folder {file.parent} lacks "
            f"{file.name}: copy all of its files, or use another checkpoint."
        )
    part = _read(file, mark=str, rank=int, rows=list)
    if (part["mark"], part["rank"]) != (mark, number):
        raise ValueError(
            f"`ckpt_path` must be one checkpoint, but {file} is of another, or of another rank: "
            f"copy all files of one folder together, or use another checkpoint."
        )
    rows: list[Tensor] = part["rows"]
    return rows


def _mapped(
    state: Any,
    function: Callable[[Any], Any],
    is_wanted: Callable[[Any], bool] = lambda x: isinstance(x, DTensor),
) -> Any:
    """Return nested dictionaries and lists with some of what they hold replaced, in order."""
    if is_wanted(state):
        return function(state)
    if isinstance(state, dict):
        return {name: _mapped(x, function, is_wanted) for name, x in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_mapped(x, function, is_wanted) for x in state)
    return state


def _is_note(x: Any) -> bool:
    return isinstance(x, dict) and _SHARDED in x


def _rows(parts: list[Tensor], shape: torch.Size, mesh: DeviceMesh | None) -> Tensor:
    """Return a tensor of the rows of all ranks, or this rank's rows of it."""
    if (sum(map(len, parts)), *parts[0].shape[1:]) != tuple(shape):
        raise ValueError("the rows are those of another shape")
    if mesh is None:
        return torch.cat(parts)
    # as torch shards: equal chunks, of which the last may be smaller or missing
    size = -(-shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * size, shape[0])
    stop = min(start + size, shape[0])
    own, position = [parts[0][:0]], 0
    for part in parts:
        own.append(part[max(start - position, 0) : max(stop - position, 0)])
        position += len(part)
    stride = torch.empty(shape, device="meta").stride()
    mine = torch.cat(own).to(mesh.device_type)
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _write(state: Any, path: Path) -> None:
    with replacing(path) as file:
        torch.save(state, file)


def _read(path: Path, **kinds: type) -> dict[str, Any]:
    """Return what a file holds: a dictionary with values of some kinds."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(found[name], kind) for name, kind in kinds.items()):
            raise TypeError
        return found  # type: ignore[no-any-return]
    except Exception as error:  # whatever torch meets in a damaged file
        raise ValueError(
            f"`ckpt_path` must be a checkpoint that loads safely, but its file {path} does not "
            f"({type(error).__name__}): use another checkpoint."
        ) from error


def _put_in_place(path: Path) -> None:
    files = (hidden_folder(path) / _file(number) for number in range(world_size()))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise OSError(
            f"{', '.join(missing)} of other nodes is not in {path.parent}: use a folder that all "
            f"nodes share, or one file, save_distributed_checkpoint=False"
        )
    replace_by_hidden_folder(path)


def _file(number: int) -> str:
    return f"rank-{number}.pt"


def _on_rank_zero(function: Callable[[], object]) -> None:
    """Call a function on rank 0, and let all ranks wait for it and share its error."""
    error = None
    if rank() == 0:
        try:
            function()
        except OSError as found:
            error = str(found)
    (reason, *_) = gather_objects(error)
    if reason is not None:
        raise OSError(reason)
