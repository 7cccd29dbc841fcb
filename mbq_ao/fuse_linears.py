"""One launch for linears that read the same input: q, k, v, or gate and up.

Decoding a token of a 7B model is about 200 small matrix products of a few microseconds each, so launches count; and
with W4A8 an input is quantized once for all of its readers.

    fuse_linears_(model)                                          the weights of neighbours lie in one piece of memory
    compiled = torch.compile(model, options=compile_options())    calls on the same input become one

The layout: the packed tiles of sibling linears, their scales, zero points and biases are copied into one storage
each, one after the other, and every weight keeps a view. Nothing is held twice, and one long view serves all of them.
The merging: a pass over torch.compile's graph, where "the same input" is a fact, not a guess from names. Calls whose
weights do not lie together are still right; they just stay several launches.

Off by default: whether fewer launches pay is to be measured on the GPU at hand (benchmarks/gpu.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from mbq_ao.kernels import int3_ops, w4a8_ops  # noqa: F401  (registers torch.ops.mbq_ao)
from mbq_ao.packed_weight import PackedWeight

# A linear's op: (x, data of the weight, bias, ...), how many tensors the data are, and the op of several linears, which
# takes lists for these and for the bias.
_GROUP_OPS = {
    torch.ops.mbq_ao.int3_linear.default: (3, torch.ops.mbq_ao.int3_linear_group.default),
    torch.ops.mbq_ao.w4a8_linear.default: (2, torch.ops.mbq_ao.w4a8_linear_group.default),
}


def fuse_linears_(model: nn.Module) -> list[list[str]]:
    """Lay the quantized weights (and biases) of sibling linears of equal width together, in place.

    Siblings: neighbours in one parent module with the same type of weight, in_features, group size, dtype and device,
    each but the last with whole tiles of rows (32 of MBQInt3Tensor, 16 of MBQW4A8Tensor). Values, shapes and results
    do not change; the parameters are new objects. Every other linear is left as it is, and so are the experts of a
    mixture, which lie in one parameter already.
    Returns the names of the linears laid together, a list a group; empty if there is nothing to do.
    `unfuse_linears_` undoes it; do that before saving a checkpoint, as file formats may not like shared storage.
    """
    groups = [
        [(f"{name}.{child}".removeprefix("."), m) for child, m in run]
        for name, p in model.named_modules()
        for run in neighbours(p)
    ]
    new: list[tuple[nn.Module, str, nn.Parameter]] = []
    for group in groups:
        linears = [linear for _, linear in group]
        joined = {
            name: torch.cat([getattr(m.weight, name) for m in linears]) for name in linears[0].weight.tensor_data_names
        }
        bias = torch.cat([m.bias.detach() for m in linears]) if linears[0].bias is not None else None
        for i, linear in enumerate(linears):
            parts = {n: t.split([getattr(m.weight, n).shape[0] for m in linears])[i] for n, t in joined.items()}
            weight = linear.weight._replace(**parts)
            new.append((linear, "weight", nn.Parameter(weight, requires_grad=False)))
            if bias is not None:
                part = bias.split([m.out_features for m in linears])[i]
                new.append((linear, "bias", nn.Parameter(part, requires_grad=linear.bias.requires_grad)))
    for linear, name, parameter in new:
        linear._parameters[name] = parameter
    return [[name for name, _ in group] for group in groups]


def unfuse_linears_(model: nn.Module) -> None:
    """Give every quantized weight, and its linear's bias, memory of its own again, in place."""
    for linear in model.modules():
        if _is_candidate(linear):
            weight = linear.weight._apply_fn_to_data(torch.clone)
            linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            if linear.bias is not None:
                bias = linear.bias.detach().clone()
                linear._parameters["bias"] = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)


def compile_options(mode: str | None = None) -> dict[str, Any]:
    """Options for `torch.compile(model, options=...)` under which calls on the same input are merged.

    mode: one of torch.compile's modes ("reduce-overhead", ...); options and mode exclude each other there.
    """
    base = torch._inductor.list_mode_options(mode) if mode else {}
    return {**base, "post_grad_custom_pre_pass": MergeLinears()}


class MergeLinears(CustomGraphPass):
    """Inductor pass: the linear ops on one input become one op of the group and a slice each."""

    def __call__(self, graph: fx.Graph) -> None:
        order = {node: i for i, node in enumerate(graph.nodes)}
        calls: dict[tuple[Any, ...], list[fx.Node]] = {}
        for op, (num_data, _) in _GROUP_OPS.items():
            for node in graph.find_nodes(op="call_function", target=op):
                x, _, scale, *_ = node.args
                bias, *shared = node.args[num_data + 1 :]
                key = (op, x, scale.meta["val"].dtype, bias is None, *shared)
                calls.setdefault(key, []).append(node)
        for nodes in calls.values():
            # All weights must be there at the first call: parameters are, computed weights may not be.
            nodes = [n for n in nodes if all(order[a] < order[nodes[0]] for a in n.all_input_nodes)]
            if len(nodes) > 1:
                _merge(graph, nodes)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    num_data, group_op = _GROUP_OPS[nodes[0].target]
    x, *_ = nodes[0].args
    *data, bias = ([node.args[i] for node in nodes] for i in range(1, num_data + 2))
    shared = nodes[0].args[num_data + 2 :]
    biases = [] if bias[0] is None else bias

    def emit(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    with graph.inserting_before(nodes[0]):
        joined = emit(group_op, x, *data, biases, *shared)
        start = 0
        for node in nodes:
            end = start + node.meta["val"].shape[-1]
            # The calls' results are contiguous, and what follows may have been traced for that.
            part = emit(torch.ops.aten.slice.Tensor, joined, node.meta["val"].dim() - 1, start, end)
            part = emit(torch.ops.aten.clone.default, part) if not part.meta["val"].is_contiguous() else part
            node.replace_all_uses_with(part)
            start = end
    for node in nodes:
        graph.erase_node(node)


def neighbours(parent: nn.Module) -> Iterator[list[tuple[str, nn.Linear]]]:
    """Two or more neighbours among the children of `parent` that can be laid together."""
    for candidate, children in groupby(parent.named_children(), key=lambda child: _key(child[1])):
        run: list[tuple[str, nn.Linear]] = []
        for name, linear in children if candidate is not None else ():
            run.append((name, linear))
            if linear.out_features % linear.weight.TILE_N:  # the next would begin within a tile
                if len(run) > 1:
                    yield run
                run = []
        if len(run) > 1:
            yield run


def _key(module: nn.Module) -> tuple[Any, ...] | None:
    """What neighbours must have in common; None for what is not a linear with a quantized weight."""
    if not _is_candidate(module):
        return None
    weight, bias = module.weight, module.bias
    of_bias = None if bias is None else (bias.dtype, bias.requires_grad)
    return (type(weight), weight.shape[1], tuple(weight.block_size), weight.dtype, weight.device, of_bias)


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and isinstance(module.weight, PackedWeight) and not module.weight.transposed
