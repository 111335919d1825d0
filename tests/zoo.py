"""Models of every kind that users bring, in miniature: random weights, sizes that share factors with the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from l3d_pl.targets.toy import TiedAutoencoder

N = 4  # samples; also a number of positions and of channels, on purpose
VOCABULARY = 19


@dataclass(frozen=True)
class Specimen:
    """A model, one batch for it (a tensor, or keyword arguments), and the parameters that no rule covers (a glob)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    oracle: str = ""

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in eval mode, frozen, all its weights and statistics moved off their initial ones and zeros."""
        model = self.build().to(dtype).eval().requires_grad_(False)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif isinstance(tensor, nn.Parameter) or name.endswith("running_mean"):
                tensor += 0.2 * torch.randn_like(tensor)
        return model

    def batch(self, dtype: torch.dtype = torch.float64) -> Any:
        batch = self.inputs()
        if isinstance(batch, Tensor):
            return batch.to(dtype) if batch.is_floating_point() else batch
        return batch


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape)


def tokens(length: int = N, padding: bool = False) -> Callable[[], dict[str, Tensor]]:
    """Token ids [N, length], with two rows padded on the right if `padding`."""

    def inputs() -> dict[str, Tensor]:
        batch = {"input_ids": torch.randint(0, VOCABULARY, (N, length))}
        if padding:
            batch["attention_mask"] = torch.ones(N, length, dtype=torch.long)
            batch["attention_mask"][1, -1] = batch["attention_mask"][3, -2:] = 0
        return batch

    return inputs


def images(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(N, 3, size, size, dtype=torch.float64)}


# -- transformers --------------------------------------------------


def language_model(family: str, attention: str = "eager", **options: Any) -> nn.Module:
    """A causal language model of transformers: two layers, 16 wide, two heads."""
    import transformers

    wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    grouped = wide | {"num_key_value_heads": 1}
    sizes: dict[str, dict[str, Any]] = {
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
        "GPTNeo": {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 2,
        },
        "GPTNeoX": wide,
        "Llama": grouped,
        "Qwen2": grouped,
    }
    length = {} if family == "GPT2" else {"max_position_embeddings": 16}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY, "use_cache": False}
    config = getattr(transformers, f"{family}Config")(
        attn_implementation=attention, **sizes[family], **length, **ids, **options
    )
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, head)(config)


def image_classifier(family: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(num_labels=5, **options)
    return getattr(transformers, f"{family}ForImageClassification")(config)


LANGUAGE = {
    f"{family}-{attention}".lower(): Specimen(
        lambda family=family, attention=attention: language_model(family, attention), tokens()
    )
    for family in ("GPT2", "GPTNeo", "GPTNeoX", "Llama", "Qwen2")
    for attention in ("eager", "sdpa")
    if (family, attention) != ("GPTNeo", "sdpa")  # transformers has none
}

VISION = {
    "resnet": Specimen(
        lambda: image_classifier("ResNet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2]), images(16)
    ),
    "resnet-basic": Specimen(
        lambda: image_classifier("ResNet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
        images(16),
    ),
    "mobilenet-v2": Specimen(
        lambda: image_classifier("MobileNetV2", depth_multiplier=0.1, min_depth=4, depth_divisible_by=4), images(32)
    ),
    "convnext": Specimen(
        lambda: image_classifier("ConvNext", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=16),
        images(16),
    ),
    "vit": Specimen(
        lambda: image_classifier(
            "ViT",
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            image_size=8,
            patch_size=4,
        ),
        images(8),
    ),
}


# -- modules, and ways of writing them --------------------------------------------------


class Written(nn.Module):
    """A model of one expression over parts given by name: modules, parameters by their shape, or buffers (tensors)."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.expression = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                self.register_parameter(name, nn.Parameter(0.5 * torch.randn(part)))

    def forward(self, x: Tensor) -> Tensor:
        return self.expression(self, x)


def written(forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Written(forward, **{name: part() if callable(part) else part for name, part in parts.items()})


def stack(*parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(part() for part in parts))


def fused_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (x @ m.qkv).split(8, -1)
    return F.scaled_dot_product_attention(q, k, v) @ m.out


def tied_autoencoder(m: Any, x: Tensor) -> Tensor:
    return F.relu(x @ m.W.T @ m.W + m.b)


def reused(m: Any, x: Tensor) -> Tensor:
    return m.layer(m.norm(m.layer(m.norm(x)).tanh()))


def inplace_residual(m: Any, x: Tensor) -> Tensor:
    x = m.inner(x)
    x += m.outer(F.relu(m.norm(x), inplace=True))
    x += m.outer(x).tanh_()
    return x


def plain_residual(m: Any, x: Tensor) -> Tensor:
    x = m.inner(x)
    x = x + m.outer(F.relu(m.norm(x)))
    return x + m.outer(x).tanh()


def positions_as_vector(m: Any, ids: Tensor) -> Tensor:
    """nanoGPT: one vector of positions for the whole batch."""
    return m.head(m.norm(m.tokens(ids) + m.positions(torch.arange(ids.shape[1]))).relu())


def positions_as_row(m: Any, ids: Tensor) -> Tensor:
    places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    return m.head((m.tokens(ids) + m.positions(places)).relu())


def positions_expanded(m: Any, ids: Tensor) -> Tensor:
    """BERT: positions and types spelt out for each sample."""
    places = m.places[:, : ids.shape[1]].expand(len(ids), -1)
    types = torch.zeros(ids.shape, dtype=torch.long)
    return m.head((m.tokens(ids) + m.types(types) + m.positions(places)).relu())


def positions_of_tokens(m: Any, ids: Tensor) -> Tensor:
    """Position embeddings by a formula of the ids (RoBERTa), and a bare table."""
    places = (ids > 2).cumsum(1) % 7
    return m.head((m.table[ids] + m.positions(places)).relu())


def last_position(m: Any, ids: Tensor) -> Tensor:
    """One id per sample: as many as there are positions."""
    return m.head(m.tokens(ids[:, -1]).relu() + m.positions(torch.tensor(2)))


def class_token(m: Any, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(len(x), -1, -1), x @ m.W], 1) + m.positions
    x = torch.stack([x, m.other.expand_as(x)], -1).flatten(-2)
    return (x.relu() + m.bias.expand(len(x), 1, 16)).sin()


def relative_positions(m: Any, x: Tensor) -> Tensor:
    """T5, Swin: attention scores with a bias by distance, for all samples."""
    scores = x @ m.W @ x.mT
    s = torch.arange(x.shape[1])
    return (scores.unsqueeze(1) + m.bias(s[:, None] - s + 3).permute(2, 0, 1)).softmax(-1).mean(1) @ x


def recurrent_cell(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 4, dtype=x.dtype)
    for step in x.unbind(1):
        h = torch.tanh(F.linear(step, m.W, m.b) + F.linear(h, m.U))
    return h


def einsums(m: Any, x: Tensor) -> Tensor:
    q, k = torch.einsum("bsm,hdm->bhsd", x, m.q), torch.einsum("bsm,mhd->bhsd", x, m.k)
    pattern = torch.einsum("bhsd,bhtd->bhst", q, k).softmax(-1)
    v = torch.einsum("...m,om->...o", x, m.v)
    mixed = torch.einsum("bhst,bto,h->bso", pattern, v, m.gain)
    return torch.einsum("bso,ot", mixed, m.out) + torch.tensordot(mixed, m.out, 1)


def heads(m: Any, x: Tensor) -> Tensor:
    """One matrix per head, batched in three ways."""
    x = x.unflatten(-1, (2, 4)).transpose(1, 2)  # [N, heads, S, 4]
    y = torch.bmm(x[:, 0], m.U.expand(len(x), -1, -1)) / m.scale
    return torch.cat([(x @ m.W).flatten(1, 2), (m.V @ x).flatten(1, 2), y, m.scale / (2 + y.square())], 1)


def masked_lists(m: Any, x: Tensor) -> Tensor:
    """Constants that are no buffers, of a size that the batch has too."""
    basis = torch.linspace(-1, 1, 4 * 8, dtype=x.dtype).view(4, 8)
    return x + F.linear(basis, m.W, m.b) + (basis @ m.U).sum(0)


class Checkpointed(nn.Module):
    """Two blocks under activation checkpointing, between an embedding or linear layer and a head."""

    def __init__(self, first: nn.Module, use_reentrant: bool = False):
        super().__init__()
        self.first, self.use_reentrant = first, use_reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


class Outputs(nn.Module):
    """The first output of a module that returns several, called with `copies` times the same input."""

    def __init__(self, module: nn.Module, copies: int = 1):
        super().__init__()
        self.module, self.copies = module, copies

    def forward(self, x: Tensor) -> Tensor:
        return self.module(*[x] * self.copies)[0]


def table(rows: int, columns: int = 8, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(rows, columns, **options)


def linear(columns: int, rows: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(columns, rows)


def ids(length: int = N) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, VOCABULARY, (N, length))


lookup = {"tokens": table(VOCABULARY), "positions": table(8), "head": linear(8, 5)}

MODULES = {
    "depthwise": Specimen(stack(lambda: nn.Conv2d(4, 8, 3, groups=4), nn.Tanh), numbers(4, 6, 5)),
    "grouped-1d": Specimen(stack(lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2), nn.Tanh), numbers(4, 8)),
    "dilated": Specimen(
        stack(lambda: nn.Conv2d(2, 3, (2, 3), dilation=(2, 1), stride=(1, 2), padding=(1, 2)), nn.Tanh),
        numbers(2, 6, 6),
    ),
    "same": Specimen(
        stack(
            lambda: nn.Conv1d(2, 4, 3, padding="same", dilation=2), nn.GELU, lambda: nn.Conv1d(4, 2, 3, padding="valid")
        ),
        numbers(2, 6),
    ),
    "reflected": Specimen(
        stack(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh), numbers(2, 4, 4)
    ),
    "volume": Specimen(stack(lambda: nn.Conv3d(2, 3, 2, bias=False), nn.Tanh), numbers(2, 3, 3, 3)),
    "functional-conv": Specimen(
        written(lambda m, x: F.conv2d(torch.conv2d(x, m.W, m.b, 1, 1).tanh(), m.W, padding=1), W=(2, 2, 3, 3), b=(2,)),
        numbers(2, 4, 4),
    ),
    "batch-norm": Specimen(
        stack(
            lambda: nn.Conv2d(3, 4, 3, bias=False),
            lambda: nn.BatchNorm2d(4),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.Conv2d(4, 4, 1),
            nn.Flatten,
            lambda: nn.BatchNorm1d(16),
            linear(16, 3),
        ),
        numbers(3, 4, 4),
    ),
    "group-norm": Specimen(
        stack(lambda: nn.Conv1d(3, 4, 1), lambda: nn.GroupNorm(2, 4), nn.SiLU, lambda: nn.GroupNorm(1, 4)),
        numbers(3, 4),
    ),
    "layer-norm": Specimen(
        stack(linear(8, 4), lambda: nn.LayerNorm(4), nn.Tanh, lambda: nn.LayerNorm((4, 4)), linear(4, 8)), numbers(4, 8)
    ),
    "rms-norm": Specimen(stack(linear(8, 4), lambda: nn.RMSNorm(4), nn.Tanh, linear(4, 8)), numbers(4, 8)),
    "layer-scale": Specimen(
        written(
            lambda m, x: (m.conv(x) * m.gain + m.shift).sin(),
            conv=lambda: nn.Conv2d(2, 4, 1),
            gain=(4, 1, 1),
            shift=(1, 4, 1, 1),
        ),
        numbers(2, 4, 4),
    ),
    "tied-autoencoder": Specimen(written(tied_autoencoder, W=(4, 8), b=(8,)), numbers(8)),
    "reused": Specimen(written(reused, layer=linear(8, 8), norm=lambda: nn.LayerNorm(8)), numbers(4, 8)),
    "fused-qkv": Specimen(written(fused_attention, qkv=(8, 24), out=(8, 8)), numbers(4, 8)),
    "einsum": Specimen(written(einsums, q=(2, 4, 8), k=(8, 2, 4), v=(8, 8), gain=(2,), out=(8, 4)), numbers(4, 8)),
    "heads": Specimen(written(heads, W=(2, 4, 4), V=(2, 3, 4), U=(4, 4), scale=(4,)), numbers(4, 8)),
    "constants": Specimen(written(masked_lists, W=(8, 8), b=(8,), U=(8, 8)), numbers(4, 8)),
    "positions-vector": Specimen(written(positions_as_vector, norm=lambda: nn.LayerNorm(8), **lookup), ids()),
    "positions-row": Specimen(written(positions_as_row, **lookup), ids()),
    "positions-expanded": Specimen(
        written(positions_expanded, types=table(2), places=torch.arange(8).unsqueeze(0), **lookup), ids()
    ),
    "positions-of-tokens": Specimen(
        written(positions_of_tokens, table=(VOCABULARY, 8), positions=lookup["positions"], head=lookup["head"]), ids()
    ),
    "last-position": Specimen(written(last_position, **lookup), ids()),
    "padding-row": Specimen(
        written(lambda m, x: m.head(m.tokens(x)).sin(), tokens=table(VOCABULARY, padding_idx=3), head=linear(8, 5)),
        lambda: torch.randint(0, VOCABULARY, (N, 6)).index_fill(1, torch.tensor([1]), 3),
    ),
    "class-token": Specimen(
        written(class_token, token=(1, 1, 8), W=(8, 8), positions=(1, 4, 8), other=(8,), bias=(16,)), numbers(3, 8)
    ),
    "relative-positions": Specimen(written(relative_positions, W=(8, 8), bias=table(8, 2)), numbers(4, 8)),
    "recurrent-cell": Specimen(written(recurrent_cell, W=(4, 8), U=(4, 4), b=(4,)), numbers(3, 8)),
    "inplace-relu": Specimen(
        stack(linear(8, 4), lambda: nn.ReLU(inplace=True), linear(4, 8), lambda: nn.LeakyReLU(inplace=True)),
        numbers(4, 8),
    ),
    "checkpointed": Specimen(lambda: Checkpointed(nn.Linear(8, 8)), numbers(4, 8)),
    "checkpointed-embedding": Specimen(lambda: Checkpointed(nn.Embedding(VOCABULARY, 8)), ids()),
    # No rule: right as well, by the oracle.
    "lstm": Specimen(
        stack(lambda: Outputs(nn.LSTM(8, 3, batch_first=True)), linear(3, 4)), numbers(4, 8), "0.module.*"
    ),
    "gru": Specimen(lambda: Outputs(nn.GRU(8, 3, 2, batch_first=True)), numbers(4, 8), "*"),
    "attention": Specimen(
        stack(lambda: Outputs(nn.MultiheadAttention(8, 2, batch_first=True), 3), linear(8, 4)), numbers(4, 8), "0.*"
    ),
    "encoder-layer": Specimen(
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), numbers(4, 8), "self_attn.*"
    ),
    "transposed": Specimen(
        stack(lambda: nn.Conv2d(2, 4, 1), lambda: nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Tanh),
        numbers(2, 3, 3),
        "1.*",
    ),
    "prelu": Specimen(stack(linear(8, 4), lambda: nn.PReLU(4), linear(4, 2)), numbers(8), "1.*"),
    "bilinear": Specimen(lambda: Bilinear(), numbers(8), "layer.*"),
    "checkpointed-reentrant": Specimen(lambda: Checkpointed(nn.Linear(8, 8), use_reentrant=True), numbers(4, 8), "*"),
}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :4], x[:, 4:])


ZOO = LANGUAGE | VISION | MODULES

# Ways of writing in place that autograd itself refuses: the same model, and how the loop may compute it.
INPLACE = {
    "residual": (
        Specimen(
            written(inplace_residual, inner=linear(8, 8), norm=lambda: nn.LayerNorm(8), outer=linear(8, 8)),
            numbers(4, 8),
        ),
        plain_residual,
    ),
}


def tied_in_float64() -> nn.Module:
    """A TMS target for a run in float64."""
    return TiedAutoencoder(5, 2).double()
