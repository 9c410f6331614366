"""GPT-J in PyTorch: token ids (B, L) in, hidden states, logits and losses out.

Shape suffixes of names: B batch, L positions of this call, S positions including the past,
D width, H heads, K head width, R rotated dimensions of a head, V vocabulary, C classes.

Parameter names are those of the published checkpoint (EleutherAI/gpt-j-6B on Hugging Face), so
state dicts load both ways without renaming. Architecture: Wang and Komatsuzaki, "GPT-J-6B", 2021,
https://github.com/kingoflolz/mesh-transformer-jax; rotary embedding: Su et al., "RoFormer", 2021,
https://arxiv.org/abs/2104.09864, equation 34.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptj.checkpoints.folder import ModelFolder
from gptj.config import GPTJConfig
from gptj.generation import GenerationConfig, generate
from gptj.kv_cache import KVCache
from gptj.layers.linear_cross_entropy import IGNORED_LABEL as IGNORED_LABEL
from gptj.layers.linear_cross_entropy import LanguageModelHead
from gptj.layers.recomputation import checkpoint_selectively
from gptj.layers.varlen_attention import (
    DocumentBorders,
    DocumentsByLength,
    attend_documents,
    uses_flash,
)
from gptj.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
)
from gptj.pretrained import GPTJPreTrainedModel as GPTJPreTrainedModel

ROTARY_BASE = 10000.0

Past = KVCache | Sequence[tuple[Tensor, Tensor]]


class GPTJModel(GPTJPreTrainedModel):
    """Embedding, blocks, final norm: ids (B, L) to hidden states (B, L, D)."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPTJBlock(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.initialize()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Hugging Face's arguments, with the same meaning.

        Args:
            input_ids: (B, L) int64; or instead
            inputs_embeds: (B, L, D).
            past_key_values: the cache of S - L earlier positions, which this call extends.
            attention_mask: (B, S), 1 on visible positions and 0 on padding; or (B, 1, L, S),
                boolean or additive, used as is.
            token_type_ids: (B, L), embedded by wte and added.
            position_ids: (B, L); default: continue after the past.
            use_cache: return the cache; default: the configuration's; off while training with
                gradient checkpointing.
            output_attentions: return each layer's probabilities (B, H, L, S).
            output_hidden_states: return each block's input and the final hidden states.
            return_dict: False returns a plain tuple of the values that are not None.
            cu_seqlens: (N + 1) int32, for rows that pack several documents: in the flattened batch,
                document i spans [cu_seqlens[i], cu_seqlens[i + 1]), within one row. Each is
                computed independently, with positions from 0. attention_mask is ignored (padding
                counts as documents), and nothing is cached.

        Raises:
            ValueError: if not exactly one of input_ids and inputs_embeds is given, a position is
                beyond n_positions, or cu_seqlens do not cover the rows or are combined with a
                cache or output_attentions.
        """
        x_BLD = self.drop(self._embed(input_ids, inputs_embeds, token_type_ids))
        if use_cache is None:
            use_cache = self.config.use_cache and cu_seqlens is None
        trains = self.training and torch.is_grad_enabled()
        recompute = self.gradient_checkpointing if trains else False
        if recompute and use_cache:
            use_cache = False  # a block that runs twice would append to the cache twice
        cache = KVCache.of(past_key_values) if use_cache or past_key_values is not None else None
        with_attentions = _given(output_attentions, self.config.output_attentions)
        with_hidden_states = _given(output_hidden_states, self.config.output_hidden_states)

        past = cache.length if cache is not None else 0
        borders = None
        if cu_seqlens is not None:
            if cache is not None or with_attentions:
                raise ValueError(
                    "packed documents (cu_seqlens) support neither a cache nor output_attentions"
                )
            batch, length, _ = x_BLD.shape
            borders = DocumentBorders.of(cu_seqlens.to(x_BLD.device), batch * length, length)
            if position_ids is None:
                position_ids = borders.positions_T.view(batch, length)
        rotary = Rotary.at(self._positions(position_ids, x_BLD, past), self.config)
        if borders is not None:
            dropout = self.config.attn_pdrop if self.training else 0.0
            flash = uses_flash(x_BLD, self.config.n_embd // self.config.n_head, dropout)
            by_length = None if flash else borders.by_length()
            mask = AttentionBias(None, True, documents=borders, by_length=by_length)
        else:
            mask = attention_bias(attention_mask, x_BLD, past)
        hidden_states, attentions = [], []
        for block in self.h:
            if with_hidden_states:  # each is as large as the activations: keep only if requested
                hidden_states.append(x_BLD)
            if recompute:
                arguments = (x_BLD, rotary, mask, None, with_attentions)
                if recompute == "selective":
                    x_BLD, probabilities = checkpoint_selectively(
                        block, *arguments, attention_dropout=self.config.attn_pdrop
                    )
                else:
                    x_BLD, probabilities = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BLD, probabilities = block(x_BLD, rotary, mask, cache, with_attentions)
            attentions.append(probabilities)
        x_BLD = self.ln_f(x_BLD)
        if with_hidden_states:
            hidden_states.append(x_BLD)

        output = BaseModelOutput(
            last_hidden_state=x_BLD,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden_states) if with_hidden_states else None,
            attentions=tuple(attentions) if with_attentions else None,
        )
        return output if _given(return_dict, self.config.return_dict) else output.to_tuple()

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor | None
    ) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x_BLD: Tensor = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:
            x_BLD = x_BLD + self.wte(token_type_ids.view(-1, x_BLD.shape[1]))
        return x_BLD

    def _positions(self, position_ids: Tensor | None, x_BLD: Tensor, past: int) -> Tensor:
        end = past + x_BLD.shape[1]
        if position_ids is None:
            if end > self.config.n_positions:
                raise ValueError(
                    f"a sequence of {end} tokens is longer than the model's "
                    f"n_positions={self.config.n_positions}; shorten it"
                )
            return torch.arange(past, end, device=x_BLD.device)[None]
        # Only on the CPU: reading positions back would synchronize the GPU at every step.
        if position_ids.device.type == "cpu" and position_ids.numel():
            last = int(position_ids.max())
            if last >= self.config.n_positions:
                raise ValueError(
                    f"position {last} is not below the model's "
                    f"n_positions={self.config.n_positions}"
                )
        return position_ids.view(-1, x_BLD.shape[1])


class GPTJBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)): one norm, two parallel branches."""

    def __init__(self, config: GPTJConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTJAttention(config, layer)
        self.mlp = GPTJMLP(config)

    def forward(
        self,
        x_BLD: Tensor,
        rotary: Rotary,
        mask: AttentionBias,
        cache: KVCache | None,
        with_probabilities: bool,
    ) -> tuple[Tensor, Tensor | None]:
        h_BLD = self.ln_1(x_BLD)
        attended_BLD, probabilities = self.attn(h_BLD, rotary, mask, cache, with_probabilities)
        return x_BLD + attended_BLD + self.mlp(h_BLD), probabilities


class GPTJAttention(nn.Module):
    """Multi-head causal self-attention with rotary queries and keys."""

    def __init__(self, config: GPTJConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.n_head
        self.dropout = config.attn_pdrop
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        h_BLD: Tensor,
        rotary: Rotary,
        mask: AttentionBias,
        cache: KVCache | None,
        with_probabilities: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q_BLHK = self.q_proj(h_BLD).unflatten(-1, (self.heads, -1))
        k_BLHK = self.k_proj(h_BLD).unflatten(-1, (self.heads, -1))
        v_BHLK = self.v_proj(h_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_BHLK = rotary.rotate(q_BLHK).transpose(1, 2)
        k_BHSK = rotary.rotate(k_BLHK).transpose(1, 2)
        v_BHSK = v_BHLK
        if cache is not None:
            k_BHSK, v_BHSK = cache.update(self.layer, k_BHSK, v_BHLK)
        dropout = self.dropout if self.training else 0.0
        if mask.documents is not None:
            probabilities = None
            q_THK, k_THK, v_THK = (
                each.transpose(1, 2).flatten(0, 1) for each in (q_BHLK, k_BHSK, v_BHSK)
            )
            a_THK = attend_documents(q_THK, k_THK, v_THK, mask.documents, mask.by_length, dropout)
            a_BHLK = a_THK.unflatten(0, (len(h_BLD), -1)).transpose(1, 2)
        elif with_probabilities or mask.blind_rows:
            a_BHLK, probabilities = attend_visibly(q_BHLK, k_BHSK, v_BHSK, mask, dropout)
        else:
            probabilities = None
            a_BHLK = F.scaled_dot_product_attention(
                q_BHLK,
                k_BHSK,
                v_BHSK,
                attn_mask=mask.scores,
                is_causal=mask.is_causal,
                dropout_p=dropout,
            )
        out_BLD = self.out_proj(a_BHLK.transpose(1, 2).flatten(2))
        return self.resid_dropout(out_BLD), probabilities


class GPTJMLP(nn.Module):
    """Up-projection, activation, down-projection."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.n_embd, config.inner_dim)
        self.fc_out = nn.Linear(config.inner_dim, config.n_embd)
        self.activation = config.activation_function
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, h_BLD: Tensor) -> Tensor:
        # Of a matrix, DeepSpeed's stage 3 adds the bias within the product; otherwise in place,
        # into an output that checkpoint_selectively keeps.
        h_TD = h_BLD.flatten(0, -2)
        out_TD: Tensor = self.dropout(self.fc_out(activate(self.fc_in(h_TD), self.activation)))
        return out_TD.view_as(h_BLD)


@dataclass(frozen=True)
class Rotary:
    """Sines and cosines of this call's positions, shared by all layers; always fp32.

    Computed rather than stored: a buffer would lose precision in `model.half()`, and would be
    missing from published checkpoints.
    """

    sin_BL1R: Tensor  # each angle twice, once per dimension of its pair
    cos_BL1R: Tensor

    @classmethod
    def at(cls, positions_BL: Tensor, config: GPTJConfig) -> Rotary:
        """Angle of pair i at position p: p / 10000^(2i / R)."""
        dim = config.rotated_dim
        exponents = torch.arange(0, dim, 2, device=positions_BL.device).float() / dim
        angles = positions_BL.float()[:, :, None] * (1.0 / ROTARY_BASE**exponents)
        angles_BL1R = angles.repeat_interleave(2, dim=-1)[:, :, None, :]
        return cls(angles_BL1R.sin(), angles_BL1R.cos())

    def rotate(self, x_BLHK: Tensor) -> Tensor:
        """Rotate each pair (2i, 2i + 1) of the first R dimensions; the others pass through.

        Computed in fp32 and rounded once, to x's dtype.
        """
        dim = self.sin_BL1R.shape[-1]
        x_BLHR = x_BLHK[..., :dim].float()
        turned = torch.stack((-x_BLHR[..., 1::2], x_BLHR[..., ::2]), dim=-1).flatten(-2)
        rotated = (x_BLHR * self.cos_BL1R + turned * self.sin_BL1R).to(x_BLHK.dtype)
        if dim == x_BLHK.shape[-1]:
            return rotated
        return torch.cat((rotated, x_BLHK[..., dim:]), dim=-1)


@dataclass(frozen=True)
class AttentionBias:
    """What each query may attend to: a bias, or plain causality, which has faster kernels."""

    scores: Tensor | None  # (B or 1, 1, L, S): 0 where visible, the dtype's minimum where not
    is_causal: bool
    # Whether gradients must flow through a fully masked row. The fused kernels' backward pass
    # recovers probabilities from the log-sum-exp, which rounds them to 1 next to the minimum.
    blind_rows: bool = False
    documents: DocumentBorders | None = None  # each attends causally, only within itself
    by_length: DocumentsByLength | None = None


def attention_bias(attention_mask: Tensor | None, x_BLD: Tensor, past: int) -> AttentionBias:
    """Causal and padding masks for L queries after `past` positions.

    Masked positions get the dtype's minimum rather than -inf, so that a fully masked row (left
    padding) averages over everything, as in Hugging Face, and is never NaN.
    """
    batch, length, _ = x_BLD.shape
    total = past + length
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.dtype != torch.bool:
            return AttentionBias(attention_mask.to(x_BLD.dtype), is_causal=False)
        return AttentionBias(_hidden(attention_mask, x_BLD.dtype), is_causal=False)
    if attention_mask is not None and attention_mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask must be (batch, past + new positions) = ({batch}, {total}), "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask is None or bool(attention_mask.all()):
        if length == 1:
            return AttentionBias(None, is_causal=False)  # the newest position sees everything
        if past == 0:
            return AttentionBias(None, is_causal=True)
    rows = torch.arange(past, total, device=x_BLD.device)[:, None]
    visible = (torch.arange(total, device=x_BLD.device)[None, :] <= rows)[None, None]
    if attention_mask is not None:
        visible = visible & _moved_mask(attention_mask, x_BLD.device)[:, None, None, :]
    # The first query sees the fewest positions. Asked of the mask, which may be on the host: a
    # question to a GPU waits for it.
    blind_rows = (
        torch.is_grad_enabled()
        and attention_mask is not None
        and not bool(attention_mask[:, : past + 1].bool().any(dim=1).all())
    )
    return AttentionBias(_hidden(visible, x_BLD.dtype), is_causal=False, blind_rows=blind_rows)


def _moved_mask(attention_mask: Tensor, device: torch.device) -> Tensor:
    """A mask, which may be on the host, as booleans on a device.

    From pinned memory it is copied without waiting for the device; whole and before its conversion,
    since a converted copy on the host would not be pinned.
    """
    return attention_mask.to(device, non_blocking=True).bool()


def attend_visibly(
    q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: AttentionBias, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention that also returns probabilities (B, H, L, S); scores and softmax in fp32."""
    scores = q_BHLK.float() @ k_BHSK.float().transpose(-1, -2) / math.sqrt(q_BHLK.shape[-1])
    if mask.is_causal:
        length = scores.shape[-1]
        visible = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
        scores = scores + _hidden(visible, scores.dtype)
    elif mask.scores is not None:
        scores = scores + mask.scores
    probabilities = F.dropout(scores.softmax(dim=-1).to(v_BHSK.dtype), p=dropout)
    return probabilities @ v_BHSK, probabilities


def activate(x: Tensor, name: str) -> Tensor:
    """The MLP's activation; gelu_new is the tanh approximation (Hendrycks and Gimpel, 2016)."""
    if name == "gelu_new":
        return F.gelu(x, approximate="tanh")
    if name == "gelu":
        return F.gelu(x)
    if name == "relu":
        return F.relu(x)
    return F.silu(x)  # GPTJConfig accepts no other name


class GPTJForCausalLM(GPTJPreTrainedModel):
    """The base model and a next-token head."""

    _tied_weights_keys: ClassVar[Mapping[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config)
        self.lm_head = LanguageModelHead(config.n_embd, config.vocab_size)
        self.initialize()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share wte's matrix with lm_head, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cu_seqlens: Tensor | None = None,
        skip_logits: bool = False,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """As GPTJModel.forward, and:

        Args:
            labels: (B, L); position i predicts label i + 1; -100 is ignored.
            logits_to_keep: compute logits of only this many last positions, or of the positions in
                an index tensor; 0: all.
            num_items_in_batch: divide the summed loss by this instead of this batch's label count:
                the count over the global batch that this one is part of.
            skip_logits: return only the loss, without materializing all logits: saves 4 GB at
                4 x 1024 positions and a vocabulary of 50,400. Equal up to the order of summation;
                requires labels.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits requires labels")
        output = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            cu_seqlens=cu_seqlens,
        )
        x_BLD = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            x_BLD = x_BLD[:, logits_to_keep]
        elif logits_to_keep:
            x_BLD = x_BLD[:, -logits_to_keep:]
        logits_BLV, loss = None, None
        if skip_logits and labels is not None:
            loss = self._loss_in_chunks(x_BLD, labels, num_items_in_batch)
        else:
            logits_BLV = self.lm_head(x_BLD)
            if labels is not None:
                loss = causal_lm_loss(logits_BLV, labels, num_items_in_batch)
        result = CausalLMOutput(
            loss=loss,
            logits=logits_BLV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if _given(return_dict, self.config.return_dict) else result.to_tuple()

    def _loss_in_chunks(
        self, x_BLD: Tensor, labels_BL: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        """Like causal_lm_loss, without materializing all logits."""
        next_BL = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED_LABEL).to(x_BLD.device)
        total: Tensor = self.lm_head(x_BLD, next_BL)
        return total / ((next_BL != IGNORED_LABEL).sum() if num_items is None else num_items)

    generate = generate

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def config_of(cls, folder: ModelFolder, **overrides: Any) -> GPTJConfig:
        """A folder's configuration, with the end tokens of its `generation_config.json`."""
        config = super().config_of(folder, **overrides)
        if "eos_token_id" not in overrides:
            config.add_end_tokens(folder)
        return config

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults for `generate` from the configuration."""
        return GenerationConfig(self.config.eos_token_id, self.config.pad_token_id)


class GPTJForSequenceClassification(GPTJPreTrainedModel):
    """The base model and a linear classifier on each sequence's last token."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.initialize()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """As GPTJModel.forward, and:

        Args:
            labels: (B) class indices, (B, C) of 0.0 and 1.0 for multi-label, or (B) or (B, C)
                regression targets, as config.problem_type says; if unset, num_labels and the dtype
                decide.

        Raises:
            ValueError: for a batch of several rows with neither attention_mask nor pad_token_id,
                so that last tokens cannot be told from padding.
        """
        output = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        x_BLD = output.last_hidden_state
        last_B = self._last_tokens(input_ids, attention_mask, x_BLD)
        logits_BC = self.score(x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), last_B])
        loss = None
        if labels is not None:
            loss = classification_loss(logits_BC, labels, self.config.problem_type)
        result = SequenceClassifierOutput(
            loss=loss,
            logits=logits_BC,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if _given(return_dict, self.config.return_dict) else result.to_tuple()

    def _last_tokens(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, x_BLD: Tensor
    ) -> Tensor:
        """Index of each row's last token that is not padding, (B).

        By the mask, if given (padding may be the eos token, which may also end a text); otherwise
        by Hugging Face's rule: the last id that is not pad_token_id.
        """
        batch, length, _ = x_BLD.shape
        if attention_mask is not None and attention_mask.dim() == 2:
            real_BL = _moved_mask(attention_mask, x_BLD.device)[:, -length:]
        elif self.config.pad_token_id is not None and input_ids is not None:
            real_BL = input_ids != self.config.pad_token_id
        elif batch == 1 or (self.config.pad_token_id is not None and input_ids is None):
            return torch.full((batch,), length - 1, device=x_BLD.device)
        else:
            raise ValueError(
                f"a batch of {batch} rows needs an attention_mask, or a pad_token_id in the "
                f"configuration, to tell each row's last token from padding"
            )
        return (real_BL * torch.arange(length, device=x_BLD.device)).argmax(dim=-1)


class GPTJForQuestionAnswering(GPTJPreTrainedModel):
    """The base model and two logits per token: that the answer starts, or ends, there."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        self.transformer = GPTJModel(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.initialize()

    def config_to_save(self) -> GPTJConfig:
        config = super().config_to_save()
        config.num_labels = 2  # start and end: Hugging Face makes one output per label
        return config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """As GPTJModel.forward, and:

        Args:
            start_positions, end_positions: (B), the answer's first and last token; positions beyond
                the sequence are ignored.
        """
        output = self.transformer(
            input_ids,
            None,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            False,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        start_BL, end_BL = self.qa_outputs(output.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = span_loss(start_BL, start_positions)
            loss = (start_loss + span_loss(end_BL, end_positions)) / 2
        result = QuestionAnsweringOutput(
            loss=loss,
            start_logits=start_BL.contiguous(),
            end_logits=end_BL.contiguous(),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if _given(return_dict, self.config.return_dict) else result.to_tuple()


HEAD_CLASSES: dict[str, type[GPTJPreTrainedModel]] = {
    cls.__name__: cls
    for cls in (
        GPTJModel,
        GPTJForCausalLM,
        GPTJForSequenceClassification,
        GPTJForQuestionAnswering,
    )
}


def causal_lm_loss(
    logits_BLV: Tensor, labels_BL: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of each position's next label, in fp32: a mean, or a sum over `num_items`."""
    logits = logits_BLV[:, :-1].flatten(0, 1).float()
    labels = labels_BL[:, 1:].flatten().to(logits.device)
    if num_items is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum") / num_items


def classification_loss(logits_BC: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """MSE, cross-entropy or binary cross-entropy, in fp32, depending on the problem type.

    If None: one class means regression, integers are class indices, and floats are multi-label
    (Hugging Face's rule).
    """
    logits, labels = logits_BC.float(), labels.to(logits_BC.device)
    classes = logits.shape[-1]
    if problem_type == "regression" or (problem_type is None and classes == 1):
        return F.mse_loss(logits.view(-1, classes), labels.float().view(-1, classes))
    whole_numbers = not labels.dtype.is_floating_point
    if problem_type == "single_label_classification" or (problem_type is None and whole_numbers):
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def span_loss(logits_BL: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy over the positions of a sequence; those at or beyond its end are ignored."""
    length = logits_BL.shape[1]
    positions_B = positions.view(-1).to(logits_BL.device).clamp(0, length)
    return F.cross_entropy(logits_BL.float(), positions_B, ignore_index=length)


def _hidden(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the dtype's minimum elsewhere."""
    scores = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return scores.masked_fill(~visible, torch.finfo(dtype).min)


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value
