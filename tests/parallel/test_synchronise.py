"""Gradients that tensor ranks know parts of, made whole: ranks in threads of one process against a layer that is whole.

Everything but the collectives themselves is what a run uses.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import fused
import pytest
import torch
from megatron.core import parallel_state

from nemo_tiedlora.ops import apply
from nemo_tiedlora.parallel import exchange, synchronise
from nemo_tiedlora.parallel.cut import cut
from nemo_tiedlora.parallel.exchange import EXCHANGES
from nemo_tiedlora.parallel.synchronise import Synchroniser, partial
from nemo_tiedlora.parallel.weight import ShardedWeight
from nemo_tiedlora.variants import FrozenWeight, Site, build, config_for

RANKS, TOKENS, IN, OUT = 2, 6, 8, 12
METHODS = {
    "all parts": ("tied_lora", {"preset": "TL6"}),
    "between frozen matrices": ("lora_xs", {}),
    "formed from the weight": ("cond_lora", {}),
    "formed from the turned weight": ("cond_lora", {"orientation": "authors"}),
    "with lengths of rows": ("tied_lora", {"preset": "LoRA", "dora": True}),
    "formed, with lengths of rows": ("cond_lora", {"dora": True}),
}


class Threads:
    """Collectives among threads, one for each tensor rank."""

    def __init__(self):
        self.barrier = threading.Barrier(RANKS, timeout=60)
        self.given = [None] * RANKS
        self.here = threading.local()

    def run(self, work):
        """``work(rank)`` of every rank."""

        def of_rank(rank):
            self.here.rank = rank
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()  # the others would wait
                raise

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(of_rank, range(RANKS)))

    def everyones(self, tensor):
        self.given[self.here.rank] = tensor.clone()
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        return given

    def all_reduce(self, tensor, group=None):
        tensor.copy_(sum(self.everyones(tensor)))

    def gather(self, tensor, group=None):
        return torch.cat(self.everyones(tensor))

    def reduce_scatter(self, tensor, group=None):
        return sum(self.everyones(tensor)).chunk(RANKS)[self.here.rank]


@pytest.fixture
def threads(monkeypatch):
    threads = Threads()
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: None)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: RANKS)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: threads.here.rank)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", threads.all_reduce)
    monkeypatch.setattr(exchange, "_gather_along_first_dim", threads.gather)
    monkeypatch.setattr(exchange, "_reduce_scatter_along_first_dim", threads.reduce_scatter)
    monkeypatch.setattr(synchronise, "device_of", lambda group: "cpu")
    return threads


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize("parallel", ["column", "row"])
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_has_its_part_of_the_whole_gradient(threads, method, parallel, sequence_parallel):
    scheme, settings = METHODS[method]
    random = drawn(0)
    site = Site("attention_dense", 0, IN, IN if "orientation" in settings else OUT)  # that one is for square weights

    def variant():
        return build(config_for(scheme, {"rank": 3, "alpha": 2.0} | settings), 1)

    specs = variant().tensors(site)
    whole = {name: random(*spec.shape(site, 3)).requires_grad_(spec.trained) for name, spec in specs.items()}
    W, x, dy = random(site.out_features, IN), random(TOKENS, IN).requires_grad_(), random(TOKENS, site.out_features)
    y = apply(torch.zeros_like(dy), x, *variant().factors(site, whole, FrozenWeight(W)))
    y.backward(dy)

    def tokens(tensor, rank):
        return tensor.chunk(RANKS)[rank] if sequence_parallel else tensor

    def here(x, y, rank):
        """What a rank has of something like the layer's input, and of something like its output."""
        if parallel == "column":
            return tokens(x, rank), y.chunk(RANKS, 1)[rank]
        return x.chunk(RANKS, 1)[rank], tokens(y, rank)

    def work(rank):
        my_x, my_dy = here(x.detach(), dy, rank)
        my_x = my_x.clone().requires_grad_()
        mine = {
            name: cut(whole[name].detach(), spec, parallel, 1, RANKS, rank).clone().requires_grad_(spec.trained)
            for name, spec in specs.items()
        }
        my_W = W.chunk(RANKS, 0 if parallel == "column" else 1)[rank]
        factors = variant().factors(site, mine, ShardedWeight(my_W, None, parallel, sequence_parallel))
        my_y = apply(torch.zeros_like(my_dy), my_x, *factors, exchange=EXCHANGES[parallel, sequence_parallel])
        my_y.backward(my_dy)
        trained = {name: tensor for name, tensor in mine.items() if specs[name].trained}
        partials = {name for name in trained if partial(specs[name], parallel, sequence_parallel)}
        Synchroniser({name: tensor.numel() for name, tensor in trained.items()}, partials)(trained)
        return my_x, my_y, trained

    for rank, (my_x, my_y, mine) in enumerate(threads.run(work)):
        expected_dx, expected_y = here(x.grad, y, rank)
        torch.testing.assert_close(my_y, expected_y)
        torch.testing.assert_close(my_x.grad, expected_dx)
        for name, tensor in mine.items():
            expected = cut(whole[name].grad, specs[name], parallel, 1, RANKS, rank)
            difference = float((tensor.grad - expected).abs().max())
            assert difference < 1e-4, f"{name} on rank {rank}: {difference}"  # gradients are summed in float32


@pytest.mark.parametrize(("parallel", "blocks"), [("column", 1), ("column", 2), ("row", 1)])
def test_all_of_a_weight_is_put_together_from_every_ranks_part(threads, parallel, blocks):
    W = drawn(1)(OUT, IN)

    def work(rank):
        mine = fused.held(W, 0 if parallel == "column" else 1, rank, RANKS, gated=blocks == 2)
        weight = ShardedWeight(mine, None, parallel, blocks=blocks)
        return weight.whole(W.dtype), weight.row_lengths(W.dtype)

    for whole, lengths in threads.run(work):
        assert torch.equal(whole, W)
        torch.testing.assert_close(lengths, W.norm(dim=1))
