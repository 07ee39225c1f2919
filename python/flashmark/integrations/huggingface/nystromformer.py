"""Nyströmformer's attention as a module with the published model's weights, and the swap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashmark.arguments import check_count
from flashmark.variants.nystromformer import INVERSES, nystromformer_attention


class NystromformerSelfAttention(nn.Module):
    """Projections, `nystromformer_attention` and convolution residual: (B, N, E) to (B, N, E).

    Parameters have the names and shapes of the layer of that name in transformers, so that a
    `state_dict` goes either way.

    Args:
        embed_dim: E, a multiple of num_heads.
        num_heads: heads.
        num_landmarks: segments of the sequence; shorter sequences get exact attention.
        conv_kernel_size: taps of the residual, odd; None for no residual.
        inverse, pool_padding, backend: as for `nystromformer_attention`.
        exact: attend exactly at every length, as the published model does where its landmarks are
            as many as its tokens.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_landmarks: int = 64,
        *,
        conv_kernel_size: int | None = 65,
        inverse: str = "exact",
        pool_padding: bool = True,
        exact: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        for name, n in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            check_count(name, n)
        check_count("num_landmarks", num_landmarks)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of {num_heads}, got {embed_dim}")
        if inverse not in INVERSES:
            raise ValueError(f"inverse: expected one of {', '.join(INVERSES)}, got {inverse!r}")
        self.num_heads, self.num_landmarks, self.exact = num_heads, num_landmarks, exact
        self.inverse, self.pool_padding, self.backend = inverse, pool_padding, backend
        self.query, self.key, self.value = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.conv = None
        if conv_kernel_size is not None:
            if check_count("conv_kernel_size", conv_kernel_size) % 2 == 0:
                raise ValueError(f"conv_kernel_size: expected an odd int, got {conv_kernel_size}")
            self.conv = nn.Conv2d(
                num_heads, num_heads, (conv_kernel_size, 1), bias=False, groups=num_heads,
                padding=(conv_kernel_size // 2, 0),
            )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor]:
        """As in transformers.

        Args:
            hidden_states: (B, N, E).
            attention_mask: (B, 1, 1 or N, N), bool (True = takes part) or added to the scores (0,
                or the most negative number, and nothing between). Only which keys take part is
                read: a key that any row sees.
            output_attentions: not available; the N x N weights are never formed.
        """
        if output_attentions:
            raise NotImplementedError(
                "output_attentions: expected False, got True; attention weights are never formed"
            )
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        out = nystromformer_attention(
            query, key, value,
            num_landmarks=max(1, query.shape[2]) if self.exact else self.num_landmarks,
            conv_weight=None if self.conv is None else self.conv.weight, inverse=self.inverse,
            key_mask=_key_mask(attention_mask), pool_padding=self.pool_padding,
            backend=self.backend,
        )  # fmt: skip
        return (out.transpose(1, 2).flatten(-2),)


def _key_mask(attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        raise ValueError(
            "attention_mask: expected (B, 1, 1, N) or (B, 1, N, N), "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask.dtype != torch.bool:
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return attention_mask[:, 0].any(1)


def convert_nystromformer(
    model: nn.Module,
    *,
    inverse: str | None = None,
    pool_padding: bool = True,
    backend: str = "auto",
) -> nn.Module:
    """Put flashmark's attention in every layer of a transformers Nyströmformer, in place.

    Weights are taken over (the same parameters, not copies), and the model computes what it did: in
    particular, each sample's output depends on the others of its batch if the published start of
    the inverse says so.

    Args:
        model: `NystromformerModel` or a model that contains it.
        inverse: "exact" uncouples the samples of a batch; None keeps each layer's own choice.
        pool_padding, backend: as for `nystromformer_attention`.

    Returns:
        The model. Lengths need not be the one that it was configured for any more: segments follow
        the length of the input.

    Raises:
        ValueError: the model holds no such layer, or one that cannot be converted.
    """
    from transformers.models.nystromformer import modeling_nystromformer as theirs

    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, theirs.NystromformerSelfAttention)
    ]
    if not layers:
        raise ValueError(
            f"model: expected one with Nyströmformer layers, got {type(model).__name__}"
        )
    for parent, name, layer in layers:
        own = NystromformerSelfAttention(
            layer.query.in_features, layer.num_attention_heads, layer.num_landmarks,
            conv_kernel_size=layer.conv_kernel_size, pool_padding=pool_padding,
            inverse=inverse or ("original" if layer.init_option == "original" else "exact"),
            exact=layer.num_landmarks == layer.seq_len, backend=backend,
        )  # fmt: skip
        own.query, own.key, own.value = layer.query, layer.key, layer.value
        if own.conv is not None:
            own.conv = layer.conv
        setattr(parent, name, own.train(layer.training))
    return model
