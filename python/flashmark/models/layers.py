"""Parts shared by the models: normalisation, feed-forward, recomputed layers, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashmark.autograd import without_autocast
from flashmark.nn.tokens import Packing, packed_places

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
NORMS: dict[str, Callable[..., nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class FeedForward(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)), as in Llama and T5 v1.1.

    With `wide_down` the last product of float16 inputs is computed and returned in float32.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        *,
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        wide_down: bool = False,
    ):
        super().__init__()
        self.wide_down = wide_down
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, hidden, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if gated else None
        self.down = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = self.activation(self.up(x))
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        hidden = self.dropout(hidden)
        if self.wide_down and hidden.dtype == torch.float16:
            with without_autocast(hidden.device.type):
                return F.linear(hidden.float(), self.down.weight.float())
        return self.down(hidden)


class ShortConvolution(nn.Module):
    """Each channel's weighted sum of the last few tokens: order for attention that has none.

    Like the attention modules it takes tokens that `key_mask` leaves out as if they were not there.
    """

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(taps, width).uniform_(-1, 1) / taps**0.5)

    def init_cache(
        self, batch: int, dtype: torch.dtype, device: torch.device, rollback: int = 0
    ) -> Tensor:
        """The last taps - 1 + `rollback` tokens, (B, ..., width), the newest last."""
        held = self.taps - 1 + rollback
        return torch.zeros(batch, held, self.weight.shape[1], dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
        cache: Tensor | None = None,
    ) -> Tensor:
        """(B, N, width); `cache` is updated in place."""
        packing = None
        if key_mask is not None:
            packing = Packing.of(key_mask)
            x = packing.pack(x)
        n, before = x.shape[1], self.taps - 1
        held = x.new_zeros(x.shape[0], before, x.shape[2]) if cache is None else cache.to(x.dtype)
        x = torch.cat([held, x], dim=1)
        if cache is not None:
            count = n if packing is None else packing.counts[:, None]
            last = count + torch.arange(cache.shape[1], device=x.device).expand(x.shape[0], -1)
            cache.copy_(x.gather(1, last[..., None].expand_as(cache)))
            x = x[:, cache.shape[1] - before :]
        parts = [weight * x[:, tap : tap + n] for tap, weight in enumerate(self.weight)]
        if cu_seqlens is not None:  # the tokens before the first of a sequence are another's
            places = packed_places(cu_seqlens, n)[..., None]
            parts = [part.masked_fill(places < before - tap, 0) for tap, part in enumerate(parts)]
        out = sum(parts)
        return out if packing is None else packing.unpack(out)


def run_layer(layer: nn.Module, recompute: bool, x: Tensor, **options) -> Tensor:
    """`layer(x, **options)`; with `recompute` its activations are computed again in backward."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, x, use_reentrant=False, **options)
    return layer(x, **options)


def check_choice(name: str, value: object, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Token ids (B, N). Their values are checked on the CPU only: elsewhere it would wait."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected an int32 or int64 tensor, got {got}")
    if ids.dim() != 2:
        raise ValueError(f"{name}: expected shape (B, N), got {tuple(ids.shape)}")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}: expected token ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}"
        )


@torch.no_grad()
def initialise(modules: Iterable[nn.Module], layers: nn.ModuleList, width: int) -> None:
    """Variance 1 from layer to layer; what is added to the residual stream stays small."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=width**-0.5)
    for layer in layers:
        added = [layer.mlp.down, getattr(layer.attention, "out", None)]
        added.append(getattr(layer.cross_attention, "out", None))
        for linear in added:
            if isinstance(linear, nn.Linear):
                linear.weight /= (2 * len(layers)) ** 0.5


def check_key_mask(name: str, key_mask: Tensor | None, ids: Tensor) -> None:
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}")
    if key_mask.shape != ids.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(ids.shape)}, one bool a token of this call, "
            f"got {tuple(key_mask.shape)}"
        )


def token_counts(ids: Tensor, key_mask: Tensor | None) -> Tensor | int:
    """Tokens of each sample that take part."""
    return ids.shape[1] if key_mask is None else key_mask.sum(1, dtype=torch.int32)


def check_room(cache, name: str, ids: Tensor, key_mask: Tensor | None) -> None:
    """Whether a cache with `length` (B,) and `max_length` takes these tokens."""
    if cache.length.shape[0] != ids.shape[0]:
        raise ValueError(
            f"cache: expected a batch of {ids.shape[0]} like {name}, got {cache.length.shape[0]}"
        )
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.shape[0]:
        return  # elsewhere it would wait for the device
    needed = int((cache.length + token_counts(ids, key_mask)).max())
    if needed > cache.max_length:
        raise ValueError(
            f"cache: expected room for {needed} tokens, got max_length {cache.max_length}"
        )
