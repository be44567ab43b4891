"""A method of your own in a few lines: the quadratic form, compared with leetcore's methods.

python examples/own_method.py                                         error and time next to
leetcore's methods leetcore check mine --import examples/own_method.py                   against the
float64 definition, adversarially leetcore bench mine chunk --import examples/own_method.py
timed, with a correctness gate
"""

import time

import leetcore
import numpy as np


def mine(q, k, v, log_decay, scale):  # q, k, v [B, H, N, D], log_decay [B, H]; returns o
    age = np.arange(q.shape[2])[:, None] - np.arange(q.shape[2])
    with np.errstate(invalid="ignore"):  # -inf * 0: selected away
        mask = np.where(age > 0, np.exp(log_decay[..., None, None] * np.abs(age)), age == 0)
    return (scale * (q @ k.swapaxes(2, 3)) * mask @ v).astype(v.dtype)


leetcore.register_method("mine", mine, idea="scores, masked, times values")

if __name__ == "__main__":
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, 1000, 64), np.float32)
    want, _ = leetcore.reference.linear_attention(q, k, v, -0.01)
    for method in leetcore.methods():
        start = time.perf_counter()
        o = leetcore.linear_attention(q, k, v, -0.01, method=method.name)
        ms = 1e3 * (time.perf_counter() - start)
        print(f"{method.name:10} error {leetcore.reference.error(o, want):.1e} {ms:8.2f} ms")
