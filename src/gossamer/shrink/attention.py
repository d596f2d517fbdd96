"""Multi-head attention with fewer heads than its width would hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SlimMultiheadAttention"]


class SlimMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that has lost heads; the width of its inputs and outputs stays.

    PyTorch's own asks that `num_heads * head_dim` equals `embed_dim`. This class takes its place
    when heads are cut: `in_proj_weight` is `(3 * num_heads * head_dim, embed_dim)` (or the three
    separate weights are `(num_heads * head_dim, their input)`), `out_proj.weight` is
    `(embed_dim, num_heads * head_dim)`. Inputs, masks and outputs are as in
    `torch.nn.MultiheadAttention`; averaged attention weights are over the heads that are left.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output and, if asked for, its weights; see `torch.nn.MultiheadAttention`."""
        batched = query.dim() == 3
        inputs = [query, key, value]
        if not batched:
            inputs = [tensor.unsqueeze(0) for tensor in inputs]
        elif not self.batch_first:
            inputs = [tensor.transpose(0, 1) for tensor in inputs]
        q, k, v = (
            self._by_head(F.linear(tensor, weight, bias))
            for tensor, weight, bias in zip(inputs, self._weights(), self._biases(), strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q, batched)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _by_head(self, values: Tensor) -> Tensor:
        """`(batch, positions, heads * head_dim)` as `(batch, heads, positions, head_dim)`."""
        return values.view(*values.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)

    def _biases(self) -> tuple[Tensor | None, ...]:
        return (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, batched: bool
    ) -> Tensor | None:
        """What to add to the scores `(batch, heads, queries, keys)`; True in a mask hides."""
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3 and len(attn_mask) != len(q) * self.num_heads:
                raise ValueError(
                    f"attn_mask has {len(attn_mask)} slices for {len(q)} samples and "
                    f"{self.num_heads} heads that are left of the attention: give one mask for all "
                    "heads, (queries, keys)"
                )
            per_head = attn_mask.dim() == 3
            masks.append(
                attn_mask.view(*q.shape[:2], *attn_mask.shape[1:]) if per_head else attn_mask
            )
        if padding is not None:
            masks.append((padding if batched else padding.unsqueeze(0))[:, None, None, :])
        added = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
            added = mask if added is None else added + mask
        return added
