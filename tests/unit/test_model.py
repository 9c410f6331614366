"""The model's numbers are transformers' numbers: same weights, same inputs, fp32, to 1e-5.

Only the order of summation may differ, which at these widths moves results by some 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gptj import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)
from gptj.pretrained import GPTJPreTrainedModel
from gptj.training.live_bytes import LiveBytes

TOLERANCE = {"rtol": 0, "atol": 1e-5}
PAD = 0

HEADS = {
    "base": (GPTJModel, transformers.GPTJModel),
    "causal-lm": (GPTJForCausalLM, transformers.GPTJForCausalLM),
    "classification": (GPTJForSequenceClassification, transformers.GPTJForSequenceClassification),
    "question-answering": (GPTJForQuestionAnswering, transformers.GPTJForQuestionAnswering),
}

CONFIGURATIONS = [
    {"n_embd": 32, "n_head": 4, "rotary_dim": 4, "n_layer": 2},
    {"n_embd": 48, "n_head": 2, "rotary_dim": 24, "n_layer": 3, "n_inner": 40},
    {"n_embd": 24, "n_head": 1, "rotary_dim": 24, "n_layer": 1, "activation_function": "relu"},
]


def pair(head: str, **overrides: Any) -> tuple[Any, Any]:
    """Our model and transformers', with the same random weights, in training mode."""
    fields = {
        "vocab_size": 97,
        "n_positions": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **CONFIGURATIONS[0],
        **overrides,
    }
    ours_class, theirs_class = HEADS[head]
    torch.manual_seed(0)
    theirs = theirs_class(transformers.GPTJConfig(**fields))
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too, which start as 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = ours_class(GPTJConfig(**fields))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def padded_batch(side: str) -> tuple[Tensor, Tensor]:
    """Ids (3, 10) and mask, rows of 10, 6 and 3 real tokens."""
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 10))
    mask = torch.zeros(3, 10, dtype=torch.long)
    for row, length in enumerate((10, 6, 3)):
        mask[row, slice(0, length) if side == "right" else slice(10 - length, 10)] = 1
    return ids.masked_fill(mask == 0, PAD), mask


def labels_for(head: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    if head == "causal-lm":
        return {"labels": ids.masked_fill(mask == 0, -100)}
    if head == "classification":
        return {"labels": torch.tensor([2, 0, 1])}
    if head == "question-answering":
        # 10 is the length, 40 is beyond it: neither is trained on.
        return {
            "start_positions": torch.tensor([1, 10, 3]),
            "end_positions": torch.tensor([4, 2, 40]),
        }
    return {}


def assert_same(ours: Any, theirs: Any) -> None:
    """Every output of theirs is there and equal, nested tuples and caches too."""
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    elif isinstance(theirs, transformers.Cache):
        assert ours.length == theirs.get_seq_length()
        for (keys, values), layer in zip(ours, theirs.layers, strict=True):
            assert_same(keys, layer.keys)
            assert_same(values, layer.values)
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert list(ours.keys()) == list(theirs.keys())
        for key in theirs:
            assert_same(ours[key], theirs[key])


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_outputs_and_gradients_equal_transformers(
    head: str, side: str, configuration: dict[str, Any]
) -> None:
    ours, theirs = pair(head, num_labels=2 if head == "question-answering" else 3, **configuration)
    ids, mask = padded_batch("right" if side == "none" else side)
    if side == "none":
        ids, mask = ids[:1], mask[:1]
    arguments = {"input_ids": ids, **labels_for(head, ids, mask)}
    if side == "none":
        arguments = {k: v[: len(ids)] for k, v in arguments.items()}
    else:
        arguments["attention_mask"] = mask
    for flags in ({}, {"output_hidden_states": True, "output_attentions": True}):
        ours.zero_grad()
        theirs.zero_grad()
        mine, other = ours(**arguments, **flags), theirs(**arguments, **flags)
        assert_same(mine, other)
        target = (
            (lambda out: out.last_hidden_state.square().sum() / 100)
            if head == "base"
            else (lambda out: out.loss)
        )
        target(mine).backward()
        target(other).backward()
        for (name, parameter), reference in zip(
            ours.named_parameters(), theirs.parameters(), strict=True
        ):
            assert (parameter.grad is None) == (reference.grad is None), name
            if reference.grad is not None:
                torch.testing.assert_close(
                    parameter.grad, reference.grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("head", HEADS)
def test_state_dicts_have_the_same_keys_both_ways(head: str) -> None:
    ours, theirs = pair(head)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("head", HEADS)
def test_token_types_positions_and_embeddings_equal_transformers(head: str) -> None:
    ours, theirs = pair(head)
    ids, mask = padded_batch("left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    types = torch.randint(0, 97, ids.shape)
    common = {"attention_mask": mask, "position_ids": positions, "token_type_ids": types}
    assert_same(ours(ids, **common), theirs(ids, **common))
    embeds = torch.randn(1, 5, 32)
    assert_same(ours(inputs_embeds=embeds), theirs(inputs_embeds=embeds))


@pytest.mark.parametrize("return_dict", [True, False])
def test_tuples_are_in_transformers_order(return_dict: bool) -> None:
    ours, theirs = pair("causal-lm")
    ids, _ = padded_batch("right")
    arguments = {"labels": ids, "output_hidden_states": True, "return_dict": return_dict}
    assert_same(tuple(ours(ids, **arguments)), theirs(ids, **arguments)[:])


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 5], [7, 3]])
def test_cached_decoding_equals_the_whole_sequence(side: str, chunks: list[int]) -> None:
    """Token by token, and in chunks, with a mask over past and present."""
    ours, _ = pair("causal-lm")
    ours.eval()
    ids, mask = padded_batch("left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {"attention_mask": mask, "position_ids": positions} if side == "left" else {}
    with torch.no_grad():
        whole = ours(ids, use_cache=False, **extra).logits
        past, parts, start = None, [], 0
        for size in chunks:
            end = start + size
            if side == "left":
                extra = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            output = ours(ids[:, start:end], past_key_values=past, use_cache=True, **extra)
            past, start = output.past_key_values, end
            parts.append(output.logits)
    got = torch.cat(parts, dim=1)
    real = mask.bool() if side == "left" else torch.ones_like(mask, dtype=torch.bool)
    torch.testing.assert_close(got[real], whole[real], **TOLERANCE)


def test_a_long_input_after_a_past_equals_transformers() -> None:
    """Several tokens after several others, with a mask that hides part of the past."""
    ours, theirs = pair("base")
    ours.eval(), theirs.eval()
    torch.manual_seed(2)
    ids, more = torch.randint(3, 97, (2, 7)), torch.randint(3, 97, (2, 5))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, 2:4] = 0
    with torch.no_grad():
        mine = ours(ids, attention_mask=mask[:, :7], use_cache=True).past_key_values
        other = theirs(ids, attention_mask=mask[:, :7], use_cache=True).past_key_values
        assert_same(
            ours(more, attention_mask=mask, past_key_values=mine),
            theirs(more, attention_mask=mask, past_key_values=other),
        )


def test_a_cache_that_gradients_flow_through_equals_the_whole_sequence() -> None:
    ours, _ = pair("causal-lm")
    ids, _ = padded_batch("right")
    weight = ours.transformer.h[0].attn.k_proj.weight
    ours(ids).logits[:, 4:].square().mean().backward()
    whole = weight.grad.clone()
    ours.zero_grad()
    first = ours(ids[:, :4], use_cache=True)
    ours(ids[:, 4:], past_key_values=first.past_key_values).logits.square().mean().backward()
    torch.testing.assert_close(weight.grad, whole, **TOLERANCE)


def test_a_cache_selects_and_crops() -> None:
    ours, _ = pair("base")
    ours.eval()
    ids, _ = padded_batch("right")
    with torch.no_grad():
        cache = ours(ids[:, :6], use_cache=True).past_key_values
        cache.select(torch.tensor([2, 0, 0]))
        cache.crop(4)
        assert (cache.length, len(cache)) == (4, 2)
        got = ours(ids[[2, 0, 0], 4:], past_key_values=cache).last_hidden_state
        want = ours(ids[[2, 0, 0]]).last_hidden_state[:, 4:]
    torch.testing.assert_close(got, want, **TOLERANCE)
    with pytest.raises(ValueError, match="10 positions to 11"):
        cache.crop(11)


def test_a_cache_may_be_given_as_pairs() -> None:
    ours, _ = pair("base")
    ours.eval()
    ids, _ = padded_batch("right")
    with torch.no_grad():
        pairs = tuple(ours(ids[:, :6], use_cache=True).past_key_values)
        got = ours(ids[:, 6:], past_key_values=pairs).last_hidden_state
        torch.testing.assert_close(got, ours(ids).last_hidden_state[:, 6:], **TOLERANCE)


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (3, None, torch.tensor([0, 2, 1])),
        (3, "single_label_classification", torch.tensor([0, 2, 1])),
        (3, None, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])),
        (3, "multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])),
        (1, None, torch.tensor([0.5, -1.0, 2.0])),
        (3, "regression", torch.randn(3, 3)),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_problem_type_equals_transformers(
    num_labels: int, problem_type: str | None, labels: Tensor, side: str
) -> None:
    ours, theirs = pair("classification", num_labels=num_labels, problem_type=problem_type)
    ids, mask = padded_batch(side)
    mine, other = (m(ids, attention_mask=mask, labels=labels) for m in (ours, theirs))
    assert mine.logits.shape == (3, num_labels)
    assert_same(mine, other)


def test_pooling_finds_padding_by_id_like_transformers() -> None:
    ours, theirs = pair("classification")
    for side in ("left", "right"):
        ids, _ = padded_batch(side)
        assert_same(ours(ids).logits, theirs(ids).logits)


def test_pooling_keeps_a_final_eos_that_is_also_the_padding() -> None:
    """With pad = eos, transformers takes the token before; the mask says what is real."""
    ours, _ = pair("classification", pad_token_id=2)
    ours.eval()
    text = torch.tensor([[5, 6, 7, 2]])
    padded = torch.tensor([[5, 6, 7, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    alone = ours(text, attention_mask=torch.ones(1, 4)).logits
    torch.testing.assert_close(ours(padded, attention_mask=mask).logits, alone, **TOLERANCE)


def test_pooling_a_batch_without_mask_and_padding_id_is_refused() -> None:
    ours, _ = pair("classification", pad_token_id=None)
    ids, _ = padded_batch("right")
    with pytest.raises(ValueError, match="batch of 3 rows needs an attention_mask"):
        ours(ids)
    assert ours(ids[:1]).logits.shape == (1, 2)


def test_a_micro_batchs_loss_is_divided_by_the_whole_batchs_items() -> None:
    ours, theirs = pair("causal-lm")
    ids, mask = padded_batch("right")
    labels = ids.masked_fill(mask == 0, -100)
    items = torch.tensor(int((labels[:, 1:] != -100).sum()))
    whole = ours(ids, attention_mask=mask, labels=labels).loss
    parts = sum(
        ours(
            ids[row : row + 1],
            attention_mask=mask[row : row + 1],
            labels=labels[row : row + 1],
            num_items_in_batch=items,
        ).loss
        for row in range(3)
    )
    torch.testing.assert_close(parts, whole, **TOLERANCE)
    other = theirs(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
    torch.testing.assert_close(whole, other, **TOLERANCE)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])])
def test_only_requested_logits_are_computed(keep: int | Tensor) -> None:
    ours, theirs = pair("causal-lm")
    ids, _ = padded_batch("right")
    assert_same(ours(ids, logits_to_keep=keep).logits, theirs(ids, logits_to_keep=keep).logits)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_mask_of_four_dimensions_is_used_as_it_is(kind: str) -> None:
    """Two packed texts: the second must not see the first."""
    ours, _ = pair("base")
    ours.eval()
    ids, _ = padded_batch("right")
    visible = torch.block_diag(torch.ones(4, 4), torch.ones(6, 6)).tril().bool()[None, None]
    mask = visible if kind == "boolean" else (~visible).float() * torch.finfo(torch.float32).min
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = ours(ids[:1], attention_mask=mask, position_ids=positions).last_hidden_state
    alone = ours(ids[:1, 4:]).last_hidden_state
    torch.testing.assert_close(packed[:, 4:], alone, **TOLERANCE)


@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing_keeps_less_and_does_not_change_results(head: str) -> None:
    """Computing again gives the very same numbers; keeping large operations' lies between."""
    ours, _ = pair(head, num_labels=2 if head == "question-answering" else 3)
    ids, mask = padded_batch("right")
    arguments = {"input_ids": ids, "attention_mask": mask, **labels_for(head, ids, mask)}
    plain, kept = _gradients(ours, arguments)
    ours.gradient_checkpointing_enable(selective=True)
    selective, kept_selectively = _gradients(ours, arguments)
    ours.gradient_checkpointing_enable()
    recomputed, kept_for_all = _gradients(ours, arguments)
    ours.gradient_checkpointing_disable()
    again, kept_again = _gradients(ours, arguments)
    for each in (selective, recomputed, again):
        torch.testing.assert_close(each, plain, rtol=0, atol=0)
    assert kept_for_all < kept_selectively < kept == kept_again


@pytest.mark.parametrize("attention", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_recomputed_drops_the_same(attention: float, packed: bool) -> None:
    config = GPTJConfig(**CONFIGURATIONS[1], vocab_size=97, attn_pdrop=attention, resid_pdrop=0.2)
    model = GPTJForCausalLM(config).train()
    ids = torch.randint(0, config.vocab_size, (2, 24))
    arguments = {"input_ids": ids, "labels": ids}
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 7, 24, 48], dtype=torch.int32)
    plain, _ = _gradients(model, arguments)
    for selective in (True, False):
        model.gradient_checkpointing_enable(selective=selective)
        torch.testing.assert_close(_gradients(model, arguments)[0], plain, rtol=0, atol=0)


def _gradients(model: GPTJPreTrainedModel, arguments: dict[str, Any]) -> tuple[list[Tensor], int]:
    """With the same dropout each time, and the bytes that were kept for the backward pass."""
    torch.manual_seed(0)
    model.zero_grad()
    with LiveBytes() as live:
        output = model(**arguments)
        loss = output.loss if "labels" in arguments or "start_positions" in arguments else None
        kept = live.now
        (output.last_hidden_state.mean() if loss is None else loss).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_half_precision_is_close_to_full_precision(
    head: str, dtype: torch.dtype, device: torch.device
) -> None:
    """To the rounding of the type: 8 or 11 bits of mantissa through two layers."""
    ours, _ = pair(head)
    ours = ours.eval().to(device)
    ids, mask = (each.to(device) for each in padded_batch("left"))
    with torch.no_grad():
        full = ours(ids, attention_mask=mask)[0]
        half = ours.to(dtype)(ids, attention_mask=mask)[0]
    assert half.dtype == dtype
    assert half.isfinite().all()
    atol = 0.15 if dtype == torch.bfloat16 else 0.02
    real = mask.bool() if half.shape[:2] == mask.shape else slice(None)
    torch.testing.assert_close(half[real].float(), full[real], rtol=0.05, atol=atol)


def test_dropout_is_active_in_training_only() -> None:
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        ours, _ = pair("base", **{name: 0.5})
        ids, _ = padded_batch("right")
        assert not torch.equal(ours(ids)[0], ours(ids)[0]), name
        ours.eval()
        assert torch.equal(ours(ids)[0], ours(ids)[0]), name


def test_new_weights_are_normal_with_zero_biases() -> None:
    config = GPTJConfig(vocab_size=500, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    model = GPTJForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif "ln_" in name:
            assert parameter.eq(1).all(), name
        else:
            assert abs(float(parameter.detach().std()) - 0.02) < 0.002, name


def test_tied_embeddings_share_one_matrix() -> None:
    model = GPTJForCausalLM(
        GPTJConfig(
            vocab_size=50, n_embd=32, n_layer=1, n_head=2, rotary_dim=4, tie_word_embeddings=True
        )
    )
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_6b_preset_has_the_published_size() -> None:
    """285 tensors, 6,050,882,784 parameters; on the meta device they cost no memory."""
    with torch.device("meta"):
        model = GPTJForCausalLM(GPTJConfig.preset("6b"))
    assert len(model.state_dict()) == 285
    assert model.num_parameters() == 6_050_882_784


def test_wrong_inputs_are_refused_with_their_values() -> None:
    ours, _ = pair("base")
    ids, mask = padded_batch("right")
    with pytest.raises(ValueError, match="exactly one"):
        ours()
    with pytest.raises(ValueError, match="exactly one"):
        ours(ids, inputs_embeds=torch.zeros(3, 10, 32))
    with pytest.raises(ValueError, match=r"\(3, 10\), got \(3, 9\)"):
        ours(ids, attention_mask=mask[:, :9])
    with pytest.raises(ValueError, match=r"65 tokens .* n_positions=64"):
        ours(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match=r"position 64 .* n_positions=64"):
        ours(ids[:1], position_ids=torch.arange(55, 65)[None])


def test_left_padding_does_not_change_the_real_tokens() -> None:
    ours, _ = pair("causal-lm")
    ours.eval()
    ids, mask = padded_batch("left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = ours(ids, attention_mask=mask, position_ids=positions).logits
    assert padded.isfinite().all()
    for row in range(3):
        real = int(mask[row].sum())
        alone = ours(ids[row : row + 1, -real:]).logits
        torch.testing.assert_close(padded[row : row + 1, -real:], alone, **TOLERANCE)
