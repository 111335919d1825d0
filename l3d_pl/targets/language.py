"""Small language models to train from nothing: the architecture, its loss, and what it has to beat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from l3d_pl.errors import L3DError

IGNORED = -100  # class number that cross_entropy leaves out


def gpt_neo(
    vocabulary: int = 2000,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    context: int = 64,
    window: int = 32,
    dropout: float = 0.1,
) -> nn.Module:
    """A GPT-Neo of transformers with random weights: the architecture of TinyStories, in small.

    Its layers attend globally and locally in turn, and the output head is the embedding, as in all of GPT-Neo.

    Args:
        vocabulary: number of token ids.
        width: of the residual stream.
        layers: number of blocks, even.
        heads: of each attention; they divide the width.
        context: longest sequence.
        window: tokens that a local layer sees.
        dropout: while it is trained.

    Raises:
        L3DError: transformers is missing; a width that the heads do not divide; an odd number of layers.
    """
    try:
        from transformers import GPTNeoConfig, GPTNeoForCausalLM
    except ImportError as error:
        raise L3DError("target gpt_neo: transformers is not installed; pip install 'l3d_pl[hub]'") from error
    _require_heads(heads, width)
    if layers < 2 or layers % 2:
        raise L3DError(f"layers: found {layers}, allowed are even numbers >= 2")
    config = GPTNeoConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        attention_types=[[["global", "local"], layers // 2]],
        max_position_embeddings=context,
        window_size=window,
        resid_dropout=dropout,
        embed_dropout=dropout,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPTNeoForCausalLM(config)
    # GPT-Neo's own 0.02 is for a width of 2,048; a narrow model would spend epochs on growing out of it.
    nn.init.normal_(model.transformer.wte.weight, std=width**-0.5)
    return model


def llama(vocabulary: int = 2000, width: int = 128, layers: int = 4, heads: int = 4, context: int = 64) -> nn.Module:
    """A Llama of transformers with random weights, as large as `gpt_neo` with the same settings.

    Rotary positions, RMS norms, a gated MLP (of 8/3 the width: as many weights as GPT-Neo's), no biases, no dropout;
    every layer attends globally, and the output head is the embedding.

    Args:
        vocabulary: number of token ids.
        width: of the residual stream.
        layers: number of blocks.
        heads: of each attention, for keys too; the width of each is even (positions rotate pairs).
        context: longest sequence.

    Raises:
        L3DError: transformers is missing; a width that the heads do not divide, or by an odd quotient.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise L3DError("target llama: transformers is not installed; pip install 'l3d_pl[hub]'") from error
    _require_heads(heads, width)
    if width // heads % 2:
        raise L3DError(f"heads: found {heads}, allowed are those with width / heads even, width = {width}")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=round(8 * width / 3),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=width**-0.5)  # (as in `gpt_neo`)
    return model


def _require_heads(heads: int, width: int) -> None:
    if heads < 1 or width % heads:
        raise L3DError(f"heads: found {heads}, allowed are divisors of width = {width}")


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """What is to be predicted at every position but the last, [N, S - 1]; `IGNORED` for padding."""
    return batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, IGNORED)


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token, in nats, over all positions of a batch but padding."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), next_tokens(batch).flatten(), ignore_index=IGNORED)


def ngram_losses(
    train: Iterable[Mapping[str, Tensor]], held_out: Iterable[Mapping[str, Tensor]], vocabulary: int
) -> dict[str, float]:
    """Cross-entropy (nats) of held-out text under counts of tokens and of pairs: `unigram_loss`, `bigram_loss`.

    Single tokens are counted from one upward. A pair's probability is its share among the pairs that begin alike,
    mixed with that of the single token by how often new ones have followed (Witten and Bell 1991): no smoothing that
    would make it easy to beat.
    """
    pairs = torch.zeros(vocabulary, vocabulary)
    for batch in train:
        _count_pairs(batch, pairs)
    unigram = pairs.sum(0) + 1
    unigram /= unigram.sum()
    seen, kinds = pairs.sum(1, keepdim=True), (pairs > 0).sum(1, keepdim=True)
    bigram = (pairs + kinds * unigram) / (seen + kinds).clamp_min(1)
    bigram[seen.squeeze(1) == 0] = unigram
    counts = torch.zeros(vocabulary, vocabulary)
    for batch in held_out:
        _count_pairs(batch, counts)
    total = counts.sum().item()
    return {
        "unigram_loss": -(counts.sum(0) * unigram.log()).sum().item() / total,
        "bigram_loss": -(counts * bigram.log())[counts > 0].sum().item() / total,
    }


def _count_pairs(batch: Mapping[str, Tensor], counts: Tensor) -> None:
    following = next_tokens(batch)
    kept = following != IGNORED
    first = batch["input_ids"][:, :-1][kept]
    counts.index_put_((first, following[kept]), torch.ones(()), accumulate=True)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """`next_token_loss` over many batches, each position counted alike; the model in eval mode."""
    model.eval()
    total, positions = 0.0, 0
    for batch in batches:
        n = int((next_tokens(batch) != IGNORED).sum())
        total, positions = total + n * next_token_loss(model, batch).item(), positions + n
    return total / positions if positions else math.nan
