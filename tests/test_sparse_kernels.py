"""The Triton kernels of the sparse vector against the reference in float64: values and all gradients.

On a CPU the kernels run in Triton's interpreter (tests/conftest.py); on a GPU the same tests run on it. Errors are
relative to the largest value of a tensor. zu and za come from exact products summed in fp32, in every dtype: 2e-6, and
1e-5 for bf16 and fp16 on a GPU, whose tensor cores cut off what they add. dH and dWz are sums of dz in the operands'
dtype: 1e-5 in fp32; in bf16 and fp16 two roundings of at most a unit in the last place each (the interpreter cuts bf16
off where a GPU rounds it): 2e-2 and 2e-3. dz_prev and the norm weight's gradient are fp32 throughout: 1e-5.

Where two of a row's values differ by less than fp32 resolves, the kernel may rightly keep another set than float64;
such a row is told by its nearly equal values, and gets no gradient in the comparison.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sparse_kernels import launch, reference, sparse_vector

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUES = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 2e-6)
if DEVICE == "cuda":
    VALUES |= dict.fromkeys((torch.bfloat16, torch.float16), 1e-5)
GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Shrinking a failure takes minutes in the interpreter; the seed is fixed, so a failure stays the same.
QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    monkeypatch.setenv("SPARSE_KERNELS", "triton")


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty gives NaN, so that what a kernel leaves unwritten, or reads before it is written, shows."""
    real = torch.empty

    def empty(*size, **options):
        made = real(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = real


def operands(m, d, z, dtype, *, kind="normal", norm=False, prev=True, seed=0):
    """[h, wz, z_prev or None, norm weight or None] of one kind, leaves that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        if kind == "ties":
            return torch.randint(-2, 3, size, generator=generator).float()
        if kind == "zeros":
            return torch.zeros(size)
        x = torch.randn(size, generator=generator)
        if kind == "extreme":
            x = x * 10.0 ** torch.randint(-14, 15, size, generator=generator)
        return x * 1e3 if kind == "large" else x

    made = [draw(m, d).to(dtype), draw(z, d).to(dtype), draw(m, z) if prev else None]
    made.append(torch.randn(z, generator=generator) if norm else None)
    return [None if x is None else x.to(DEVICE).requires_grad_() for x in made]


def relative(got, want):
    if not want.numel():
        return 0.0
    scale = want.abs().max().item()
    difference = (got.double() - want).abs().max().item()
    assert difference == difference, "NaN: not written, or read before it was written"
    return difference / scale if scale else difference


def compare(made, *, alpha=0.9, n, activation="hard", seed=0, exact=False, gradients=(True, True)):
    """The kernels against float64; `gradients` says which of zu and za pass one back."""
    options = {"alpha": alpha, "n_active": n, "activation": activation}
    h, wz, z_prev, weight = made
    with poisoned_memory():
        zu, za = sparse_vector(h, wz, z_prev, norm_weight=weight, **options)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in made]
    zu64, za64 = reference.sparse_vector(wide[0], wide[1], wide[2], norm_weight=wide[3], **options)
    assert zu.dtype == za.dtype == torch.float32 and zu.shape == zu64.shape
    assert relative(zu.detach(), zu64.detach()) <= VALUES[h.dtype]

    # The rule for za, on the kernel's own zu and to the bit.
    z = wz.shape[0]
    if activation == "hard":
        threshold = zu.detach().kthvalue(z - n + 1, dim=-1, keepdim=True).values
        assert torch.equal(za, torch.where(zu >= threshold, zu, 0.0))
    elif n == z:
        assert torch.equal(za, zu)
    else:
        assert torch.equal(za, (zu - zu.detach().kthvalue(z - n, dim=-1, keepdim=True).values).relu())
    same = ((za != 0) == (za64 != 0)).all(-1, keepdim=True)
    if exact:
        assert same.all()
    assert relative((za * same).detach(), (za64 * same).detach()) <= VALUES[h.dtype]
    ordered = zu64.detach().sort(-1).values
    gaps = (ordered[~same[..., 0]].diff(dim=-1) / ordered.abs().max().clamp_min(1e-30)).abs()
    assert not gaps.numel() or (gaps.amin(-1) < VALUES[h.dtype]).all(), "another set was kept without a near tie"

    generator = torch.Generator().manual_seed(seed + 1)
    ways = [torch.randn(zu.shape, generator=generator).to(DEVICE) * same for _ in range(2)]
    loss = sum((out * g).sum() for out, g, back in zip((zu, za), ways, gradients, strict=True) if back)
    loss64 = sum((out * g).sum() for out, g, back in zip((zu64, za64), ways, gradients, strict=True) if back)
    with poisoned_memory():
        got = torch.autograd.grad(loss, [x for x in made if x is not None])
    want = torch.autograd.grad(loss64, [x for x in wide if x is not None])
    names = [name for name, x in zip(("h", "wz", "z_prev", "norm_weight"), made, strict=True) if x is not None]
    for name, mine, theirs, x in zip(names, got, want, [x for x in made if x is not None], strict=True):
        assert mine.dtype == x.dtype and mine.shape == x.shape
        assert relative(mine, theirs) <= GRADIENTS[x.dtype], name


@settings(QUICK, max_examples=60)
@given(
    m=st.integers(1, 140),
    d=st.integers(1, 290),
    z=st.integers(1, 140),
    place=st.sampled_from(["first", "last", "middle"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(reference.ACTIVATIONS),
    norm=st.booleans(),
    prev=st.booleans(),
    alpha=st.sampled_from([0.0, 0.2, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_equals_the_float64_reference(m, d, z, place, dtype, activation, norm, prev, alpha, seed):
    n = {"first": 1, "last": z, "middle": 1 + seed % z}[place]
    # The norm of few values leaves nearly no gradient but rounding.
    made = operands(m, d, z, dtype, norm=norm and z >= 4, prev=prev, seed=seed)
    compare(made, alpha=alpha, n=n, activation=activation, seed=seed)


@settings(QUICK, max_examples=16)
@given(
    m=st.integers(1, 70),
    d=st.integers(1, 70),
    z=st.integers(1, 40),
    kind=st.sampled_from(["ties", "zeros", "extreme", "large"]),
    activation=st.sampled_from(reference.ACTIVATIONS),
    prev=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_ties_zeros_and_extreme_values(m, d, z, kind, activation, prev, seed):
    made = operands(m, d, z, torch.float32, kind=kind, prev=prev, seed=seed)
    # With alpha = 1/2 whole numbers stay exact, and so must every tie.
    compare(made, alpha=0.5, n=1 + seed % z, activation=activation, seed=seed, exact=kind in ("ties", "zeros"))


@pytest.mark.parametrize("sms, several", [(1, False), (60, True)])
@pytest.mark.parametrize("m, d, z", [(70, 333, 20), (150, 260, 128), (150, 520, 200)])
def test_sums_in_one_part_and_in_several(monkeypatch, sms, several, m, d, z):
    monkeypatch.setattr(launch, "sm_count", lambda device: sms)
    parts = launch.forward_plan(m, d, z, 4, sms).splits, launch.backward_plan(m, d, z, 4, sms).splits
    assert [p > 1 for p in parts] == [several, several], parts
    compare(operands(m, d, z, torch.float32, norm=True), n=z // 3, activation="shifted")


@pytest.mark.parametrize("gradients", [(True, False), (False, True)])
@pytest.mark.parametrize("norm", [False, True])
def test_either_output_alone_passes_its_gradient(gradients, norm):
    compare(operands(17, 40, 12, torch.float32, norm=norm), n=5, gradients=gradients)


@pytest.mark.parametrize("wanted", ["h", "wz", "z_prev", "norm_weight"])
def test_each_gradient_alone(wanted):
    names = ("h", "wz", "z_prev", "norm_weight")
    made = dict(zip(names, operands(17, 40, 12, torch.float32, norm=True), strict=True))
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = {name: x.detach().to(dtype).requires_grad_(name == wanted) for name, x in made.items()}
        run = sparse_vector if dtype == torch.float32 else reference.sparse_vector
        _, za = run(**leaves, alpha=0.9, n_active=5)
        grads.append(torch.autograd.grad((za**2).sum(), leaves[wanted])[0])
    assert relative(*grads) <= 1e-5


def test_leading_dimensions_views_and_no_rows():
    h, wz = torch.randn(2, 7, 3, 40, device=DEVICE).transpose(1, 2), torch.randn(40, 12, device=DEVICE).T
    z_prev = torch.randn(12, 2, 3, 7, device=DEVICE).permute(1, 2, 3, 0).bfloat16()
    got = sparse_vector(h, wz, z_prev, alpha=0.9, n_active=4)
    want = reference.sparse_vector(h.double(), wz.double(), z_prev, alpha=0.9, n_active=4)
    assert got[0].shape == (2, 3, 7, 12) and max(map(relative, got, want)) <= VALUES[h.dtype]
    leaves = [torch.zeros(0, 40, device=DEVICE, requires_grad=True), wz.clone().requires_grad_()]
    zu, za = sparse_vector(*leaves, None, alpha=0.9, n_active=4)
    assert zu.shape == za.shape == (0, 12)
    d_h, d_wz = torch.autograd.grad(za.sum() + zu.sum(), leaves)
    assert d_h.shape == (0, 40) and d_wz.shape == (12, 40) and not d_wz.any()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_n_active_may_be_a_tensor_and_is_clamped(activation):
    h, wz = torch.randn(6, 20, device=DEVICE), torch.randn(9, 20, device=DEVICE)
    for n in (-3, 1, 4, 9, 12):
        in_memory = torch.tensor([n], dtype=torch.int32, device=DEVICE)
        got = sparse_vector(h, wz, None, alpha=0.5, n_active=in_memory, activation=activation)
        want = sparse_vector(h, wz, None, alpha=0.5, n_active=min(max(n, 1), 9), activation=activation)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("z", [1, 64, 100, 128, 256])
def test_plans_fill_the_device_and_stay_within_their_bounds(element_size, z):
    for sms in (108, 128, 132):
        for m in (1, 16, 17, 64, 512, 4404, 16384, 65536):
            for d in (64, 4096, 5120):
                plan = launch.forward_plan(m, d, z, element_size, sms)
                assert plan.block_z >= z and 1 <= plan.splits <= launch.MAX_SPLITS
                assert plan.block_m * plan.block_z <= 16384 and plan.splits * plan.block_d <= max(d, plan.block_d)
                back = launch.backward_plan(m, d, z, element_size, sms)
                assert 1 <= back.splits <= launch.MAX_SPLITS
                if d >= 4096 and m >= 512:
                    assert plan.blocks(m) * plan.splits >= sms / 2, "the device is not filled"
