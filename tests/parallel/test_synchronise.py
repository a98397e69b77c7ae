"""Gradients that tensor ranks know parts of, made whole: ranks in threads of one process against a layer that is whole.

Everything but the collectives themselves is what a run uses.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

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

RANKS, TOKENS, SITE = 2, 6, Site("attention_dense", 0, 8, 10)
METHODS = {
    "all parts": ("tied_lora", {"preset": "TL6"}),
    "formed from the weight": ("cond_lora", {}),
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
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", threads.all_reduce)
    monkeypatch.setattr(exchange, "_gather_along_first_dim", threads.gather)
    monkeypatch.setattr(exchange, "_reduce_scatter_along_first_dim", threads.reduce_scatter)
    monkeypatch.setattr(synchronise, "device_of", lambda group: "cpu")
    return threads


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize("parallel", ["column", "row"])
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_has_its_part_of_the_whole_gradient(threads, method, parallel, sequence_parallel):
    scheme, settings = METHODS[method]
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def variant():
        return build(config_for(scheme, {"rank": 3, "alpha": 2.0} | settings), 1)

    specs = variant().tensors(SITE)
    whole = {name: random(*spec.shape(SITE, 3)).requires_grad_() for name, spec in specs.items()}
    W, x, dy = random(10, 8), random(TOKENS, 8).requires_grad_(), random(TOKENS, 10)
    y = apply(torch.zeros_like(dy), x, *variant().factors(SITE, whole, FrozenWeight(W)))
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
            name: cut(whole[name].detach(), spec, parallel, 1, RANKS, rank).clone().requires_grad_()
            for name, spec in specs.items()
        }
        weight = ShardedWeight(
            W.chunk(RANKS, 0 if parallel == "column" else 1)[rank], None, parallel, sequence_parallel
        )
        factors = variant().factors(SITE, mine, weight)
        my_y = apply(torch.zeros_like(my_dy), my_x, *factors, exchange=EXCHANGES[parallel, sequence_parallel])
        my_y.backward(my_dy)
        partials = {name for name, spec in specs.items() if partial(spec, parallel, sequence_parallel)}
        Synchroniser({name: tensor.numel() for name, tensor in mine.items()}, partials)(mine)
        return my_x, my_y, mine

    for rank, (my_x, my_y, mine) in enumerate(threads.run(work)):
        expected_dx, expected_y = here(x.grad, y, rank)
        torch.testing.assert_close(my_y, expected_y)
        torch.testing.assert_close(my_x.grad, expected_dx)
        for name, spec in specs.items():
            expected = cut(whole[name].grad, spec, parallel, 1, RANKS, rank)
            # Gradients are summed in float32.
            torch.testing.assert_close(
                mine[name].grad, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
