"""Counter-based noise: equal wherever and however it is drawn, and random by the usual tests."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.utils.checkpoint import checkpoint

from leanmill.core.errors import ConfigError
from leanmill.core.noise import FreshNoise, Noise, derive_seed, element_indices, gumbel, normal, uniform
from leanmill.core.rules import StepContext
from tests.distributed import run_ranks


NUM = 1 << 16


def key_of(*parts):
    return torch.tensor([derive_seed(*parts)])


def draw(*parts, num=NUM, draws=uniform):
    return draws(key_of(*parts), torch.arange(num))


def test_parts_of_a_seed_do_not_run_together():
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert 0 <= derive_seed("weights", 0) < 2**63


def test_the_hash_is_written_down():
    # By Python's own integers: the numbers must not change with torch, device or version.
    def mixed(x, shifts, factors):
        for shift, factor in zip(shifts, (*factors, 1), strict=True):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x

    seed = derive_seed(5, "site", 7)
    indices = [0, 1, 2, 1000, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 5 * 2**32 + 3]
    expected = []
    for index in indices:
        x = mixed((index ^ seed) % 2**32, (16, 15, 15), (0x21F0AAAD, 0xD35A2D97)) ^ (seed >> 32)
        x = mixed(x ^ (index >> 32) * 0x1E35A7BD % 2**32, (16, 15, 16), (0x7FEB352D, 0x846CA68B))
        expected.append((x >> 8) / 2**24)
    assert uniform(torch.tensor([seed]), torch.tensor(indices)).tolist() == expected


def test_a_source_draws_by_seed_name_and_step():
    sources = {name: Noise(name) for name in ("a", "b")}
    like = torch.empty(3, 5, dtype=torch.bfloat16)

    def at(seed, name, step):
        sources[name].renew(seed, step)
        return sources[name].uniform(like)

    first = at(0, "a", 0)
    assert first.shape == like.shape
    assert first.dtype == torch.float32
    assert torch.equal(first, at(0, "a", 0))
    for other in [(1, "a", 0), (0, "b", 0), (0, "a", 1)]:
        assert not torch.equal(first, at(*other))


def test_rows_and_indices_draw_their_part():
    key, whole = key_of(0, "a", 0), torch.empty(6, 7)
    numbers = uniform(key, element_indices(whole))
    assert torch.equal(uniform(key, torch.arange(14, 28).reshape(2, 7)), numbers[2:4])
    assert torch.equal(uniform(key, torch.tensor([40, 3])), numbers.flatten()[[40, 3]])


def test_a_part_of_the_experts_draws_what_the_whole_draws_there():
    source = Noise("experts")
    source.renew(3, 5)
    whole = torch.empty(6, 4, 8)
    wanted = [draws(whole) for draws in (source.uniform, source.normal, source.gumbel)]
    source.first_row = 2
    found = [draws(whole[2:4]) for draws in (source.uniform, source.normal, source.gumbel)]
    assert all(torch.equal(part, of_all[2:4]) for part, of_all in zip(found, wanted, strict=True))


def test_the_rule_gives_every_source_a_key_and_without_it_all_is_nan():
    model = torch.nn.ModuleDict({"one": Noise("one"), "two": Noise("two")})
    like = torch.empty(4)
    assert all(model["one"].normal(like).isnan())
    assert all(model["one"].uniform(like).isnan())
    rule = FreshNoise(model, 3, "mine")
    rule.begin_step(StepContext(step=8, num_steps=9, num_micro_batches=1))
    assert model["one"].key.item() == derive_seed(3, "one", 8)
    assert not torch.equal(model["one"].uniform(like), model["two"].uniform(like))
    assert not model.state_dict()


def test_no_seed_is_refused():
    with pytest.raises(ConfigError, match=r"mine draws random numbers and was given no seed; set `seed: 0`"):
        FreshNoise(torch.nn.Module(), None, "mine")


class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = Noise("site")

    def forward(self, x):
        return torch.exp(x * self.noise.uniform(x)).sum()


def test_recomputation_draws_the_same():
    module, gradients = Noisy(), []
    module.noise.renew(0, 0)
    for function in (module, lambda x: checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)):
        x = torch.linspace(0, 1, 12).reshape(3, 4).requires_grad_()
        torch.rand(3)
        function(x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_draws_the_same_and_is_compiled_once(backend):
    module = Noisy().noise
    compiled = torch.compile(module.uniform, fullgraph=True, backend=backend)
    like = torch.empty(37, 41)
    with torch.compiler.set_stance("default"):
        for step in range(3):
            module.renew(0, step)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                assert torch.equal(compiled(like), module.uniform(like))


def _sharded():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for shape, dim in [((5, 6), 0), ((5, 6), 1), ((2, 3, 4), 0), ((1, 4), 0)]:
        like = distribute_tensor(torch.zeros(shape), mesh, [Shard(dim)])
        for draws in (uniform, normal, gumbel):
            numbers = draws(key_of(1), element_indices(like))
            assert isinstance(numbers, DTensor)
            assert numbers.placements == like.placements
            found[shape, dim, draws.__name__] = numbers.full_tensor()
    return found


def test_shards_draw_their_part_on_any_number_of_ranks():
    for (shape, _, name), numbers in run_ranks(_sharded, 2)[0].items():
        draws = {"uniform": uniform, "normal": normal, "gumbel": gumbel}[name]
        assert torch.equal(numbers, draws(key_of(1), element_indices(torch.empty(shape)))), (shape, name)


def test_bounds():
    # What the largest and the smallest hash become.
    key = key_of(1)
    numbers = torch.cat([draws(key, torch.arange(1 << 20)) for draws in (uniform, normal, gumbel)])
    assert torch.isfinite(numbers).all()
    u = uniform(key, torch.arange(1 << 20))
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())


def chi_square(counts):
    """Deviation of counts from equal ones, in standard deviations of the statistic."""
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected).square() / expected).sum()
    return ((statistic - (counts.numel() - 1)) / math.sqrt(2 * (counts.numel() - 1))).item()


PARTS = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0), (12345, "model.layers.7.mlp.up_proj", 4096)]


@pytest.mark.parametrize("parts", PARTS)
def test_uniform_numbers_fill_lines_planes_and_low_bits(parts):
    u = draw(*parts).double()
    assert abs(chi_square((u * 256).long().bincount(minlength=256))) < 4
    assert abs(chi_square((u * 2**24).long().remainder(256).bincount(minlength=256))) < 4
    pairs = (u * 32).long()
    for lag in (1, 2, 3, 32, 4096):
        joint = pairs[:-lag] * 32 + pairs[lag:]
        assert abs(chi_square(joint.bincount(minlength=1024))) < 4, lag
        assert abs(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1]) < 4 / math.sqrt(NUM), lag


@pytest.mark.parametrize(
    "family",
    [
        lambda n: (0, "a", n),  # steps
        lambda n: (n, "a", 0),  # seeds
        lambda n: (0, f"model.layers.{n}.mlp.up_proj", 0),  # names
    ],
)
def test_neighbouring_keys_are_independent(family):
    num_keys, num = 64, 4096
    table = torch.stack([draw(*family(n), num=num) for n in range(num_keys)]).double()
    correlations = torch.corrcoef(table)[~torch.eye(num_keys, dtype=torch.bool)]
    assert correlations.abs().max() < 5 / math.sqrt(num)
    # Down the keys, at one element, numbers fill the line too.
    assert abs(chi_square((table.flatten() * 512).long().bincount(minlength=512))) < 4
    column = (table * 8).long()
    joint = column[:-1] * 8 + column[1:]
    assert abs(chi_square(joint.flatten().bincount(minlength=64))) < 4
    # Nor does one key draw what another draws in another order.
    assert table.flatten().unique().numel() > 0.98 * table.numel()


def test_moments_and_distribution_of_what_is_derived():
    z, g = draw(0, "a", 0, draws=normal).double(), draw(0, "a", 0, draws=gumbel).double()
    assert abs(z.mean()) < 4 / math.sqrt(NUM)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / NUM)
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96 / NUM)
    assert abs(g.mean() - 0.5772156649) < 4 * math.sqrt(math.pi**2 / 6 / NUM)
    for numbers, distribution in ((z, torch.special.ndtr), (g, lambda x: torch.exp(-torch.exp(-x)))):
        gap = distribution(numbers.sort().values) - (torch.arange(NUM) + 0.5) / NUM
        assert gap.abs().max() < 2 / math.sqrt(NUM)


def test_the_largest_of_logits_plus_gumbel_is_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    chosen = (logits + draw(0, "a", 0, draws=gumbel).reshape(-1, 4)).argmax(-1)
    shares = chosen.bincount(minlength=4) / chosen.numel()
    assert (shares - logits.softmax(0)).abs().max() < 4 * 0.5 / math.sqrt(chosen.numel())
