"""What a calibration is asked to do: the quantizer, the recipe, and which tokens count as what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from mbq_ao.calibration.batch import CalibrationBatch
from mbq_ao.calibration.error_compensation import Grid
from mbq_ao.calibration.fold import ScaleGroup
from mbq_ao.calibration.scale_search import Loss

FilterFn = Callable[[nn.Module, str], bool]
Targets = Literal["decoder", "decoder+vision"] | FilterFn


# W s (N, K) fp32, s, how the tensor chooses a grid, its bits, columns in a group -> W s on its grid, and the grid
Fit = Callable[[Tensor, Tensor | None, Callable[[Tensor], Grid], int, int], tuple[Tensor, Grid]]


class WeightQuantizer(Protocol):
    """How one weight is quantized; the search and the final model go through the same object.

    weight: (out_features, in_features).  s: (in_features,), or None for a weight that is not scaled, or is already.
    """

    def stand_in(self, weight: Tensor, s: Tensor | None) -> Tensor:
        """For the search: with it the linear computes on x what the quantized one, with W s, will compute on x / s."""

    def quantize(self, weight: Tensor, s: Tensor | None) -> Tensor:
        """The tensor that will serve: W s quantized, and 1 / s as its `act_pre_scale`.

        Raises ValueError where it cannot hold them.
        """

    def fit(self, weights: Sequence[Tensor], s: Tensor | None, fit: Fit) -> list[Tensor]:
        """As `quantize`, for linears that read the same x, with grids and rounding found by `fit`."""

    def while_fitting(self, fitted: Tensor) -> Tensor:
        """What serves for a fitted tensor until its block is done: it, or its dequantize() where that is quicker."""


@dataclass(frozen=True)
class Recipe:
    """Where the published code, what we hold to be right, and SmoothQuant differ. See RECIPES."""

    count_padding: bool  # padding takes part in mean|x| and in the unbalanced loss
    shift_answers: bool  # count the positions that predict an answer token, not the answer's own
    tie_shared_rows: bool  # scale o_proj under grouped-query attention, one s for all heads of a value head
    pre_scale_unfolded: bool  # where nothing takes 1/s, keep it as act_pre_scale instead of not scaling
    norms_only: bool = False  # scale nothing but what a norm produces
    smooth_alpha: float | None = None  # take SmoothQuant's s with this exponent instead of searching one
    scaled: bool = True  # scale channels at all
    search_grid: bool = False  # fit the grids to the inputs, see error_compensation.py
    compensated: bool = False  # let columns make up for each other's rounding
    act_order: bool = False  # in doing so, begin with the columns of the largest inputs
    corrects_drift: bool = False  # and, first, for what the inputs themselves have drifted by
    floored: bool = True  # no r below its median over the layers: the authors' code, not their text
    corrects_residual: bool = False  # in that, where an output is added to a residual, for the residual's as well
    discounts_chance: bool = False  # believe less of what few tokens say channels have in common, see fitting.py
    refining_rounds: int = 0  # and then settle all values and scales again, so often, see refinement.py
    sensitivity_power: float = 1.0  # in all of these, vision tokens weigh r to this power; 0: all tokens alike

    @property
    def fits_weights(self) -> bool:
        """Whether a weight depends on the linear's inputs, not just on its own values."""
        return self.search_grid or self.compensated or self.corrects_drift


_CORRECTED = Recipe(count_padding=False, shift_answers=True, tie_shared_rows=True, pre_scale_unfolded=True)
_GPTQ = replace(_CORRECTED, scaled=False, compensated=True)
RECIPES = {
    "paper": Recipe(count_padding=True, shift_answers=False, tie_shared_rows=False, pre_scale_unfolded=False),
    "mbq": _CORRECTED,
    "gptq": _GPTQ,
    # What benchmarks/accuracy.py finds best: nothing more than this pays on both of its beds.
    "best": replace(
        _GPTQ,
        search_grid=True,
        corrects_drift=True,
        corrects_residual=True,
        discounts_chance=True,
        refining_rounds=3,
    ),
    "smoothquant": replace(_CORRECTED, pre_scale_unfolded=False, norms_only=True, smooth_alpha=0.5),
}


@dataclass(frozen=True)
class CalibrationSettings:
    """What `mbq_config` asks for; validated there."""

    recipe: Recipe
    balance: bool
    loss: Loss
    propagate_error: bool
    n_grid: int
    quantizer: WeightQuantizer
    scale_groups: Sequence[ScaleGroup] | None = None
    blocks: Sequence[nn.Module] | None = None
    targets: Targets = "decoder"
    # Of an expert's own search: weigh a token by the factor that the expert's output has for it as well.
    route_weighted: bool = False

    @property
    def follows_error(self) -> bool:
        """Whether the streams carry what the blocks before got wrong."""
        return self.propagate_error or self.recipe.fits_weights


@dataclass
class Masks:
    """Which tokens count as what, one (B, T) bool tensor a batch."""

    counted: list[Tensor]
    answer: list[Tensor]
    vision: list[Tensor]

    @classmethod
    def of(cls, batches: list[CalibrationBatch], recipe: Recipe) -> Masks:
        return cls(
            counted=[torch.ones_like(b.valid) if recipe.count_padding else b.valid for b in batches],
            answer=[b.predicts_answer() if recipe.shift_answers else b.answer for b in batches],
            vision=[b.vision for b in batches],
        )

    @classmethod
    def even(cls, shapes: Iterable[tuple[int, ...]], device: torch.device) -> Masks:
        """Every token counts, and none is of a modality of its own. shapes: of the tokens, one a pass."""
        counted = [torch.ones(shape, dtype=torch.bool, device=device) for shape in shapes]
        return cls(counted=counted, answer=[~mask for mask in counted], vision=[~mask for mask in counted])
