"""Models whose layers lie in shards on several ranks: Transformers' tensor parallelism.

Every rank runs the same call. Layers sum up what the ranks have computed, so that all of them see
the same hidden states; and draws go by seeds and counters, so that all of them draw the same
tokens. Nothing is sent about but sums of layers and, of a head in shards, a few numbers a row.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..blends.blend import Blend, as_blend
from ..models.hf import underlying

if TYPE_CHECKING:
    from .simple.term_model import TermModel

REFUSED = "an error"  # what a rank asks for whose call is refused


class RanksDiffer(ValueError):
    """Ranks make different calls. All of them raise it, as they would wait for each other."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that have the shards of a call's models.

    Attributes:
        group: the process group of torch.distributed.
    """

    group: Any

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def each(self, what: str, own: Any) -> list[Any]:
        """What every rank has of something that all of them must ask for.

        Raises:
            RanksDiffer: another rank asks for something else, or its call was refused.
        """
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, (what, own), group=self.group)
        for rank, (asked, x) in enumerate(found):
            if asked == REFUSED != what:
                raise RanksDiffer(f"rank {rank} of {self.size} refused the call: {x}")
        if any(asked != what for asked, _ in found):
            each = ", ".join(f"rank {rank} for {asked}" for rank, (asked, _) in enumerate(found))
            raise RanksDiffer(f"ranks make different calls; at the same time {each}")
        return [x for _, x in found]

    def seed_of_all(self, seed: Any, drawn: int) -> Any:
        """The seed that all ranks were given, or what the first one has drawn if none was.

        Raises:
            RanksDiffer: some were given one.
        """
        given = self.each("a seed", (seed is not None, drawn))
        if len({was_given for was_given, _ in given}) > 1:
            raise RanksDiffer("seed is None on some ranks alone; each must make the same call")
        return given[0][1] if seed is None else seed

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Refuse what differs from rank to rank: they would wait for each other for ever.

        Args:
            given: numbers, texts, tensors and lists of these, by what they are called.

        Raises:
            RanksDiffer: names the first that differs.
        """
        own = {name: _digest(x) for name, x in given.items()}
        each = self.each("the call", own)
        names = dict.fromkeys(name for x in each for name in x)
        other = next((n for n in names if any(x.get(n) != own.get(n) for x in each)), None)
        if other is not None:
            raise RanksDiffer(
                f"{other} differs between the {self.size} ranks that have the models' shards; each "
                "must make the same call, with the same seed"
            )


@dataclass(frozen=True)
class Shard:
    """The columns of a head that this rank has.

    Attributes:
        first, end: the tokens of the first column, and after the last.
        columns: how many all ranks have together.
    """

    ranks: Ranks
    first: int
    end: int
    columns: int

    def gathered(self, logits: Tensor) -> Tensor:
        """Logits ``[..., columns]``, from those ``[..., end - first]`` of each rank."""
        most = -(-self.columns // self.ranks.size)
        own = torch.nn.functional.pad(logits, (0, most - logits.shape[-1]))
        return torch.cat([*self.reduce(own[None])], dim=-1)[..., : self.columns]

    def part(self, x: Tensor) -> Tensor:
        """The shard's columns of what has all of them; what has just these is given as it is."""
        return x if x.shape[-1] == self.end - self.first else x[..., self.first : self.end]

    @property
    def reduce(self) -> ops.Reduce:
        """What `ops.merge` gathers between the ranks by."""
        return ops.all_gather(self.ranks.group)


def ranks_of(models: Sequence[TermModel]) -> Ranks | None:
    """The ranks that have shards of some of these models; None if all models are whole.

    Raises:
        NotImplementedError: two models are on other ranks.
    """
    found: dict[Any, str] = {}
    for model in models:
        group = _group_of(model.bare)
        if group is not None:
            found.setdefault(group, model.name)
    if len(found) > 1:
        one, other, *_ = found.values()
        raise NotImplementedError(
            f"{one} and {other} are in shards on different ranks; they must be on the same, or one "
            "of them whole on each"
        )
    return Ranks(next(iter(found))) if found else None


@contextmanager
def together(blend: Any) -> Iterator[None]:
    """What makes a call, up to where ranks see that it is the same on all of them. If it is refused
    on one rank, the others are told, and do not wait for it."""
    try:
        yield
    except RanksDiffer:
        raise
    except Exception as error:
        with suppress(Exception):  # The error itself says what is wrong.
            found = as_blend(getattr(blend, "blend", blend))  # A recipe has one.
            terms: list[Any] = [*found.terms, *found.values]
            groups = [_group_of(underlying(x.model)) for x in terms]
            group = next((g for g in groups if g is not None), None)
            if group is not None:
                Ranks(group).each(REFUSED, f"{type(error).__name__}: {error}")
        raise


def kind_of(blend: Blend) -> Any:
    """What decides which rounds a draw takes, whatever the models are called."""
    return [
        *(len(blend.terms), len(blend.values), len(blend.classifiers)),
        *(blend.power, blend.support, [(p.power, p.min, p.max) for p in blend.parts]),
    ]


def shard_of(head: Any) -> Shard | None:
    """The columns of a linear head that this rank has; None if the head is no such shard."""
    weight = getattr(head, "weight", None)
    mesh = _mesh_of(weight)
    if mesh is None or type(head) is not torch.nn.Linear:
        return None
    if "forward" not in vars(head):  # Other shards, as of FSDP, are gathered by their module.
        return None
    from torch.distributed.tensor import Shard as Sharded

    assert weight is not None
    if tuple(weight.placements) != (Sharded(0),):
        return None
    ranks, columns = Ranks(mesh.get_group()), weight.shape[0]
    most = -(-columns // ranks.size)  # of a rank; the last ones may have fewer
    first = min(ranks.rank * most, columns)
    end = first + weight.to_local().shape[0]
    return Shard(ranks, first, end, columns)


def local(x: Any) -> Any:
    """The numbers of a parameter that this rank has."""
    return x if _mesh_of(x) is None else x.to_local()


def _group_of(model: Any) -> Any:
    """The process group that has the shards of a model; None if it is whole."""
    if (getattr(model, "tp_size", None) or 1) == 1:
        return None
    meshes = (_mesh_of(p) for p in model.parameters())
    return next((mesh.get_group() for mesh in meshes if mesh is not None), None)


def _mesh_of(x: Any) -> Any:
    """The mesh of a parameter that lies in shards on the ranks of a tensor parallel model."""
    module = sys.modules.get("torch.distributed.tensor")  # Where there are shards, it is there.
    if module is None or not isinstance(x, module.DTensor):
        return None
    mesh = x.device_mesh
    named = mesh.mesh_dim_names in (None, ("tp",))  # Transformers 5.17 gives it no name.
    return mesh if named and mesh.ndim == 1 and mesh.size() > 1 else None


def _digest(x: Any) -> str:
    if isinstance(x, Tensor):
        x = x.tolist()
    return hashlib.sha256(repr(x).encode()).hexdigest()
