"""ONNX's recurrent networks, as one scan over time for each direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.onnx.ops.quantized import dequantize_linear, dynamic_quantize_linear
from sparseflax.onnx.value import Unsupported, Value, along, value

ACTIVATIONS = {"Relu": jax.nn.relu, "Tanh": jnp.tanh, "Sigmoid": jax.nn.sigmoid, "Softsign": jax.nn.soft_sign,
               "Softplus": jax.nn.softplus}
Cell = Callable[..., tuple[Any, ...]]


def recurrent(gates: int, default: Sequence[str], cell: Cell, states: int) -> Callable[..., tuple[Value, ...]]:
    """An operator of a cell (x of all gates, h, [c,] R, bias of R, peepholes, activations, linear) -> states, h first."""

    def run(X: Value, W: Value, R: Value, B: Value | None = None, sequence_lens: Value | None = None,
            initial_h: Value | None = None, initial_c: Value | None = None, P: Value | None = None, hidden_size: int = 0,
            direction: str = "forward", activations: Any = None, activation_alpha: Any = None, activation_beta: Any = None,
            clip: float = 0.0, layout: int = 0, linear_before_reset: int = 0, input_forget: int = 0,
            output_sequence: int = 0, rounded: bool = False) -> tuple[Value, ...]:
        names = [name.title() for name in activations or [*default] * W.shape[0]]
        if unknown := [name for name in names if name not in ACTIVATIONS]:
            raise Unsupported(f"activations {unknown}, wanted some of {sorted(ACTIVATIONS)}")
        if clip or input_forget or activation_alpha or activation_beta:
            raise Unsupported("clip, input_forget, activation_alpha or activation_beta, wanted none of these")
        if direction not in ("forward", "reverse", "bidirectional") or W.shape[0] != 1 + (direction == "bidirectional"):
            raise Unsupported(f"direction={direction!r} with weights of shape {W.shape}")
        x, size = jnp.asarray(X.plain()), R.shape[-1]
        x = x.swapaxes(0, 1) if layout else x
        steps, batch, _ = x.shape
        lengths = None if sequence_lens is None else sequence_lens.plain()
        initial = [jnp.zeros((W.shape[0], batch, size), x.dtype) if v is None else jnp.asarray(v.plain())
                   for v in (initial_h, initial_c)[:states]]
        initial = [state.swapaxes(0, 1) if layout and v is not None else state
                   for state, v in zip(initial, (initial_h, initial_c), strict=False)]
        sequences, finals = [], []
        for d in range(W.shape[0]):
            backward = direction == "reverse" or d == 1
            weights, repeat = W.plain()[d], R.plain()[d]
            bias = jnp.zeros((2, gates * size), x.dtype) if B is None else jnp.asarray(B.plain()[d]).reshape(2, -1)
            peephole = None if P is None else jnp.asarray(P.plain()[d]).reshape(3, size)
            functions = [ACTIVATIONS[name] for name in names[d * len(default):(d + 1) * len(default)]]
            inputs = (_rounded(x) if rounded else x) @ weights.T + along(bias[0], 3)

            def step(state, given, repeat=repeat, bias=bias, peephole=peephole, functions=functions):
                now, t = given
                h, *rest = [_rounded(state[0]) if rounded else state[0], *state[1:]]
                new = cell(now, h, *rest, repeat, along(bias[1], 2), peephole, functions, linear_before_reset)
                if lengths is None:
                    return new, new[0]
                running = (t < lengths)[:, None]
                kept = tuple(jnp.where(running, n, s) for n, s in zip(new, state, strict=True))
                return kept, jnp.where(running, new[0], 0)

            final, sequence = jax.lax.scan(step, tuple(state[d] for state in initial), (inputs, np.arange(steps)),
                                           reverse=backward)
            sequences.append(sequence)
            finals.append(final)
        y = jnp.stack(sequences, 1)
        last = [jnp.stack([final[i] for final in finals]) for i in range(states)]
        if layout:
            y, last = y.transpose(2, 0, 1, 3), [state.swapaxes(0, 1) for state in last]
        return value(y), *map(value, last)

    return run


def _lstm(x: Any, h: Any, c: Any, repeat: Any, bias: Any, peephole: Any, functions: Any, linear: int) -> tuple[Any, Any]:
    f, g, k = functions
    i, o, forget, new = jnp.split(x + h @ repeat.T + bias, 4, axis=-1)
    pi, po, pf = (0, 0, 0) if peephole is None else peephole[:, None]
    c_new = f(forget + pf * c) * c + f(i + pi * c) * g(new)
    return f(o + po * c_new) * k(c_new), c_new


def _gru(x: Any, h: Any, repeat: Any, bias: Any, peephole: Any, functions: Any, linear: int) -> tuple[Any]:
    f, g = functions
    (xz, xr, xh), (rz, rr, rh), (bz, br, bh) = (jnp.split(v, 3, axis=axis) for v, axis in ((x, -1), (repeat, 0), (bias, -1)))
    z, r = f(xz + h @ rz.T + bz), f(xr + h @ rr.T + br)
    new = g(xh + (r * (h @ rh.T + bh) if linear else (r * h) @ rh.T + bh))
    return ((1 - z) * new + z * h,)


def _rnn(x: Any, h: Any, repeat: Any, bias: Any, peephole: Any, functions: Any, linear: int) -> tuple[Any]:
    return (functions[0](x + h @ repeat.T + bias),)


def dynamic_quantize_lstm(X: Value, W: Value, R: Value, B: Value | None, sequence_lens: Value | None, initial_h: Value | None,
                          initial_c: Value | None, P: Value | None, W_scale: Value, W_zero_point: Value, R_scale: Value,
                          R_zero_point: Value, **attributes: Any) -> tuple[Value, ...]:
    """An LSTM of ONNX Runtime's: weights (directions, ic, 4 hidden) of 8 bits, and what they take rounded to 8 bits."""
    weights = []
    for v, scale, zero in ((W, W_scale, W_zero_point), (R, R_scale, R_zero_point)):
        factor, shift = (u.plain().reshape(v.shape[0], 1, -1).astype(np.float32) for u in (scale, zero))
        weights.append(value(((v.plain().astype(np.float32) - shift) * factor).swapaxes(1, 2)))
    return OPERATORS["LSTM"](X, *weights, B, sequence_lens, initial_h, initial_c, P, rounded=True, **attributes)


def _rounded(x: Any) -> Any:
    """x as 8 bits hold it."""
    integers, scale, zero = dynamic_quantize_linear(value(x))
    return dequantize_linear(integers, scale, zero).array


OPERATORS: dict[str, Callable[..., Any]] = {
    "DynamicQuantizeLSTM": dynamic_quantize_lstm,
    "GRU": recurrent(3, ("Sigmoid", "Tanh"), _gru, 1), "LSTM": recurrent(4, ("Sigmoid", "Tanh", "Tanh"), _lstm, 2),
    "RNN": recurrent(1, ("Tanh",), _rnn, 1),
}
