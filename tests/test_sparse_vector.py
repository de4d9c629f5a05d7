"""The reference of the sparse vector against its equations, written out by hand in NumPy: values, ties, gradients.

The Triton kernels are compared with the reference in test_sparse_kernels.py.
"""

import numpy as np
import pytest
import torch

from sparse_kernels import reference, sparse_vector


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch):
    monkeypatch.setenv("SPARSE_KERNELS", "reference")


def by_hand(h, wz, z_prev, alpha, n, activation, norm_weight=None, eps=1e-6):
    """Eq. 1-3 (hard) or the released code (shifted), row by row, in float64."""
    z = h @ wz.T
    zu = z if z_prev is None else alpha * z_prev + (1 - alpha) * z
    if norm_weight is not None:
        zu = zu / np.sqrt((zu**2).mean(-1, keepdims=True) + eps) * norm_weight
    za = np.zeros_like(zu)
    for index in np.ndindex(zu.shape[:-1]):
        row, z_dim = zu[index], zu.shape[-1]
        if activation == "hard":
            threshold = np.sort(row)[::-1][n - 1]
            za[index] = [v if v >= threshold else 0.0 for v in row]
        else:
            k = z_dim - n
            za[index] = row if k < 1 else [max(v - np.sort(row)[k - 1], 0.0) for v in row]
    return zu, za


@pytest.mark.parametrize("activation", ["hard", "shifted"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
def test_equals_the_equations(activation, norm, n):
    rng = np.random.default_rng(n)
    h, wz, prev = rng.normal(size=(2, 3, 5)), rng.normal(size=(7, 5)), rng.normal(size=(2, 3, 7))
    weight = rng.normal(size=7) if norm else None
    for z_prev in (None, prev):
        want = by_hand(h, wz, z_prev, 0.3, n, activation, weight)
        got = sparse_vector(
            torch.tensor(h),
            torch.tensor(wz),
            None if z_prev is None else torch.tensor(z_prev),
            alpha=0.3,
            n_active=n,
            activation=activation,
            norm_weight=None if weight is None else torch.tensor(weight),
        )
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == torch.float64
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-12, atol=1e-14)


def test_ties_at_the_threshold_are_kept():
    wz = torch.eye(5)
    zu, za = sparse_vector(torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]]), wz, None, alpha=0.9, n_active=2)
    assert za.tolist() == [[3.0, 0.0, 2.0, 2.0, 0.0]] and zu.tolist() == [[3.0, 1.0, 2.0, 2.0, 0.0]]
    _, za = sparse_vector(torch.full((4, 5), -1.0), wz, None, alpha=0.9, n_active=1)
    assert (za == -1.0).all()


def test_leading_dimensions_are_free_and_zu_is_fp32_under_bf16():
    h, wz = torch.randn(2, 3, 4, 6).bfloat16(), torch.randn(8, 6).bfloat16()
    zu, za = sparse_vector(h, wz, None, alpha=0.9, n_active=3)
    assert zu.shape == za.shape == (2, 3, 4, 8) and zu.dtype == za.dtype == torch.float32
    flat, _ = sparse_vector(h[0, 0, 0], wz, None, alpha=0.9, n_active=3)
    assert torch.allclose(flat, zu[0, 0, 0], atol=0.05)


def test_gradient_of_hard_flows_through_kept_units_alone():
    z_prev = torch.randn(4, 9, requires_grad=True)
    zu, za = sparse_vector(torch.randn(4, 5), torch.randn(9, 5), z_prev, alpha=0.5, n_active=4)
    g = torch.randn(4, 9)
    (grad,) = torch.autograd.grad((za * g).sum(), z_prev)
    kept = torch.zeros(4, 9).scatter(1, zu.topk(4).indices, 1.0)
    assert torch.equal(grad, 0.5 * g * kept)


def test_gradient_of_shifted_flows_through_the_threshold_too():
    z_prev = torch.randn(4, 9, requires_grad=True)
    zu, za = sparse_vector(torch.randn(4, 5), torch.randn(9, 5), z_prev, alpha=0.5, n_active=4, activation="shifted")
    g = torch.randn(4, 9)
    (grad,) = torch.autograd.grad((za * g).sum(), z_prev)
    order = zu.argsort(1)
    above = torch.zeros(4, 9).scatter(1, order[:, 5:], 1.0)
    want = (g * above).scatter_add(1, order[:, 4:5], -(g * above).sum(1, keepdim=True))
    assert torch.allclose(grad, 0.5 * want, atol=1e-6)


def test_of_equal_thresholds_the_first_carries_the_gradient():
    zu = torch.tensor([[2.0, 0.0, 0.0, 5.0]], requires_grad=True)
    _, za = sparse_vector(zu, torch.eye(4), None, alpha=0.5, n_active=2, activation="shifted")
    (grad,) = torch.autograd.grad(za.sum(), zu)
    assert za.tolist() == [[2.0, 0.0, 0.0, 5.0]] and grad.tolist() == [[1.0, -2.0, 0.0, 1.0]]


@pytest.mark.parametrize("activation", ["hard", "shifted"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(activation, norm):
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (7, 5), (3, 7), (7,)][: 4 if norm else 3]
    operands = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in sizes]

    def run(h, wz, z_prev, norm_weight=None):
        return reference.sparse_vector(
            h, wz, z_prev, alpha=0.7, n_active=3, activation=activation, norm_weight=norm_weight
        )

    assert torch.autograd.gradcheck(run, operands)


@pytest.mark.parametrize("activation", ["hard", "shifted"])
def test_n_active_may_be_a_tensor_and_is_clamped(activation):
    h, wz, z_prev = torch.randn(6, 5), torch.randn(9, 5), torch.randn(6, 9)
    for n in (-3, 0, 1, 4, 8, 9, 12):
        in_memory = torch.tensor(n, dtype=torch.int32)
        got = sparse_vector(h, wz, z_prev, alpha=0.5, n_active=in_memory, activation=activation)
        want = sparse_vector(h, wz, z_prev, alpha=0.5, n_active=min(max(n, 1), 9), activation=activation)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_bad_arguments_are_named(monkeypatch):
    h, wz = torch.randn(2, 5), torch.randn(8, 5)
    for n in (0, 9):
        with pytest.raises(ValueError, match="n_active must lie in 1..8"):
            sparse_vector(h, wz, None, alpha=0.9, n_active=n)
    with pytest.raises(ValueError, match="activation"):
        sparse_vector(h, wz, None, alpha=0.9, n_active=2, activation="soft")
    for more in ({"z_prev": torch.zeros(2, 7)}, {"norm_weight": torch.zeros(7)}, {"wz": torch.zeros(8, 4)}):
        arguments = {"h": h, "wz": wz, "z_prev": None, **more}
        with pytest.raises(ValueError, match=next(iter(more))):
            sparse_vector(**arguments, alpha=0.9, n_active=2)
    with pytest.raises(ValueError, match="one int32"):
        sparse_vector(h, wz, None, alpha=0.9, n_active=torch.tensor(2))
    monkeypatch.setenv("SPARSE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SPARSE_KERNELS"):
        sparse_vector(h, wz, None, alpha=0.9, n_active=2)
