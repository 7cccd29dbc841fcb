"""The front door: `quantize_(model, mbq_config(calib_data))`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.transform_module import register_quantize_module_handler

from mbq_ao.config import Int3WeightOnlyConfig, Int8DynamicActivationInt4WeightMBQConfig, show_weight
from mbq_ao.int3_tensor import MBQInt3Tensor
from mbq_ao.packed_weight import PackedWeight
from mbq_ao.quant_primitives import by_row_slabs
from mbq_ao.vision_tower import rounded_weights, vision_linears
from mbq_ao.w4a8_tensor import MBQW4A8Tensor

if TYPE_CHECKING:
    from mbq_ao.calibration.fold import ScaleGroup
    from mbq_ao.calibration.report import CalibrationReport
    from mbq_ao.calibration.settings import CalibrationSettings, Fit

FilterFn = Callable[[nn.Module, str], bool]
_RECIPES = ("best", "mbq", "paper", "smoothquant", "gptq")
_LOSSES = ("mae", "mse")
_TARGETS = ("decoder", "decoder+vision")


@dataclass(kw_only=True)
class MBQConfig(AOBaseConfig):
    """What `mbq_config` returns; its docstring says what the fields mean."""

    calib_data: Iterable[Mapping[str, Any]] = field(repr=False)
    precision: Literal["w3a16", "w4a8"] = "w3a16"
    group_size: int | Literal["auto"] | None = "auto"
    recipe: Literal["best", "mbq", "paper", "smoothquant", "gptq"] = "best"
    balance: bool | None = None
    loss: Literal["mae", "mse"] = "mae"
    propagate_error: bool = False
    n_grid: int = 20
    vision: AOBaseConfig | None = None
    filter_fn: FilterFn | None = None
    scale_groups: Sequence[ScaleGroup] | None = None
    blocks: Sequence[nn.Module] | None = None
    targets: Literal["decoder", "decoder+vision"] | FilterFn = "decoder"

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, tuple(_QUANTIZERS))
        _one_of("recipe", self.recipe, _RECIPES)
        _one_of("loss", self.loss, _LOSSES)
        if not isinstance(self.n_grid, int) or self.n_grid < 1:
            raise ValueError(f"n_grid must be an integer of at least 1, got {self.n_grid!r}; the paper uses 20")
        if self.vision is not None and (
            isinstance(self.vision, (MBQConfig, FqnToConfig)) or not isinstance(self.vision, AOBaseConfig)
        ):
            raise ValueError(
                "vision must be a torchao config that rounds without data, such as "
                f"Int8DynamicActivationInt8WeightConfig(), or None, got {type(self.vision).__name__}"
            )
        if not callable(self.targets):
            _one_of("targets", self.targets, _TARGETS, "a filter (module, fqn) -> bool")
        if self.vision is not None and self.targets == "decoder+vision":
            raise ValueError(
                f"vision={type(self.vision).__name__} rounds the vision tower without calibration, and "
                'targets="decoder+vision" calibrates it; leave out one of them'
            )
        searches = self.recipe in ("mbq", "paper")
        if not searches:
            self._refuse_what_concerns_a_search()
        self.balance = searches if self.balance is None else self.balance
        kind = _QUANTIZERS[self.precision]
        rounding = kind.rounding(**({} if self.group_size == "auto" else {"group_size": self.group_size}))
        in_groups = self.recipe != "paper" or kind.published_in_groups
        self.group_size = rounding.group_size if in_groups else None

    def _refuse_what_concerns_a_search(self) -> None:
        concerns = {"propagate_error": self.propagate_error, "n_grid": self.n_grid != MBQConfig.n_grid}
        if self.recipe == "smoothquant":
            concerns = {"balance": bool(self.balance), **concerns}
        else:
            concerns = {"scale_groups": self.scale_groups is not None, **concerns}
        if any(concerns.values()):
            *others, last = concerns
            raise ValueError(
                f'recipe="{self.recipe}" searches no scales: leave out {", ".join(others)} and {last}, got '
                f'{", ".join(f"{name}={getattr(self, name)!r}" for name in concerns)}; recipe="mbq" takes them'
            )

    def quantizer(self) -> W3A16Quantizer | W4A8Quantizer:
        assert not isinstance(self.group_size, str)  # resolved when this was made
        return _QUANTIZERS[self.precision](self.group_size)

    def settings(self) -> CalibrationSettings:
        from mbq_ao.calibration.settings import RECIPES, CalibrationSettings

        return CalibrationSettings(
            recipe=RECIPES[self.recipe],
            balance=bool(self.balance),
            loss=self.loss,
            propagate_error=self.propagate_error,
            n_grid=self.n_grid,
            quantizer=self.quantizer(),
            scale_groups=self.scale_groups,
            blocks=self.blocks,
            targets=self.targets,
        )


@dataclass(frozen=True)
class _Quantizer:
    """What calibration knows of the tensor it calibrates for: a WeightQuantizer of calibration/settings.py."""

    tensor: ClassVar[type[PackedWeight]]
    rounding: ClassVar[type[Int3WeightOnlyConfig | Int8DynamicActivationInt4WeightMBQConfig]]  # plain rounding
    published_in_groups: ClassVar[bool]  # whether the published code heeds a group size

    group_size: int | None

    def quantize(self, weight: Tensor, s: Tensor | None) -> Tensor:
        return self.tensor.from_hp(_scaled(weight, s), self.group_size, _inverse(weight, s))

    def fit(self, weights: Sequence[Tensor], s: Tensor | None, fit: Fit) -> list[Tensor]:
        scaled = torch.cat([_scaled(w, s) for w in weights])  # rows of all at once: they have their inputs in common
        g = self.group_size or scaled.shape[1]
        choose = partial(self.tensor._choose_grid, group_size=g, scale_dtype=scaled.dtype)
        rounded, grid = fit(scaled.float(), s, choose, self.tensor.NUM_BITS, g)
        rows = [len(w) for w in weights]
        parts = zip(rounded.split(rows), *(values.split(rows) for values in grid), strict=True)
        inverse = _inverse(scaled, s)
        return [self.tensor._from_grid(w, tuple(own), self.group_size, inverse) for w, *own in parts]


class W3A16Quantizer(_Quantizer):
    tensor, rounding, published_in_groups = MBQInt3Tensor, Int3WeightOnlyConfig, True

    def stand_in(self, weight: Tensor, s: Tensor | None) -> Tensor:
        if s is None:
            return MBQInt3Tensor.fake_quantize(weight, self.group_size)

        def rounded(x: Tensor) -> tuple[Tensor]:
            return (MBQInt3Tensor.fake_quantize(_scaled(x, s, dtype), self.group_size) / s.to(dtype),)

        dtype = weight.dtype
        return by_row_slabs(rounded, weight)[0]

    def while_fitting(self, fitted: Tensor) -> Tensor:
        # Unpacked once, and not for every batch.
        return fitted if fitted.act_pre_scale is not None else fitted.dequantize()


class W4A8Quantizer(_Quantizer):
    """The rounding of activations cannot be put into a plain weight: the tensor is its own stand-in."""

    tensor, rounding, published_in_groups = MBQW4A8Tensor, Int8DynamicActivationInt4WeightMBQConfig, False

    def stand_in(self, weight: Tensor, s: Tensor | None) -> Tensor:
        # Where W s overflows float16 the scale is to lose the search, not to end it.
        if not _scaled(weight, s).isfinite().all():
            return torch.full_like(weight, torch.nan)
        return self.quantize(weight, s)

    def while_fitting(self, fitted: Tensor) -> Tensor:
        return fitted


def _scaled(weight: Tensor, s: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    return weight if s is None else (weight.float() * s).to(dtype or weight.dtype)


def _inverse(weight: Tensor, s: Tensor | None) -> Tensor | None:
    """1 / s, or what float16 has nearest to it."""
    return None if s is None else (1 / s).clamp(max=torch.finfo(weight.dtype).max).to(weight.dtype)


_QUANTIZERS: dict[str, type[W3A16Quantizer] | type[W4A8Quantizer]] = {"w3a16": W3A16Quantizer, "w4a8": W4A8Quantizer}


def mbq_config(
    calib_data: Iterable[Mapping[str, Any]],
    *,
    precision: Literal["w3a16", "w4a8"] = "w3a16",
    group_size: int | Literal["auto"] | None = "auto",
    recipe: Literal["best", "mbq", "paper", "smoothquant", "gptq"] = "best",
    balance: bool | None = None,
    loss: Literal["mae", "mse"] = "mae",
    propagate_error: bool = False,
    n_grid: int = 20,
    vision: AOBaseConfig | None = None,
    filter_fn: FilterFn | None = None,
    scale_groups: Sequence[ScaleGroup] | None = None,
    blocks: Sequence[nn.Module] | None = None,
    targets: Literal["decoder", "decoder+vision"] | FilterFn = "decoder",
) -> MBQConfig:
    """Modality-balanced quantization, calibrated on `calib_data` (arXiv 2412.19509).

    calib_data: iterable of dicts as a transformers processor returns them for image, question and
        answer, with `labels` (B, T), -100 on every token that is not answer. `vision_mask` and
        `answer_mask`, bool (B, T), override what is found from the model's config and from the labels.
        It is read once; batches may differ in length. `mbq_ao.calibration_data` makes it of conversations, of a
        file or a dataset.
    precision: "w3a16", 3-bit weights with an asymmetric grid, activations as they are. "w4a8", 4-bit weights with a
        symmetric grid, and activations rounded to 8 bits as they come, one scale a token.
    group_size: 32, 64 or 128 input channels share a scale; None: one scale a row. "auto" is 128 for w3a16 and None
        for w4a8. The published code knows no groups for w4a8: there recipe="paper" has one scale a row, whatever
        is given. `group_size` of the config returned is what was decided.
    recipe: "best" does best over both beds of benchmarks/accuracy.py, in both precisions: no scales, but each weight
        fitted to its inputs. Grids are searched for each group, columns make up for each other's rounding (as "gptq"),
        and for what rounding before has changed in the inputs and in the residual stream; the fewer tokens there are,
        the less is made of what they have in common; in the end scales and values are settled once more. Weights are
        fitted to calib_data more closely than by scales: what it lacks, such as plain text, may suffer.
        "mbq" is the corrected calibration of the paper: scales for channels, searched under the balanced loss.
        "paper" computes what the published code computes, number for number: padding counts, answers are not shifted to
        the positions that predict them, o_proj is scaled only where v_proj has its shape, and what no producer can take
        is not scaled.
        To reproduce the paper on several samples, pass them as one padded batch, as its code does. It knows no
        mixtures of experts: they have the groups that "mbq" finds, but for those that no producer can take.
        "smoothquant" is what MBQ is compared with (Xiao et al., arXiv 2211.10438), with exponent 0.5 and on the
        same data: linears after a norm are scaled by a formula, the others not at all. There is nothing to search:
        balance=True, propagate_error=True and another n_grid are refused, and `loss` is only what is reported.
        "gptq": columns make up for each other's rounding (Frantar et al., arXiv 2210.17323), each linear on what the
        quantized ones before it make of the same data, and nothing else of "best".
    balance: weigh vision tokens by how much they move the loss, r, and others by 1. "mbq" and "paper": in the search;
        False is the AWQ-like mean over all tokens. "best" and "gptq": in the fit. None is True for "mbq" and "paper",
        else False, as r does not pay in the fit (benchmarks/README.md).
    loss: "mae" or "mse", the search's distance between outputs (the paper prefers mae).
    propagate_error: of a search: calibrate every block on the output of the quantized blocks before it, which "best"
        and "gptq" always do.
    n_grid: of a search: exponents tried for each scale.
    vision: a torchao config for the linears of the vision tower, by plain rounding, such as torchao's
        Int8DynamicActivationInt8WeightConfig() or our Int8DynamicActivationInt4WeightMBQConfig(). None: the tower
        stays as it is, as in the paper's main tables.
    filter_fn: (module, fqn) -> bool, which nn.Linear of the decoder layers, and with `vision` or `targets` of the
        vision tower, to quantize; None: all of them. Experts in a 3-D parameter are quantized all or none: it gets the
        parameter's name and the first expert, as a linear. Routers are never quantized.
    scale_groups: of recipes that scale: use these groups (names relative to a decoder layer) instead of looking for
        them. They cannot name experts.
    blocks: the decoder layers, where `model.get_decoder()` does not lead to them.
    targets: what is calibrated. "decoder": its layers. "decoder+vision": also the vision tower's blocks and the
        projector, in the same precision and by the same recipe, on the images of calib_data, with all patches counting
        alike. A filter, (module, fqn) -> bool: these nn.Linear of the whole model, whatever they are in; filter_fn then
        narrows what it takes. Not with `vision` for the same linears. With propagate_error, "best" or "gptq" the
        decoder is calibrated behind the quantized tower. The report says stack by stack what was calibrated; which
        linears are rounded without calibration, because they are called alone or behind the decoder's layers (lm_head);
        and which are left alone, because no batch runs them. Convolutions and embeddings stay as they are, and unless a
        filter takes them linears that embed patches.

    Raises ValueError for a value outside these choices.
    """
    return MBQConfig(
        calib_data=calib_data,
        precision=precision,
        group_size=group_size,
        recipe=recipe,
        balance=balance,
        loss=loss,
        propagate_error=propagate_error,
        n_grid=n_grid,
        vision=vision,
        filter_fn=filter_fn,
        scale_groups=scale_groups,
        blocks=blocks,
        targets=targets,
    )


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: FilterFn | None = None,
    device: torch.types.Device = None,
    *,
    compute_device: torch.types.Device = None,
    progress: bool = True,
    work_dir: str | os.PathLike[str] | None = None,
    distributed: bool = True,
) -> CalibrationReport | None:
    """Quantize the model in place. A superset of `torchao.quantization.quantize_`.

    With `mbq_config(calib_data)`: calibrates, then turns the linears of the language model's decoder layers into
    MBQInt3Tensor or MBQW4A8Tensor weights (with `targets` or `vision`, those of the vision tower as well), and returns
    the report.
    Any other config is handed to torchao's own `quantize_` and None is returned.

    filter_fn: (module, fqn) -> bool; only linears for which it is true are quantized.
    device: where to compute, and where the quantized model ends up, as with torchao. None: the model stays where it is.
    compute_device: where to compute, if not where the model ends up. Decoder layers and blocks of the vision tower go
        there one at a time, activations a batch at a time, so that neither the model nor the data need fit:
        `mbq_ao.calibration.memory.estimate` says what is needed. compute_device="cuda" alone calibrates a model on the
        GPU and leaves it on the host. None: `device`, or each layer where it is.
    progress: show progress bars.
    work_dir: a folder, made if missing, in which each block's scales or fitted weights are kept as soon as they are
        found. If this process dies, even by kill -9, the same call finishes the work and leaves the model bit for bit
        as an uninterrupted one would have (same machine, same versions; others warn). Raises ValueError naming what
        differs if the folder is of another model, other data or another config (`vision` may be another), and if
        another process uses it; OSError if it cannot be written, with the layers before kept. The folder stays at the
        end, and the same call on the unquantized model finishes quickly from it; delete it when you like.
    distributed: where torch.distributed is initialised (torchrun, accelerate launch), all ranks make this call, with
        the same model and all of calib_data; each runs a share of the batches on its `device`, and all end with the
        very model that one alone would make (see calibration/ranks.py). Call it before wrapping the model in DDP or
        FSDP. work_dir is rank 0's. Raises ValueError on all ranks if they were called with different things,
        RuntimeError if another rank fails. False: this process on its own, so that it may be called on one rank.

    If it raises, or is interrupted, the model's parameters and buffers are what they were.

    Memory beyond the model: see mbq_ao/calibration/mbq.py.
    """
    if not isinstance(config, MBQConfig):
        for name, value in {"work_dir": work_dir, "compute_device": compute_device}.items():
            if value is not None:
                raise ValueError(
                    f"{name} is for calibration, but {type(config).__name__} calibrates nothing; leave it out"
                )
        torchao_quantize_(model, config, filter_fn, device)
        return None

    from mbq_ao.calibration.mbq import calibrate
    from mbq_ao.calibration.ranks import joined_ranks
    from mbq_ao.calibration.work_dir import open_work_dir
    from mbq_ao.pretrained import attach

    filters = [f for f in (filter_fn, config.filter_fn) if f is not None]
    passes: FilterFn | None = (lambda module, fqn: all(f(module, fqn) for f in filters)) if filters else None
    to, compute_on = (None if d is None else torch.device(d) for d in (device, compute_device))
    with joined_ranks(distributed) as ranks, open_work_dir(work_dir if ranks.is_first else None) as store:
        # Before the work, as it may raise; calibration does not touch the tower.
        tower = {} if config.vision is None else vision_linears(model, passes)
        if callable(config.targets) and (both := [n for n, m in tower.items() if config.targets(m, n)]):
            raise ValueError(
                f"targets and vision={type(config.vision).__name__} both quantize {both[0]} ({len(both)} linears in "
                "all); leave the vision tower out of one of them"
            )
        tower_weights = {} if config.vision is None else rounded_weights(tower, config.vision)
        plan, report = calibrate(
            model,
            config.calib_data,
            config.settings(),
            filter_fn=passes,
            device=compute_on or to,
            progress=progress,
            store=store,
            ranks=ranks,
        )
        plan.parameters += [(tower[name], "weight", weight) for name, weight in tower_weights.items()]
        report.vision = list(tower_weights)
        report.not_quantized += [name for name in tower if name not in tower_weights]
        plan.apply(model, to, ranks)
    for module, _, value in plan.parameters:
        if isinstance(value, PackedWeight):
            show_weight(module)
    report.settings = {
        name: getattr(config, name)
        for name in ("precision", "group_size", "recipe", "balance", "loss", "propagate_error", "n_grid")
    } | {
        "vision": None if config.vision is None else type(config.vision).__name__,
        "targets": "filter" if callable(config.targets) else config.targets,
    }
    attach(model, report)
    return report


@register_quantize_module_handler(MBQConfig)
def _refuse_module_by_module(module: nn.Module, config: MBQConfig, **kwargs: Any) -> nn.Module:
    raise TypeError(
        "mbq_config needs the whole model to calibrate, but torchao.quantization.quantize_ hands it one module at a "
        "time: call mbq_ao.quantize_(model, mbq_config(calib_data)), which takes torchao's configs as well"
    )


def _one_of(name: str, value: object, allowed: tuple[str, ...], otherwise: str = "") -> None:
    if value not in allowed:
        or_else = f", or {otherwise}" if otherwise else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}{or_else}, got {value!r}")
