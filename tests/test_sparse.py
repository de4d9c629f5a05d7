"""The sparse network alone: draws, patterns, shares at both ends, initial values, dtypes."""

import statistics

import pytest
import torch

from pipeline.model.initialise import initialise, keyed_init
from pipeline.model.sparse import PATTERNS, SparseNetwork, active_units, keep_chances


def network(**options):
    return SparseNetwork(12, options.pop("z_dim", 16), {"q": 12, "v": 6}, **options)


def filled(**options):
    net = network(**options)
    torch.nn.init.normal_(net.wb, generator=torch.Generator().manual_seed(1))
    return net


def test_active_units_follow_both_definitions():
    assert active_units(0.4, 128, "hard") == 51 and active_units(0.4, 128, "shifted") == 52
    assert active_units(1.3, 128, "hard") == active_units(1.3, 128, "shifted") == 128
    assert active_units(1.0, 128, "hard") == active_units(1.0, 128, "shifted") == 128
    assert active_units(0.0, 128, "hard") == active_units(0.0, 128, "shifted") == 1


@pytest.mark.parametrize("activation", ["hard", "shifted"])
@pytest.mark.parametrize("beta", [1.0, 1.0 / 16])
def test_no_draw_at_either_end_of_beta_crashes(activation, beta):
    net, h = filled(activation=activation, beta=beta, norm=activation == "shifted"), torch.randn(2, 3, 12)
    seen = set()
    for step in range(200):
        net.set_step(step)
        seen.add(net.n_active)
        zu, parts = net(h, torch.randn(2, 3, 16))
        assert all(part.isfinite().all() for part in parts.values()) and zu.isfinite().all()
    assert seen <= {1, 2} if beta < 0.5 else max(seen) == 16 and min(seen) < 16


def test_draws_depend_on_seed_step_and_layer_alone():
    def shares(**options):
        net = network(**options)
        out = []
        for step in range(50):
            net.set_step(step)
            out.append(net.share)
        return out

    assert shares(seed=3, layer_index=2) == shares(seed=3, layer_index=2)
    assert shares(seed=3, layer_index=2) != shares(seed=3, layer_index=1) != shares(seed=4, layer_index=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    many = [share for layer in range(40) for share in shares(layer_index=layer)]
    assert torch.equal(before, torch.get_rng_state()), "the draws must not touch the global generator"
    assert abs(statistics.mean(many) - 0.4) < 0.005 and abs(statistics.stdev(many) - 0.04) < 0.004


def test_inference_takes_beta_or_under_released_no_sparsity():
    net, h = filled(z_dim=128).eval(), torch.randn(2, 3, 12)
    net.set_step(5)
    assert net.n_active == 51
    released = filled(z_dim=128, activation="shifted", inference_sparsity=False)
    assert released.n_active < 128
    released.eval()
    zu, parts = released(h, None)
    assert released.n_active == 128
    assert torch.allclose(torch.cat([parts["q"], parts["v"]], -1), zu @ released.wb.T, atol=1e-5)


def test_top2beta_keeps_half_of_the_largest():
    net = filled(z_dim=20, beta=0.25, pattern="top2beta")
    with torch.no_grad():
        net.wb.copy_(torch.eye(20)[:18])
        net.wz.copy_(torch.eye(20)[:, :12])
    kept = set()
    for step in range(60):
        net.set_step(step)
        assert sum(net.kept_ranks) == 5 and not any(net.kept_ranks[10:])
        kept.add(tuple(net.kept_ranks))
    assert len(kept) > 20
    h = torch.arange(12.0, 0.0, -1.0).expand(1, 1, 12)
    _, parts = net(h, None)
    want = [float(v) if keep else 0.0 for v, keep in zip(range(12, 0, -1), net.kept_ranks[:12], strict=True)]
    assert parts["q"].flatten().tolist() == want


def test_level_grows_with_depth_and_distribution_has_mean_beta():
    shares = [network(pattern="level", depth=(i, 5)).mean_share for i in range(5)]
    assert shares == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert network(pattern="level", depth=(0, 1)).mean_share == 0.4
    for beta in (0.1, 0.4, 0.8, 1.0):
        chances = keep_chances(beta, 128)
        assert statistics.mean(chances) == pytest.approx(beta) and all(0 <= c <= 1 for c in chances)
        assert chances == sorted(chances, reverse=True)
    net = network(z_dim=64, pattern="distribution")
    counts = []
    for step in range(200):
        net.set_step(step)
        assert net.kept_ranks[0]
        counts.append(sum(net.kept_ranks))
    assert abs(statistics.mean(counts) / 64 - 0.4) < 0.02


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_runs_and_has_no_draw_at_inference(pattern):
    net, h = filled(pattern=pattern, depth=(1, 3)), torch.randn(2, 3, 12)
    _, parts = net(h, None)
    assert {name: part.shape[-1] for name, part in parts.items()} == {"q": 12, "v": 6}
    net.eval()
    _, first = net(h, None)
    net.set_step(9)
    _, second = net(h, None)
    assert torch.equal(first["q"], second["q"])


def test_initial_values_hang_on_name_and_seed_alone():
    def made(seed, name="a"):
        model = torch.nn.ModuleDict({name: network(norm=True)})
        torch.manual_seed(int(seed * 7 + 1))
        initialise(model, seed)
        return model[name]

    assert torch.equal(made(1).wz, made(1).wz)
    assert not torch.equal(made(1).wz, made(2).wz) and not torch.equal(made(1).wz, made(1, "b").wz)
    assert not made(1).wb.any() and (made(1).norm_weight == 1).all()
    assert keyed_init("x", 0).initial_seed() == keyed_init("x", 0).initial_seed() != keyed_init("y", 0).initial_seed()
    gathered = []

    class Gather:
        def __init__(self, parameters):
            gathered.append(len(parameters))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    initialise(torch.nn.ModuleDict({"a": network(norm=True)}), 0, Gather)
    assert gathered == [3]


def test_bf16_parameters_leave_zu_in_fp32():
    net = filled(norm=True, activation="shifted").bfloat16()
    zu, parts = net(torch.randn(2, 3, 12), None)
    assert zu.dtype == torch.float32 and parts["q"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": 1.2}, "beta"),
        ({"alpha": 1.0}, "alpha"),
        ({"activation": "soft"}, "activation"),
        ({"pattern": "random"}, "activation_pattern"),
        ({"pattern": "top2beta", "activation": "shifted"}, "--activation hard"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
