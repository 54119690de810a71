"""The selective scan of Mamba-1: a linear recurrence whose decay and input depend on the token.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]        y[t] = C[t] . h[t]

The scan runs in chunks of 16 tokens: one exponential, one outer product and one product with C per chunk, and one
multiplication and one addition per token. States are float32, because rounding errors would add up over the tokens.

Shapes: B batch, T tokens, E inner width, N state size.

Source: Mamba, algorithm 2 (arXiv 2312.00752); `selective_scan_ref` of mamba_ssm.
"""

from __future__ import annotations

import mlx.core as mx

from phi4_mlx.models.safe import safe

CHUNK = 16  # tokens; longer chunks hold more states at once and save nothing


def selective_scan(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, state: mx.array, keep: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Scans T tokens from a state.

    Args:
        u: the input [B, T, E], float32.
        dt: the step sizes [B, T, E], positive, float32.
        A: the decay rates [N, E], negative, float32.
        B: the input weights [B, T, N], float32.
        C: the output weights [B, T, N], float32.
        state: the state before the first token [B, N, E], float32.
        keep: [B, T], 0 where a token starts from an empty state, else 1; None for all ones.

    Returns:
        The outputs [B, T, E] and the state after the last token [B, N, E], float32.
    """
    if safe("scan"):
        outputs, states = _token_by_token(u, dt, A, B, C, state, keep)
        return outputs, states[-1]
    outputs, state = _scan(u, dt, A, B, C, state, *([] if keep is None else [keep]))
    return outputs, state


def short_scan(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, state: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """`selective_scan` of a few tokens in one chunk; returns the outputs, and the state after each token."""
    if safe("scan"):
        return _token_by_token(u, dt, A, B, C, state, None)
    if u.shape[1] == 1:  # the recurrence itself; a compiled step makes one kernel of it
        state = mx.exp(dt * A) * state + (dt * u) * B.swapaxes(1, 2)
        return C @ state, [state]
    states, _ = _states(u, dt, A, B, state)
    return (C[:, :, None, :] @ mx.stack(states, axis=1)).squeeze(2), states


def _token_by_token(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, state: mx.array, keep: mx.array | None
) -> tuple[mx.array, list[mx.array]]:
    """The outputs, and the state after each token; differentiable, with all states in memory."""
    outputs, states = [], []
    for t in range(u.shape[1]):
        decay = mx.exp(dt[:, t, None, :] * A)
        decay = decay if keep is None else decay * keep[:, t, None, None]
        state = decay * state + (dt[:, t] * u[:, t])[:, None, :] * B[:, t, :, None]
        outputs.append((C[:, t, None, :] @ state)[:, 0])
        states.append(state)
    return mx.stack(outputs, axis=1), states


@mx.custom_function
def _scan(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, state: mx.array, *keep: mx.array
) -> tuple[mx.array, mx.array]:
    outputs = []
    for part in _chunks(u.shape[1], max(1, CHUNK // len(u))):  # a chunk of all rows has about CHUNK tokens
        own_dt = mx.depends(dt[:, part], state)  # computes the decays of a chunk only when its turn comes
        states, _ = _states(u[:, part], own_dt, A, B[:, part], state, *(each[:, part] for each in keep))
        outputs.append((C[:, part, None, :] @ mx.stack(states, axis=1)).squeeze(2))
        state = mx.depends(states[-1], outputs[-1])  # frees the states of this chunk before the next one runs
    return mx.concatenate(outputs, axis=1), state


@_scan.vjp
def _scan_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, ...]:
    """The gradients; only the states between chunks are kept, those within a chunk are computed again."""
    u, dt, A, B, C, state, *keep = primals
    dy, carried = cotangents  # carried: the gradient [B, N, E] of the state after the current token
    parts = _chunks(u.shape[1], CHUNK)
    before = [state]
    for part in parts[:-1]:
        own_dt = mx.depends(dt[:, part], before[-1])
        states, _ = _states(u[:, part], own_dt, A, B[:, part], before[-1], *(each[:, part] for each in keep))
        before.append(states[-1])

    dA = mx.zeros_like(A)
    columns: list[tuple[mx.array, ...]] = []
    for part, first in zip(reversed(parts), reversed(before), strict=True):
        pieces = u[:, part], dt[:, part], B[:, part], C[:, part], dy[:, part]
        more, carried, part_dA = _chunk_vjp(*pieces, A, first, carried, *(each[:, part] for each in keep))
        dA = dA + part_dA
        carried = mx.depends(carried, [*more, dA])  # frees this chunk's arrays before the previous one runs
        columns.append(more)
    du, ddt, dB, dC = (mx.concatenate(column[::-1], axis=1) for column in zip(*columns, strict=True))
    return du, ddt, dA, dB, dC, carried, *map(mx.zeros_like, keep)


def _chunk_vjp(
    u: mx.array,
    dt: mx.array,
    B: mx.array,
    C: mx.array,
    dy: mx.array,
    A: mx.array,
    state: mx.array,
    carried: mx.array,
    *keep: mx.array,
) -> tuple[tuple[mx.array, ...], mx.array, mx.array]:
    """The gradients of (u, dt, B, C) in a chunk, of the state before it, and of A."""
    dt, C = mx.depends([dt, C], [carried])  # computes this chunk's arrays only when its turn comes
    states, decays = _states(u, dt, A, B, state, *keep)
    from_outputs = C[..., None] * dy[:, :, None, :]  # [B, chunk, N, E]
    gradients = []
    for t in reversed(range(u.shape[1])):
        gradient = from_outputs[:, t] + carried
        gradients.append(gradient)
        carried = gradient * decays[:, t]
    g = mx.stack(gradients[::-1], axis=1)  # the gradients of the states
    exponents = g * mx.stack([state, *states[:-1]], axis=1) * decays  # of dt * A
    dinputs = (B[:, :, None, :] @ g).squeeze(2)  # of dt * u
    du, ddt = dinputs * dt, dinputs * u + (exponents * A).sum(axis=2)
    dB = (g @ (dt * u)[..., None]).squeeze(-1)
    dC = (mx.stack(states, axis=1) @ dy[..., None]).squeeze(-1)
    dA = (exponents * dt[:, :, None, :]).sum(axis=(0, 1))
    return (du, ddt, dB, dC), carried, dA


def _chunks(T: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def _states(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, state: mx.array, *keep: mx.array
) -> tuple[list[mx.array], mx.array]:
    """The states after each token of a chunk, [B, N, E] each, and the decays [B, chunk, N, E]."""
    decays = mx.exp(dt[:, :, None, :] * A)
    if keep:
        decays = decays * keep[0][:, :, None, None]
    inputs = (dt * u)[:, :, None, :] * B[..., None]
    states = []
    for t in range(u.shape[1]):
        state = state * decays[:, t] + inputs[:, t]
        states.append(state)
    return states, decays
