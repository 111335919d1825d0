"""Token and sequence samples on small models: which positions, where they meet, half precision (the zoo has more)."""

import pytest
import torch
from oracles import assert_same
from torch import Tensor, nn

from l3d_pl import L3DError
from l3d_pl.gradients import DenseGradient, GradientExtractor, OuterGradient
from l3d_pl.targets.frozen import freeze, select_parameters

WIDTH, CLASSES = 6, 5


class Residual(nn.Module):
    """Two blocks on a residual stream: positions meet in `mix` of each; a position-wise layer and a head follow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    @staticmethod
    def mix(x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over earlier positions that count; padding sees nothing and is not seen."""
        counts = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).to(x)
        return (x * counts).cumsum(1) / counts.cumsum(1).clamp_min(1) * counts

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.mix(self.first(x).tanh(), attention_mask)
        x = x + self.mix(self.second(x).tanh(), attention_mask)
        x = x + self.after(x).tanh()
        return self.head(x)


def problem(
    sample: str, patterns: tuple[str, ...] = ("*",), dtype: torch.dtype = torch.float64, **settings: object
) -> tuple[GradientExtractor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = freeze(Residual().to(dtype))
    extractor = GradientExtractor(model, select_parameters(model, patterns), "kl", "random", sample, **settings)  # type: ignore[arg-type]
    return extractor, {"input_ids": torch.randint(0, 11, (4, 7))}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sample", ["token", "sequence"])
def test_every_sample_equals_plain_autograd(sample: str, masked: bool) -> None:
    extractor, batch = problem(sample)
    if masked:
        batch["sample_mask"] = torch.rand(4, 7, generator=random(1)) < 0.6
        batch["sample_mask"][0, 2] = True
    extraction = extractor(batch, random())
    n = (int(batch["sample_mask"].sum()) if masked else 28) if sample == "token" else 4
    assert extraction.n_samples == n == extraction.gradients["first.weight"].n_samples
    for index in range(n):
        extractor.check(batch, extraction, index, 1e-9)
    assert not extractor.oracle_parameters


def test_the_cut_is_the_stream_after_the_last_mixing() -> None:
    extractor, batch = problem("token", ("first.weight",))
    backwards: list[int] = []
    extractor.model.after.register_full_backward_hook(lambda *_: backwards.append(1))  # type: ignore[union-attr]
    extractor(batch, random())
    backwards.clear()  # (the first batch searches)
    extractor(batch, random(1))
    assert len(backwards) == 1  # the layers above the cut are crossed once, not once per position
    assert extractor._passes.cut > 0


@pytest.mark.parametrize("first", ["one position", "one that counts", "padding in the middle"])
def test_a_first_batch_that_hides_where_positions_meet(first: str) -> None:
    extractor, batch = problem("token")
    batch["attention_mask"] = torch.ones(4, 7, dtype=torch.long)
    if first == "one position":
        extractor({name: value[:, :1] for name, value in batch.items()}, random())
    else:
        counting = torch.arange(7) < (1 if first == "one that counts" else 3)
        extractor(batch | {"attention_mask": counting.long().expand(4, 7)}, random())
    extraction = extractor(batch, random())
    for index in range(extraction.n_samples):
        extractor.check(batch, extraction, index, 1e-9)


def test_parameters_above_the_cut_have_one_position_each() -> None:
    extractor, batch = problem("token", ("after.*", "head.*", "second.weight"))
    gradients = extractor(batch, random()).gradients
    for name in ("after.weight", "head.weight"):
        gradient = gradients[name]
        assert isinstance(gradient, OuterGradient)
        assert gradient.outputs.shape[:3] == (28, 1, 1)
    assert isinstance(gradients["head.bias"], DenseGradient)
    mixed = gradients["second.weight"]
    assert isinstance(mixed, OuterGradient)
    assert mixed.outputs.shape[:3] == (4, 7, 7)  # the tokens of a sequence share their inputs


def test_tokens_per_sequence_draws_other_positions_each_time() -> None:
    extractor, batch = problem("token", ("first.*",), tokens_per_sequence=3)
    generator, seen = random(), set()
    for _ in range(4):
        extraction = extractor(batch, generator)
        assert extraction.n_samples == 12
        positions = extraction.samples.positions
        assert positions is not None
        assert all(len(set(row)) == 3 for row in positions.tolist())
        seen.add(tuple(positions.flatten().tolist()))
        for index in (0, 5, 11):
            extractor.check(batch, extraction, index, 1e-9)
    assert len(seen) == 4
    batch["attention_mask"] = torch.tensor([[1] * 2 + [0] * 5] + [[1] * 7] * 3)
    assert extractor(batch, generator).n_samples == 2 + 9  # a sequence with fewer positions gives all it has


def test_masked_positions_are_no_references() -> None:
    extractor, batch = problem("token", ("first.*",))
    batch["sample_mask"] = torch.zeros(4, 7, dtype=torch.bool)
    batch["sample_mask"][:2, :2] = True
    extraction = extractor(batch, random())
    outputs = extractor.outputs(batch)[:2, :2].flatten(0, 1)
    for reference in extraction.references:
        assert bool((outputs == reference).all(1).any())


@pytest.mark.parametrize("half", ["autocast", "model"])
def test_half_precision_is_close_and_comes_as_float32(half: str) -> None:
    extractor, batch = problem("token", dtype=torch.float32)
    expected = extractor(batch, random())
    settings = {"autocast": "bf16"} if half == "autocast" else {}
    low, _ = problem("token", dtype=torch.float32 if half == "autocast" else torch.bfloat16, **settings)
    found = low(batch, references=expected.references)
    low.check(batch, found)
    for name, gradient in found.gradients.items():
        dense, exact = gradient.dense(), expected.gradients[name].dense()
        assert dense.dtype == torch.float32
        assert float((dense - exact).norm() / exact.norm()) < 0.1, name


def test_bad_samples_are_refused_in_one_line() -> None:
    with pytest.raises(L3DError, match=r"sample: found 'tokne', .*did you mean 'token'"):
        problem("tokne")
    with pytest.raises(L3DError, match="tokens_per_sequence: found 0 with sample 'token'"):
        problem("token", tokens_per_sequence=0)
    with pytest.raises(L3DError, match="tokens_per_sequence: found 3 with sample 'item'"):
        problem("item", tokens_per_sequence=3)
    with pytest.raises(L3DError, match="autocast: found 'fp8'"):
        problem("item", autocast="fp8")
    extractor, batch = problem("token")
    with pytest.raises(L3DError, match=r"its mask is \[4, 3\], the outputs have positions \[4, 7\]"):
        extractor(batch | {"sample_mask": torch.ones(4, 3)}, random())
    with pytest.raises(L3DError, match="leaves no position"):
        extractor(batch | {"sample_mask": torch.zeros(4, 7)}, random())
    flat = GradientExtractor(freeze(nn.Linear(3, 2)), {}, "mse", "random", "token")
    with pytest.raises(L3DError, match=r"sample: 'token' needs outputs \[sequences, positions, ...\], found \[4, 2\]"):
        flat(torch.randn(4, 3), random())


def test_sequences_sum_their_tokens_when_references_do_not_move() -> None:
    """d/dW sum_t D_t = sum_t d/dW D_t, for the same references."""
    tokens, batch = problem("token")
    sequences, _ = problem("sequence")
    mean = tokens.outputs(batch).mean((0, 1))
    by_token = tokens(batch, references=mean.unsqueeze(0)).gradients
    whole = sequences(batch, references=mean.expand(1, 7, -1)).gradients
    for name, gradient in whole.items():
        assert_same(by_token[name].dense().unflatten(0, (4, 7)).sum(1), gradient.dense())
