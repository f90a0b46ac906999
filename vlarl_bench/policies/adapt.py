"""Which weights learn: parts frozen by name, and low-rank adapters (LoRA, Hu et al., 2022) by way of peft."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BenchError, install

if TYPE_CHECKING:
    from .base import Policy

TRANSFORMER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a language model's blocks, as transformers names them."""
READ_DIRECTLY = frozenset({"lm_head"})
"""Linear layers that are never called: policies that draw tokens read those rows of the weight that stand for actions,
and an adapter beside it would do nothing."""


def freeze(policy: Policy, parts: Sequence[str]) -> None:
    """Freezes parameters and modules by dotted name, such as `network.vision_backbone`.

    They leave `actor_parameters` as well. Raises BenchError for a name that is none, listing what there is.
    """
    for part in parts:
        frozen = [p for name, p in policy.named_parameters() if within(name, part)]
        if not frozen:
            known = part
            while known and not any(within(name, known) for name, _ in policy.named_parameters()):
                known = known.rpartition(".")[0]
            level = known.count(".") + 2 if known else 1
            names = {n for n, _ in policy.named_parameters() if not known or within(n, known)}
            there = sorted({".".join(name.split(".")[:level]) for name in names})
            raise BenchError(f"freeze: {part!r} is no part of the policy; there are {', '.join(there)}")
        for parameter in frozen:
            parameter.requires_grad_(False)
        policy.frozen = (*policy.frozen, part)


def within(name: str, part: str) -> bool:
    """Whether a dotted parameter name is `part` or lies inside it."""
    return name == part or name.startswith(f"{part}.")


def learning(policy: Policy, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of `parameters` that may learn: not frozen, and only adapters where the policy has any. Of a steered policy
    it is the steering, and nothing else."""
    if policy.steering is not None:
        return list(policy.steering.parameters())
    names = {id(p): name for name, p in policy.named_parameters()}
    adapted = any(".lora_" in name for name in names.values())
    kept = [p for p in parameters if not any(within(names[id(p)], part) for part in policy.frozen)]
    return [p for p in kept if ".lora_" in names[id(p)]] if adapted else kept


def add_lora(
    policy: Policy, rank: int = 32, alpha: int | None = None, targets: Sequence[str] = (), seed: int = 0
) -> None:
    """Puts adapters beside the actor's linear layers called `targets`; from then on only they are the actor.

    Without `targets` that is every linear layer of a transformer's blocks, and where the actor has none, such as Octo's
    head, every linear layer. An adapter adds alpha / rank B A x, with B zero at first, in float32; alpha is the rank
    unless given.
    Raises BenchError if peft is not installed, if the actor has no such layer or one that cannot be adapted
    (`READ_DIRECTLY`), or if the policy is steered.
    """
    if policy.steering is not None:
        raise BenchError("lora: the base is a steered policy, whose weights stay as they are; leave it out")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise BenchError(f"lora: needs peft, which is not installed; {install('lora')}") from None
    actor = {id(p) for p in policy.actor_parameters()}
    linear = [n for n, m in policy.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in actor]
    layers = [name for name in linear if name.rpartition(".")[2] not in READ_DIRECTLY]
    there = ", ".join(sorted({name.rpartition(".")[2] for name in layers})) or "none that is not adapted already"
    direct = sorted({name.rpartition(".")[2] for name in linear} & READ_DIRECTLY & set(targets))
    if direct:
        raise BenchError(
            f"lora: targets {direct}; rows of its weight are read and the layer is never called, so an adapter beside "
            f"it would do nothing; what can be adapted is {there}"
        )
    chosen = [name for name in layers if name.rpartition(".")[2] in (targets or TRANSFORMER)]
    if not targets and not chosen:
        chosen = layers
    if rank < 1 or not chosen:
        raise BenchError(
            f"lora: rank {rank}, targets {list(targets or TRANSFORMER)}; the actor's linear layers are {there}"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, policy)
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:  # small steps would be lost in half precision; peft's own models do the same
            parameter.data = parameter.data.float()
    policy.eval()


def merge_lora(policy: Policy) -> None:
    """Adds the adapters to the weights beside them and takes them away: the policy has its own keys again."""
    for name, layer in _adapted(policy):
        layer.get_base_layer().weight.data = _merged(layer)
        parent, _, child = name.rpartition(".")
        setattr(policy.get_submodule(parent), child, layer.get_base_layer())


def merged_state(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors, in order of the keys, that the policy's `state_dict` would have after `merge_lora`; one by one,
    and the policy stays as it is."""
    layers = dict(_adapted(policy))
    names = {}
    for key in policy.state_dict():
        layer = next((name for name in layers if key.startswith(f"{name}.")), None)
        if layer is None or ".base_layer." in key:
            names[key.replace(".base_layer.", ".") if layer else key] = key
    state = policy.state_dict()
    for own in sorted(names):
        layer, _, parameter = own.rpartition(".")
        yield own, _merged(layers[layer]) if layer in layers and parameter == "weight" else state[names[own]]


def _adapted(policy: Policy) -> list[tuple[str, Any]]:
    """Layers with adapters, by name."""
    return [(name, module) for name, module in policy.named_modules() if hasattr(module, "lora_A")]


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """A layer's weight with its adapter. Where that adds nothing, the weight stays the same to the bit."""
    weight: Tensor = layer.get_base_layer().weight
    added = layer.get_delta_weight("default")
    return torch.where(added == 0, weight, (weight.float() + added.float()).to(weight.dtype))
