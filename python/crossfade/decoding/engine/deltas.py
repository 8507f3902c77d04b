"""Several adapters over one backbone in one forward: each row has those of its own term.

A row of a term that is a mix has its own part of each. Adapters may be those of one PEFT model, or
of several whose backbones are the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...blends.mixes import Mix
from .modules import Forward, Unsupported, dtype_of, is_plain, weight_of
from .tape import shelf


class Adapted(NamedTuple):
    """A model and what it applies to its rows.

    Attributes:
        bare: the model without PEFT's wrapper.
        adapter: the name of one, a mix, "active" for those that the model itself has switched on,
            or None for no adapter.
    """

    bare: nn.Module
    adapter: str | Mix | None


class Deltas:
    """Low-rank adapters over one backbone, for rows that each use their own.

    A layer computes ``y = x Wᵀ + ((x Aᵀ) * scale) Bᵀ``, where A and B hold all adapters' ranks, one
    below the other. A row's `scale` is its adapters' scaling in the columns of their ranks, and 0
    in those of other adapters. In rows of a mix, the scaling of each adapter is multiplied by the
    row's share of it.

    Attributes:
        replacements: what runs in the place of the forward of each layer that has adapters, in the
            first member's model, which is the one that runs.
        mixed: the names of the adapters that terms mix. These are of one model.
        programs: what earlier calls have recorded.
        stacks: the A and B of each layer, by its name. Where an earlier call has left some of the
            same shapes, they are written anew where they lie, so that programs find them there.

    Args:
        members: the model and the adapter of each lane of rows. All have one backbone.
        backend: of `ops.linear`.

    Raises:
        Unsupported: a layer applies an adapter in another way.
    """

    def __init__(self, members: Sequence[Adapted], backend: str | None = None) -> None:
        self.programs = shelf.lend(self, members[0].bare, len(members))
        self.stacks = self.programs.stacks
        self.adapters, self.backend = [m.adapter for m in members], backend
        mixed = {name for m in self.adapters if isinstance(m, Mix) for name in m.names}
        self.mixed = tuple(sorted(mixed))
        # Layers whose adapters have equal scalings share a table [members, ranks] of them. From it
        # come the scales [B, ranks] of the rows of a forward.
        # Where terms mix adapters, each rank's column has the place of its adapter's share in those
        # of a row.
        self.tables: dict[Any, Tensor] = {}
        self.places: dict[Any, Tensor] = {}
        self.scales: dict[Any, Tensor] = {}
        self.layers: list[tuple[str, int]] = []  # the names, and the place of each one's table
        trees = {id(m.bare): dict(m.bare.named_modules()) for m in members}
        adapted = {
            name: None
            for tree in trees.values()
            for name, module in tree.items()
            if hasattr(module, "_active_adapter")
        }
        runs = trees[id(members[0].bare)]
        self.replacements: dict[nn.Module, Forward] = {
            runs[name]: self._replacement(
                name, runs[name], [trees[id(m.bare)].get(name) for m in members]
            )
            for name in adapted
            if name in runs  # An adapter of another model's head is no part of the backbone.
        }

    @property
    def layout(self) -> object:
        """What is equal for adapters whose numbers lie in the same places and are used alike."""
        places = [x.data_ptr() for name, _ in self.layers for x in self.stacks[name]]
        return self.layers, places, list(self.tables)

    def shares(self, member: int, weights: Sequence[float] | None) -> list[float]:
        """The shares that a row of a term has of the adapters in `mixed`, and then 1.

        That last one is for adapters that no term mixes. So a row of a term that mixes none has
        shares of 1 alone.

        Args:
            weights: of the adapters of the term's mix. None: the term's own, which are NaN where
                each request has its own.
        """
        mix = self.adapters[member]
        if not isinstance(mix, Mix):
            return [1.0] * (len(self.mixed) + 1)
        if weights is None:
            weights = [float("nan") if isinstance(w, tuple) else w for w in mix.weights]
        of = dict(zip(mix.names, weights, strict=True))
        return [*(of.get(name, 0.0) for name in self.mixed), 1.0]

    def seat(self, member: Tensor, shares: Tensor) -> None:
        """Say what the rows of the next forward are.

        Args:
            member: ``[B]``: the number of each row's term.
            shares: ``[B, mixed + 1]``: what `shares` gives for each row.
        """
        for key, table in self.tables.items():
            scale = table[member]
            self.scales[key] = scale * shares[:, self.places[key]] if self.mixed else scale

    def _replacement(self, name: str, runs: Any, layers: Sequence[Any]) -> Forward:
        """A forward of the layer that runs, by which each row gets the adapters of its own term.

        Args:
            layers: the layer in the model of each member; those without adapters are plain.
        """
        used: list[set[tuple[int, str]]] = []  # of each member: whose adapters, and their names
        owners: dict[int, Any] = {}
        for layer, adapter in zip(layers, self.adapters, strict=True):
            if not hasattr(layer, "_active_adapter"):
                used.append(set())
                continue
            _check_kind(layer)
            owners.setdefault(id(layer), layer)
            used.append({(id(layer), name) for name in _used(layer, adapter)})
        applied = [
            (owner, name)
            for owner in owners
            for name in sorted({name for each in used for o, name in each if o == owner})
        ]
        for owner, layer in owners.items():
            _check_adapters(layer, [name for o, name in applied if o == owner])
        base = runs.base_layer if hasattr(runs, "_active_adapter") else runs
        if not applied:
            return lambda x, *args, **kwargs: base(x)
        names = [name for _, name in applied]
        a = [owners[owner].lora_A[name].weight for owner, name in applied]
        b = [owners[owner].lora_B[name].weight for owner, name in applied]
        signature = tuple(
            tuple(
                owners[its[0]].scaling[its[1]] if its in each else 0.0
                for its, x in zip(applied, a, strict=True)
                for _ in range(len(x))
            )
            for each in used
        )
        device, dtype = a[0].device, dtype_of(base)
        known = {name: i for i, name in enumerate(self.mixed)}
        places = tuple(
            known.get(n, len(known)) for n, x in zip(names, a, strict=True) for _ in range(len(x))
        )
        key = (signature, places, device)
        if key not in self.tables:
            self.tables[key] = torch.tensor(signature, device=device)
            self.places[key] = torch.tensor(places, device=device)
        # Forwards that took these from `self` would refer to this object in a circle.
        scales, backend = self.scales, self.backend
        stacked_a = torch.cat(a).detach().to(dtype)
        stacked_b = torch.cat(b, dim=1).detach().to(dtype)
        before = self.stacks.get(name)
        if before is not None and _are_alike(before, (stacked_a, stacked_b)):
            for old, new in zip(before, (stacked_a, stacked_b), strict=True):
                old.copy_(new)
            stacked_a, stacked_b = before
        self.stacks[name] = stacked_a, stacked_b
        self.layers.append((name, list(self.tables).index(key)))

        if is_plain(base):

            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                lora = ops.Lora(stacked_a, stacked_b, scales[key])
                return ops.linear(x, weight_of(base), base.bias, lora=lora, backend=backend)

        else:  # Conv1D and quantized layers multiply in ways of their own; deltas are added after.

            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                scale = scales[key].to(x.dtype)[:, None]
                low = nn.functional.linear(x, stacked_a) * scale
                return base(x) + nn.functional.linear(low, stacked_b)

        return forward


def _are_alike(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return all(
        (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        for x, y in zip(before, now, strict=True)
    )


def _used(layer: Any, adapter: str | Mix | None) -> list[str]:
    """The adapters that a term with `adapter` applies in this layer."""
    names = adapter.names if isinstance(adapter, Mix) else [adapter]
    if adapter == "active":  # Merged adapters are in the base's weight already.
        names = [] if layer._disable_adapters or layer.merged else layer.active_adapters
    return [n for n in names if n in layer.lora_A]  # type: ignore[misc]


def _check_kind(layer: Any) -> None:
    """Refuse layers that apply an adapter in another way than LoRA on a linear layer."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear:
        raise Unsupported(f"PEFT's {type(layer).__name__} layers take one adapter at a time")
    if layer.merged and layer._disable_adapters:
        raise Unsupported("adapters are merged and disabled: PEFT unmerges them when they run")
    if "forward" in layer.__dict__:
        raise Unsupported("a layer with adapters has a forward of somebody else's")


def _check_adapters(layer: Any, names: Sequence[str]) -> None:
    """Refuse adapters whose rows cannot go through a layer together with rows of other adapters."""
    for n in names:
        if n in layer.lora_variant:
            raise Unsupported(f"adapter {n!r} is a variant of LoRA (DoRA or its like)")
        if layer.lora_bias[n]:
            raise Unsupported(f"adapter {n!r} has a bias")
        dropout = layer.lora_dropout[n]
        if type(dropout) is not nn.Identity and dropout.training:
            raise Unsupported(f"adapter {n!r} has dropout and is in training mode")
