"""Landmarks: their core matrix, how to initialise them, and how to keep weight decay off them."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from flashmark import native
from flashmark.autograd import autocast_is_on, without_autocast
from flashmark.sharded import over_shards

METHODS = ("cholesky", "tikhonov", "newton_schulz", "identity")
KINDS = ("softmax", "kernel")


@over_shards
def landmark_core(
    landmark_queries: Tensor,
    landmark_keys: Tensor | None = None,
    *,
    scale: float | None = None,
    method: str | None = None,
    kind: str = "softmax",
    jitter: float = 1e-4,
    iterations: int = 6,
) -> Tensor:
    """The core of Nyström attention: the (pseudo-)inverse of how landmarks attend to each other.

    With S = exp(scale X Y^T) for landmark queries X and landmark keys Y, D = diag(S), and
    A = softmax(scale X Y^T) over the last dimension:

    - "cholesky" (tied landmarks, Y = X; the default there): S is positive definite. kind="softmax":
      (S + jitter D)^-1 diag((S + jitter D) 1), an inverse of A whose rows sum to 1 by construction.
    - "tikhonov" (the default for a pair): argmin_C |A C - I|^2 + jitter |C - 1 1^T / M|^2, that is
      (A^T A + jitter)^-1 (A^T + jitter 1 1^T / M); its rows sum to 1 as well. Untied landmarks are
      ill-conditioned: one warning a process names the condition number of A.
    - "newton_schulz": the iteration of Nyströmformer (Xiong et al., 2021), for its trained weights.
      It has not converged after its customary 6 steps.
    - "identity": landmarks are read as they are.

    kind="kernel" is for normalize="mass": the same for S scaled to a unit diagonal,
    D^-1/2 S D^-1/2, with no row normalisation: (. + jitter)^-1, or (S^T S + jitter)^-1 S^T.

    Args:
        landmark_queries: (..., M, D), any floating-point dtype.
        landmark_keys: the same shape, or None for tied landmarks.
        scale: factor of X Y^T; 1 / sqrt(D) when None. Use the scale of the attention.
        method: one of the above; None is "cholesky" when tied, "tikhonov" for a pair.
        kind: "softmax" or "kernel".
        jitter: relative regularisation, >= 0 (the diagonal is 1, or rows sum to 1). 0 is for
            landmarks known to be independent. Where jitter > 0 is too small for rounding, a head
            takes 10 times as much, and again.
        iterations: steps of "newton_schulz".

    Returns:
        (..., M, M) in float32 (float64 for float64 landmarks). Gradients go through solves of the
        same system, never through an unrolled inverse ("newton_schulz" is its own definition).

    Raises:
        ValueError, TypeError: an argument out of range, "cholesky" on a pair, or a singular core
            with jitter=0. On a GPU, where asking would be a wait, and under torch.compile, the
            singular core is not finite instead.

    Nothing is kept from one call to the next. What decodes many steps computes the core once and
    passes it on as `core=`.
    """
    tied = landmark_keys is None or landmark_keys is landmark_queries
    if method is None:
        method = "cholesky" if tied else "tikhonov"
    _check(landmark_queries, landmark_keys, method, kind, jitter, iterations)
    if method == "cholesky" and not tied:
        raise ValueError("method: expected 'tikhonov' for a pair of landmarks, got 'cholesky'")
    scale = 1 / math.sqrt(landmark_queries.shape[-1]) if scale is None else float(scale)
    keys = None if tied else landmark_keys
    return solve_core(landmark_queries, keys, scale, method, kind, jitter, iterations)


def solve_core(
    landmark_queries: Tensor,
    landmark_keys: Tensor | None,
    scale: float,
    method: str,
    kind: str,
    jitter: float = 1e-4,
    iterations: int = 6,
) -> Tensor:
    """`landmark_core` of checked arguments; `landmark_keys` None for tied landmarks."""
    if method == "cholesky" and not scale > 0:
        raise ValueError(f"scale: expected a number > 0 with method='cholesky', got {scale}")
    if method == "cholesky" and _in_one_operator(landmark_queries, jitter):
        X, softmax = landmark_queries, kind == "softmax"
        if X.dtype is not torch.float32 and X.dtype is not torch.float64:
            X = X.float()

        def again(X: Tensor) -> Tensor:
            wide = X.double()
            return _tied_core((wide * scale) @ wide.mT, jitter, softmax).to(X.dtype)

        return native.landmarks_core(X, scale, jitter, softmax, again=again)
    device = landmark_queries.device.type
    if autocast_is_on(device):
        with without_autocast(device):
            return solve_core(
                landmark_queries, landmark_keys, scale, method, kind, jitter, iterations
            )
    dtype = torch.promote_types(landmark_queries.dtype, torch.float32)
    inner = torch.float64 if _in_float64(landmark_queries.device, method) else dtype
    X = landmark_queries if landmark_queries.dtype == inner else landmark_queries.to(inner)
    Y = X if landmark_keys is None else landmark_keys.to(inner)
    return _core_of(X, Y, scale, method, kind, jitter, iterations, landmark_keys is None).to(dtype)


def _in_float64(device: torch.device, method: str) -> bool:
    """Whether scores are float64. Solves cancel, and on a GPU float32 products may be in tf32, of
    10 bits."""
    return device.type == "cuda" or device.type == "cpu" and method in ("cholesky", "tikhonov")


def _core_of(
    X: Tensor, Y: Tensor, scale: float, method: str, kind: str, jitter: float, iterations: int,
    tied: bool,
) -> Tensor:  # fmt: skip
    scores = (X * scale) @ Y.mT
    if method == "identity":
        eye = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device)
        return eye.expand(scores.shape).clone()
    softmax = kind == "softmax"
    if method == "cholesky":
        return _solved(native.tied_core, _tied_core, scores, jitter, softmax)
    matrix = torch.softmax(scores, -1) if softmax else _unit_diagonal(scores)[0]
    if method == "newton_schulz":
        columns, rows = (matrix.sum(dim).amax(-1)[..., None, None] for dim in (-2, -1))
        return newton_schulz(matrix, matrix.mT / (columns * rows), iterations)  # entries >= 0
    if not tied:
        _warn_once(matrix)
    return _solved(native.tikhonov_core, _tikhonov_core, matrix, jitter, softmax)


def _in_one_operator(landmarks: Tensor, jitter: float) -> bool:
    """Whether one operator can take landmarks to their core, and one back."""
    on_cpu = landmarks.device.type == "cpu"
    return (
        1 <= landmarks.shape[-2] <= native.MOST_LANDMARKS
        and native.solves_cores(landmarks.device)
        and not (on_cpu and (jitter == 0 or torch.compiler.is_compiling()))
        and not torch._C._are_functorch_transforms_active()
        and (forward_ad._current_level < 0 or forward_ad.unpack_dual(landmarks).tangent is None)
    )


def _solved(in_native_code, in_pytorch, matrix: Tensor, jitter: float, softmax: bool) -> Tensor:
    """Core of a pair or of one tensor: in C++ where it can run and be differentiated as asked."""

    def plain(x: Tensor) -> Tensor:
        return in_pytorch(x, jitter, softmax).contiguous()

    fits = 1 <= matrix.shape[-1] <= native.MOST_LANDMARKS
    if not fits or not native.solves_cores(matrix.device):
        return plain(matrix)
    if torch.compiler.is_compiling():
        return in_native_code(matrix, jitter, softmax)
    if torch._C._are_functorch_transforms_active():
        return plain(matrix)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(matrix).tangent is not None:
        return plain(matrix)
    return in_native_code(matrix, jitter, softmax, again=plain)


def _tied_core(scores: Tensor, jitter: float, softmax: bool) -> Tensor:
    eye = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device)
    if softmax:
        return _row_normalised_inverse(scores, jitter, eye)
    return torch.cholesky_solve(eye, _cholesky(_unit_diagonal(scores)[0], jitter, eye))


def _tikhonov_core(matrix: Tensor, jitter: float, unit_rows: bool) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    core = torch.cholesky_solve(matrix.mT, _cholesky(matrix.mT @ matrix, jitter, eye))
    # (A^T A + jitter)^-1 maps the constant rows that the second term adds to constant rows
    return _with_unit_rows(core) if unit_rows else core


def _unit_diagonal(scores: Tensor) -> tuple[Tensor, Tensor]:
    """D^-1/2 S D^-1/2 for S = exp(scores), and log diag(D) / 2."""
    half = 0.5 * scores.diagonal(dim1=-2, dim2=-1)
    return torch.exp(scores - half.unsqueeze(-1) - half.unsqueeze(-2)), half


def _row_normalised_inverse(scores: Tensor, jitter: float, eye: Tensor) -> Tensor:
    """(S + jitter D)^-1 diag((S + jitter D) 1) by the unit-diagonal form: nothing overflows."""
    kernel, half = _unit_diagonal(scores)
    unit = kernel + jitter * eye
    # A common factor cancels. Norms may differ too much for any float: the bound keeps it finite.
    root = torch.exp((half - half.amax(-1, keepdim=True)).clamp_min(-40.0))
    row_sums = (unit * root.unsqueeze(-2)).sum(-1)
    factor = _cholesky(kernel, jitter, eye)
    core = torch.cholesky_solve(torch.diag_embed(row_sums), factor) / root.unsqueeze(-1)
    return _with_unit_rows(core)


def _with_unit_rows(core: Tensor) -> Tensor:
    """Core with rows that sum to 1: what rounding made of the sums is spread over the row."""
    return core + (1 - core.sum(-1, keepdim=True)) / core.shape[-1]


def _cholesky(matrix: Tensor, jitter: float, eye: Tensor) -> Tensor:
    """The factor of matrix + jitter, without the check that would wait for a GPU."""
    factor = torch.linalg.cholesky_ex(matrix + jitter * eye)[0]
    if jitter == 0 and native.readable(matrix):
        pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square()
        largest = matrix.detach().diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        floor = torch.finfo(matrix.dtype).eps * matrix.shape[-1] * largest
        native.check_definite((pivots > floor).all(-1))
    return factor


def newton_schulz(A: Tensor, Z: Tensor, iterations: int) -> Tensor:
    """Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4: towards A^-1, from a small enough Z."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for _ in range(iterations):
        AZ = A @ Z
        Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
    return Z


_warned = False


def _warn_once(matrix: Tensor) -> None:
    global _warned
    if _warned or torch.compiler.is_compiling() or matrix.device.type == "meta":
        return
    _warned = True
    condition = float(torch.linalg.cond(matrix.detach()).max())
    warnings.warn(
        f"untied landmarks give an ill-conditioned core (condition number {condition:.1e}): it is "
        "regularised; tied landmarks, one tensor for queries and keys, are better conditioned",
        stacklevel=3,
    )


def _check(landmark_queries, landmark_keys, method, kind, jitter, iterations) -> None:
    for name, x in (("landmark_queries", landmark_queries), ("landmark_keys", landmark_keys)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
        if x.dim() < 2 or x.shape != landmark_queries.shape:
            expected = "(..., M, D)" if x.dim() < 2 else str(tuple(landmark_queries.shape))
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    if method not in METHODS:
        raise ValueError(f"method: expected None or one of {', '.join(METHODS)}, got {method!r}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected 'softmax' or 'kernel', got {kind!r}")
    if not jitter >= 0:
        raise ValueError(f"jitter: expected a number >= 0, got {jitter}")
    if iterations < 1:
        raise ValueError(f"iterations: expected an int >= 1, got {iterations}")


def init_landmarks(
    kv_heads: int,
    landmarks: int,
    head_dim: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Orthogonal rows times sqrt(head_dim), (kv_heads, landmarks, head_dim).

    More landmarks than dimensions are stacked from several orthogonal blocks. float32 when `dtype`
    is None, or float64 where that is PyTorch's default. Wrap the result in an `nn.Parameter` and
    `mark_landmarks` it.
    """
    for name, n in (("kv_heads", kv_heads), ("landmarks", landmarks), ("head_dim", head_dim)):
        if n < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {n}")
    blocks = -(-landmarks // head_dim)
    shape = kv_heads, blocks, head_dim, head_dim
    normal = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    rows = torch.linalg.qr(normal).Q.flatten(1, 2)[:, :landmarks]
    if dtype is None:
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return (rows * math.sqrt(head_dim)).to(dtype).contiguous()


def mark_landmarks(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter as landmarks (attribute `_flashmark_landmarks`) and return it."""
    parameter._flashmark_landmarks = True  # type: ignore[attr-defined]
    return parameter


def landmark_parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimiser that keep landmarks out of weight decay.

    Decay pulls landmarks to the origin, where they are all alike and the core is singular.
    Landmarks are parameters marked by `mark_landmarks`, and those in whose name a part starts with
    "landmark" (a deep copy of a module loses the mark, not the name).

    Returns:
        [{"params": the others, "weight_decay": weight_decay}, {"params": landmarks, ...: 0.0}],
        in the order of `module.named_parameters()`; a group without parameters is left out.
    """
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            named = any(part.startswith("landmark") for part in name.split("."))
            groups[named or getattr(parameter, "_flashmark_landmarks", False)].append(parameter)
    decays = {False: weight_decay, True: 0.0}
    return [{"params": groups[k], "weight_decay": decays[k]} for k in groups if groups[k]]
