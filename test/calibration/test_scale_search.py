"""The search: token weights, the loss, the grid, and leaving tokens out where that is allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mbq_ao import MBQInt3Tensor
from mbq_ao.calibration import scale_search
from mbq_ao.calibration.activation_peaks import mean_abs
from mbq_ao.calibration.capture import ModuleCall
from mbq_ao.calibration.scale_search import (
    Example,
    grid_scales,
    scale_at,
    search_scale,
    smooth_scales,
    token_weights,
)

C = 32
Candidate = Callable[[Tensor], dict[str, Tensor]]


def mask(*rows: str) -> Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


COUNTED = [mask("xxxxx.", "xxx..."), mask("xxxx")]
ANSWER = [mask("...xx.", "..x..."), mask("...x")]
VISION = [mask("xx....", "x....."), mask(".xx.")]


def test_unbalanced_weights_are_a_mean_over_all_counted_tokens() -> None:
    weights = token_weights(COUNTED, ANSWER, VISION, ratio=None, loss="mae", num_channels=8)
    for weight, counted in zip(weights, COUNTED, strict=True):
        torch.testing.assert_close(weight, counted.float() / (12 * 8))
    other = token_weights(COUNTED, ANSWER, VISION, ratio=None, loss="mse", num_channels=8)
    assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))


@pytest.mark.parametrize(("loss", "per_answer", "per_vision"), [("mae", 9, 9), ("mse", 4, 5)])
def test_balanced_weights(loss: scale_search.Loss, per_answer: int, per_vision: int) -> None:
    """mae: one joint count of answer and vision tokens. mse: each modality's own."""
    weights = token_weights(COUNTED, ANSWER, VISION, ratio=0.25, loss=loss, num_channels=8)
    for weight, answer, vision in zip(weights, ANSWER, VISION, strict=True):
        expected = answer.float() / (per_answer * 8) + 0.25 * vision.float() / (per_vision * 8)
        torch.testing.assert_close(weight, expected)


def test_balanced_weights_without_vision_tokens() -> None:
    none = [torch.zeros_like(m) for m in VISION]
    for weight, answer in zip(
        token_weights(COUNTED, ANSWER, none, ratio=0.5, loss="mse", num_channels=1), ANSWER, strict=True
    ):
        torch.testing.assert_close(weight, answer.float() / 4)


def test_statistic_counts_tokens_not_batches() -> None:
    inputs = [torch.randn(2, 6, C), torch.randn(1, 4, C)]
    expected = torch.cat([x[m] for x, m in zip(inputs, COUNTED, strict=True)]).abs().mean(0)
    torch.testing.assert_close(mean_abs(inputs, COUNTED), expected)


def test_statistic_of_half_precision_is_summed_in_fp32() -> None:
    x = torch.full((1, 5000, 2), 3.0, dtype=torch.bfloat16)
    assert torch.equal(mean_abs([x], [torch.ones(1, 5000, dtype=torch.bool)]), torch.full((2,), 3.0))


def test_scale() -> None:
    statistic = torch.tensor([4.0, 1.0, 0.25, 0.0])
    assert torch.equal(scale_at(statistic, 0.0), torch.ones(4))
    s = scale_at(statistic, 0.5)
    torch.testing.assert_close(s * (2.0 * 1e-4) ** 0.5, torch.tensor([2.0, 1.0, 0.5, 1e-4]))
    assert (s.max() * s.min()).item() == pytest.approx(1.0, rel=1e-5)


class Mlp(nn.Module):
    """Treats every token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(C, 24, bias=False), nn.Linear(24, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.linear(x).relu())


class Unpacking(Mlp):
    """Treats every token alone, but wants three dimensions (mixtures of experts)."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 3
        return super().forward(x)


class CausalMean(nn.Module):
    """Mixes tokens, though it is given one tensor only: a recurrent or linear-attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.cumsum(-2) / torch.arange(1, y.shape[-2] + 1)[:, None]


class Conv(nn.Module):
    """Mixes tokens, and wants three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(C, C, bias=False), nn.Conv1d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 3
        return self.conv(self.linear(x).mT).mT


class Masked(nn.Module):
    """Mixes tokens by a second tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        return attention[: x.shape[-2], : x.shape[-2]].softmax(-1) @ self.linear(x)


def make_examples(module: nn.Module, ratio: float | None = 0.3, loss: scale_search.Loss = "mae") -> list[Example]:
    torch.manual_seed(3)
    inputs = [torch.randn(2, 6, C), torch.randn(1, 4, C)]
    for x in inputs:
        x[..., :4] *= 10  # some large channels, so that a scale helps
    weights = token_weights(COUNTED, ANSWER, VISION, ratio=ratio, loss=loss, num_channels=C)
    extra = (torch.randn(6, 6),) if isinstance(module, Masked) else ()
    with torch.no_grad():
        return [
            Example(ModuleCall((x, *extra), {}), module(x, *extra), w) for x, w in zip(inputs, weights, strict=True)
        ]


def candidate_of(module: nn.Module) -> Candidate:
    linear = getattr(module, "linear", module)
    name = "weight" if linear is module else "linear.weight"
    return lambda s: {name: MBQInt3Tensor.fake_quantize(linear.weight.detach() * s, 32) / s}


def brute_force(
    module: nn.Module, examples: list[Example], candidate: Candidate, statistic: Tensor, p: int, n_grid: int
) -> list[float]:
    """One token weight at a time, in double precision."""
    losses = []
    for k in range(n_grid):
        total = 0.0
        for e in examples:
            out = torch.func.functional_call(module, candidate(scale_at(statistic, k / n_grid)), e.call.args)
            error = (e.target - out).double().abs() ** p
            total += float((error.sum(-1) * e.weight.double()).sum())
        losses.append(total)
    return losses


@pytest.fixture
def statistic() -> Tensor:
    inputs = [e.call.hidden for e in make_examples(Mlp())]
    return mean_abs(inputs, COUNTED)


@pytest.mark.parametrize("ratio", [None, 0.3])
@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize("kind", [Mlp, Unpacking, CausalMean, Conv, Masked, lambda: nn.Linear(C, 8)])
def test_losses_against_brute_force(
    kind: Callable[[], nn.Module], loss: scale_search.Loss, ratio: float | None, statistic: Tensor
) -> None:
    torch.manual_seed(0)
    module = kind()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    examples, candidate = make_examples(module, ratio, loss), candidate_of(module)
    found = search_scale(module, examples, grid_scales(statistic, 8), candidate, loss=loss)
    with torch.no_grad():
        expected = brute_force(module, examples, candidate, statistic, 1 if loss == "mae" else 2, 8)
    assert found.losses == pytest.approx(expected, rel=1e-5)
    assert found.index == min(range(8), key=expected.__getitem__) > 0
    assert found.alpha == found.index / 8
    assert torch.equal(found.s, scale_at(statistic, found.alpha))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in module.named_parameters())


@pytest.mark.parametrize(
    ("kind", "tokenwise"),
    [(Mlp, True), (Unpacking, True), (lambda: nn.Linear(C, 8), True), (CausalMean, False), (Conv, False)],
)
def test_whether_a_module_treats_every_token_alone(kind: Callable[[], nn.Module], tokenwise: bool) -> None:
    torch.manual_seed(0)
    module = kind()
    examples = make_examples(module)
    chunks = scale_search._as_chunks(module, examples)
    if tokenwise:  # a chunk for each batch, without the tokens of weight 0
        assert [[c.call.hidden.shape for c in of_batch] for of_batch in chunks] == [[(1, 6, C)], [(1, 3, C)]]
        assert all((c.weight > 0).all() for of_batch in chunks for c in of_batch)
    else:
        assert chunks == [[example] for example in examples]


@pytest.mark.parametrize("lengths", [(1,), (2,), (1, 5)])
def test_a_first_batch_too_short_to_tell(lengths: tuple[int, ...]) -> None:
    """One token shows nothing; of two, only the second sees the other in a causal module; the longest batch decides."""
    torch.manual_seed(0)
    module = CausalMean()
    inputs = [torch.randn(1, n, C) for n in lengths]
    examples = [Example(ModuleCall((x,), {}), module(x).detach(), torch.ones(x.shape[:2])) for x in inputs]
    assert scale_search._as_chunks(module, examples) == [[example] for example in examples]


@pytest.mark.parametrize(
    ("chunk", "sizes"),
    [(1, [[1] * 6, [1] * 3]), (4, [[4, 2], [3]]), (6, [[6], [3]]), (100, [[6], [3]])],
)
def test_the_size_of_a_chunk_does_not_matter(
    chunk: int, sizes: list[list[int]], statistic: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = Mlp()
    examples, candidate = make_examples(module), candidate_of(module)
    with monkeypatch.context() as patch:
        patch.setattr(scale_search, "_as_chunks", lambda module, examples, *_: [[e] for e in examples])
        whole = search_scale(module, examples, grid_scales(statistic, 6), candidate, loss="mae")
    monkeypatch.setattr(scale_search, "CHUNK_TOKENS", chunk)
    chunks = scale_search._as_chunks(module, examples)
    assert [[c.call.hidden.shape[1] for c in of_batch] for of_batch in chunks] == sizes
    found = search_scale(module, examples, grid_scales(statistic, 6), candidate, loss="mae")
    assert found.losses == pytest.approx(whole.losses, rel=1e-5) and found.index == whole.index


def test_how_many_scales_are_tried_at_once_does_not_matter(statistic: Tensor) -> None:
    torch.manual_seed(0)
    module = CausalMean()  # several chunks
    arguments = module, make_examples(module), grid_scales(statistic, 6), candidate_of(module)
    alone, *together = (search_scale(*arguments, loss="mae", at_once=n) for n in (1, 4, 6, 100))
    assert len(set(alone.losses)) == 6
    assert all(found.losses == alone.losses and torch.equal(found.s, alone.s) for found in together)


def test_plain_rounding_is_kept_where_nothing_is_better(statistic: Tensor) -> None:
    torch.manual_seed(0)
    module = Mlp()
    examples = make_examples(module)
    rounded = MBQInt3Tensor.fake_quantize(module.linear.weight.detach(), 32)
    same = search_scale(module, examples, grid_scales(statistic, 5), lambda s: {"linear.weight": rounded}, loss="mae")
    assert len(set(same.losses)) == 1 and (same.index, same.alpha) == (0, 0.0)
    assert torch.equal(same.s, torch.ones(C))

    def worse(s: Tensor) -> dict[str, Tensor]:
        return {"linear.weight": module.linear.weight.detach() * s}

    assert search_scale(module, examples, grid_scales(statistic, 5), worse, loss="mae").index == 0


def test_a_grid_of_one_point_is_plain_rounding(statistic: Tensor) -> None:
    torch.manual_seed(0)
    module = Mlp()
    found = search_scale(module, make_examples(module), grid_scales(statistic, 1), candidate_of(module), loss="mse")
    assert (found.index, found.alpha, len(found.losses)) == (0, 0.0, 1)
    assert torch.equal(found.s, torch.ones(C))


def test_the_last_scale_is_taken_without_choosing(statistic: Tensor) -> None:
    torch.manual_seed(0)
    module = Mlp()
    scales = [*grid_scales(statistic, 2), (0.5, torch.linspace(0.01, 100, C))]  # the worst of the three
    found = search_scale(module, make_examples(module), scales, candidate_of(module), loss="mae", choose=False)
    assert (found.index, found.alpha, len(found.losses)) == (2, 0.5, 3) and found.losses[2] == max(found.losses)
    assert torch.equal(found.s, scales[2][1])


def test_smooth_scales() -> None:
    peak = torch.tensor([4.0, 9.0, 0.0, 1.0])
    weights = [torch.tensor([[-1.0, 0.1, 1.0, 0.0]]), torch.tensor([[0.5, -4.0, 1.0, 0.0], [0.0, 2.0, 1.0, 0.0]])]
    (zero, ones), (alpha, s) = smooth_scales(peak, weights, 0.5)
    assert (zero, alpha) == (0.0, 0.5) and torch.equal(ones, torch.ones(4))
    torch.testing.assert_close(s, torch.tensor([2.0, 1.5, 1e-5, 1e-5**-0.5]))
    assert torch.equal(smooth_scales(peak, [w.bfloat16() for w in weights], 0.5)[1][1][0], s[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(value: float, statistic: Tensor) -> None:
    torch.manual_seed(0)
    module = Mlp()
    examples = make_examples(module)
    weight = module.linear.weight.detach()

    def at(scaled: bool) -> Candidate:
        return lambda s: {"linear.weight": weight * value if torch.equal(s, torch.ones(C)) != scaled else weight * 1.1}

    with pytest.raises(ValueError, match="the search loss is not finite: NaN or inf in the activations or weights"):
        search_scale(module, examples, grid_scales(statistic, 3), at(scaled=False), loss="mae")
    # At another point of the grid it only loses.
    assert search_scale(module, examples, grid_scales(statistic, 3), at(scaled=True), loss="mae").index == 0


def test_half_precision_losses_are_summed_in_fp32(statistic: Tensor) -> None:
    """Squared errors of 300 overflow float16."""
    module = nn.Linear(C, 8, bias=False).half()
    x = torch.full((1, 4, C), 1.0, dtype=torch.float16)
    example = Example(ModuleCall((x,), {}), torch.full((1, 4, 8), 600.0).half(), torch.full((1, 4), 1 / 32))

    def zero(s: Tensor) -> dict[str, Tensor]:
        return {"weight": torch.zeros(8, C, dtype=torch.float16)}

    assert search_scale(module, [example], grid_scales(statistic, 1), zero, loss="mse").losses == [360000.0]


def test_a_batch_in_which_no_token_counts(statistic: Tensor) -> None:
    module = Mlp()
    examples = make_examples(module)
    silent = Example(examples[0].call, examples[0].target, torch.zeros_like(examples[0].weight))
    grid, candidate = grid_scales(statistic, 4), candidate_of(module)
    with_it = search_scale(module, [*examples, silent], grid, candidate, loss="mae")
    assert with_it.losses == search_scale(module, examples, grid, candidate, loss="mae").losses
