"""Which linears are quantized: `targets` and filter_fn, in the decoder's layers and beside them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mbq_ao.calibration.experts import ExpertParameter
from mbq_ao.calibration.settings import FilterFn, Targets
from mbq_ao.calibration.validate import holders_of_matrices
from mbq_ao.vision_tower import find_vision_tower


def selected_linears(
    blocks: Mapping[str, nn.Module],
    experts: Mapping[str, list[ExpertParameter]],
    routers: Mapping[str, list[str]],
    targets: Targets,
    filter_fn: FilterFn | None,
    beside: Mapping[str, nn.Linear],
) -> dict[str, dict[str, nn.Linear]]:
    """Block name -> {name in the block: linear to be quantized}.

    Of experts in one parameter all or none: a filter gets the first of them, and the parameter's name.
    Raises ValueError if there is none, and none `beside` the blocks that a filter as `targets` has chosen instead.
    """
    filters = [f for f in (targets, filter_fn) if callable(f)]
    passing: dict[str, dict[str, nn.Linear]] = {name: {} for name in blocks}
    names = []
    for block_name, block in blocks.items():
        parameter_of = {n: e.name for e in experts[block_name] for n in e.linear_names()}
        passes: dict[str, bool] = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and name not in routers[block_name]:
                shown = parameter_of.get(name, name)
                if shown not in passes:
                    names.append(f"{block_name}.{shown}")
                    passes[shown] = all(f(module, names[-1]) for f in filters)
                if passes[shown]:
                    passing[block_name][name] = module
    if not any(passing.values()) and not (callable(targets) and beside):
        raise ValueError(
            f"nothing to quantize: none of the {len(names)} nn.Linear in the {len(blocks)} decoder layers passes "
            f"{'targets and filter_fn' if callable(targets) else 'filter_fn'}; it is given names like {names[0]!r}"
            if names
            else f"nothing to quantize: the {len(blocks)} decoder layers have no nn.Linear, but "
            f"{holders_of_matrices(blocks)}; replace those by nn.Linear, or pass blocks=[...] with other layers"
        )
    return passing


def vision_side(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of the vision tower and of what lies between it and the decoder: all but the decoder, the
    embeddings, the head and other modalities' encoders. Raises ValueError if there is no vision tower.
    """
    tower = find_vision_tower(model)
    if tower is None:
        raise ValueError(
            f'targets="decoder+vision" needs a vision tower, but {type(model).__name__} has none that transformers\' '
            'get_encoder("image") finds; pass targets=(module, fqn) -> bool to choose its linears yourself'
        )
    inside = set(tower.modules())
    others = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings(), *layers.values()]
    others.append(model.get_encoder(modality="audio"))
    excluded = {
        module
        for other in others
        if isinstance(other, nn.Module) and tower not in (around := set(other.modules())) and other not in inside
        for module in around
    }
    return {name: module for name, module in model.named_modules() if module not in excluded}


def linears_beside(
    model: nn.Module, layers: Mapping[str, nn.Module], targets: Targets, filter_fn: FilterFn | None
) -> dict[str, nn.Linear]:
    """The linears outside of the decoder's `layers` that `targets` and filter_fn choose, by their full names.

    Raises ValueError if "decoder+vision" has none.
    """
    if targets == "decoder":
        return {}
    in_layers = {module for layer in layers.values() for module in layer.modules()}
    modules = dict(model.named_modules()) if callable(targets) else vision_side(model, layers)
    linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) and m not in in_layers}
    filters = [f for f in (targets, filter_fn) if callable(f)]
    chosen = {name: linear for name, linear in linears.items() if all(f(linear, name) for f in filters)}
    if not chosen and not callable(targets):
        raise ValueError(
            f'targets="decoder+vision" has nothing to quantize beside the decoder: none of the {len(linears)} '
            f"nn.Linear of the vision tower and the projector passes filter_fn; it is given names like "
            f"{next(iter(linears), '')!r}"
        )
    return chosen
