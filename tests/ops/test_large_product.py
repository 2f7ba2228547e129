"""heron.ops.large_product: how an algorithm is chosen and kept, and on a GPU PyTorch's bits."""

from __future__ import annotations

import json

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from heron.errors import KernelError
from heron.model import products
from heron.ops import large_product as op
from heron.ops.large_product import add_large_product_, chosen, is_large, large_product
from heron.ops.large_product.chosen import Form, Table, fastest
from heron.ops.large_product.cublaslt import Matrix, described

BF16 = torch.bfloat16
CPU = torch.device("cpu")
FORM = Form(Matrix(4, 8, 8, False, BF16), Matrix(8, 16, 8, True, BF16), Matrix(4, 16, 16, False, BF16), False)


def by_pytorch(a, b, out):
    torch.mm(a, b, out=out)


class Fake:
    """Algorithms: each gives PyTorch's product plus its error, or raises it."""

    def __init__(self, *errors):
        self.errors = errors

    def __len__(self):
        return len(self.errors)

    def run(self, number, a, b, out):
        if isinstance(self.errors[number], Exception):
            raise self.errors[number]
        out.copy_(a @ b + self.errors[number])


def aligned(rows, columns):
    memory = torch.zeros(2 * rows * columns + 256, dtype=BF16)
    first = -memory.data_ptr() % 256 // 2
    return memory[first : first + rows * columns].view(rows, columns)


def test_it_says_how_a_matrix_lies_in_memory():
    x = aligned(16, 24)
    assert described(x) == Matrix(16, 24, 24, False, BF16)
    assert described(x.T) == Matrix(24, 16, 24, True, BF16)
    assert described(x[:, :8]) == Matrix(16, 8, 24, False, BF16)
    assert described(x[:, 1:]) is None  # begins between
    assert described(x[:, ::2]) is None  # no stride of 1
    assert described(aligned(8, 20)) is None  # rows that begin between
    assert described(x[:1].expand(16, 24)) is None  # rows that coincide
    assert described(x.view(torch.int16)) is None


def test_the_fastest_with_pytorchs_bits_is_chosen(monkeypatch):
    algorithms = Fake(0, 1, 0, KernelError("not this one"), 0)
    times = {None: 1.0, 0: 0.9, 1: 0.1, 2: 0.5, 4: 0.6}
    monkeypatch.setattr(chosen, "seconds", lambda run: times[run.args[0] if hasattr(run, "args") else None])
    assert fastest(FORM, algorithms, by_pytorch, CPU) == 2
    times |= {2: 0.985, 0: 0.99, 4: 1.5}  # hardly faster than PyTorch
    assert fastest(FORM, algorithms, by_pytorch, CPU) is None


@pytest.mark.parametrize("adds", [False, True])
def test_a_sum_is_compared_with_what_it_is_added_to(monkeypatch, adds):
    def multiply(a, b, out):
        return out.add_(a @ b) if adds else by_pytorch(a, b, out)

    class Adds(Fake):
        def run(self, number, a, b, out):
            out.add_(a @ b)

    monkeypatch.setattr(chosen, "seconds", lambda run: 0.5 if hasattr(run, "args") else 1.0)
    assert fastest(FORM._replace(adds=adds), Adds(0), multiply, CPU) == (0 if adds else None)


@pytest.fixture
def measured(monkeypatch):
    """How often an algorithm was chosen by measuring; it is number 1 of two, or an error is raised."""
    times = []

    def measure(form, algorithms, by_pytorch, device):
        times.append(form)
        if measure.error is not None:
            raise measure.error
        return measure.number

    measure.error, measure.number = None, 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(chosen, "Algorithms", lambda *form: Fake(0, 100))
    monkeypatch.setattr(chosen, "fastest", measure)
    return times, measure


def product_by(table, form=FORM):
    a, b, out = torch.ones(4, 8), torch.ones(8, 16), torch.zeros(4, 16)
    table.multiply(form, by_pytorch)(a, b, out)
    return out[0, 0].item()


def test_what_was_chosen_is_kept_for_the_next_process(measured, tmp_path):
    times, measure = measured
    file = tmp_path / "products" / "gpu.json"
    table = Table(CPU, file)
    assert [product_by(table) for _ in range(3)] == [108, 108, 108]
    measure.number = None
    other = FORM._replace(adds=True)
    assert product_by(table, other) == 8
    assert times == [FORM, other]
    assert product_by(Table(CPU, file)) == 108
    assert product_by(Table(CPU, file), other) == 8
    assert len(times) == 2
    assert sorted(json.loads(file.read_text()).values(), key=str) == [1, None]


@pytest.mark.parametrize("damage", ["{", '{"KEY": 7}'])
def test_a_file_that_does_not_fit_is_measured_again(measured, tmp_path, damage):
    file = tmp_path / "gpu.json"
    file.write_text(damage.replace("KEY", FORM.name))
    assert product_by(Table(CPU, file)) == 108
    assert json.loads(file.read_text()) == {FORM.name: 1}


def test_a_product_that_cublaslt_refuses_is_asked_for_once(measured, tmp_path, monkeypatch):
    asked = []

    def refused(*form):
        asked.append(form)
        raise KernelError("not supported")

    monkeypatch.setattr(chosen, "Algorithms", refused)
    table = Table(CPU, tmp_path / "gpu.json")
    assert [product_by(table) for _ in range(2)] == [8, 8]
    assert asked == [FORM]


def test_without_room_to_measure_pytorch_multiplies(measured, tmp_path, monkeypatch):
    times, measure = measured
    measure.error = torch.OutOfMemoryError("no room")
    table = Table(CPU, tmp_path / "gpu.json")
    assert product_by(table) == 8
    measure.error = None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert product_by(table) == 8
    assert len(times) == 1


def test_small_products_and_other_devices_are_left_to_pytorch():
    assert not is_large(torch.empty(32768, 768, dtype=BF16), torch.empty(768, 768, dtype=BF16))
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert torch.equal(large_product(a, b), a @ b)


def test_large_products_of_a_traced_graph_are_replaced(monkeypatch):
    monkeypatch.setattr(products, "is_large", lambda a, b: a.shape[0] == 64)

    def both(x, w, v):
        return torch.tanh(x @ w.T) @ v

    parts = torch.randn(64, 8), torch.randn(16, 8), torch.randn(16, 4)
    traced = make_fx(both, tracing_mode="fake")(*parts)
    products.replace_products(traced.graph)
    traced.recompile()
    assert traced.code.count("heron.large_product") == 2
    assert torch.equal(traced(*parts), both(*parts))
    small = make_fx(both, tracing_mode="fake")(torch.randn(5, 8), *parts[1:])
    products.replace_products(small.graph)
    small.recompile()
    assert "heron.large_product" not in small.code


def test_a_gradient_from_two_products_of_a_traced_graph_becomes_one_operator(monkeypatch):
    monkeypatch.setattr(products, "is_large", lambda a, b: a.shape[1] == 16)

    def gradient(d, w, e, v):
        return torch.tanh((e @ v).view(2, 32, 8) + (d @ w).view(2, 32, 8))

    parts = [torch.randn(size) for size in ((64, 16), (16, 8), (64, 3), (3, 8))]
    traced = make_fx(gradient, tracing_mode="fake")(*parts)
    products.replace_products(traced.graph)
    traced.recompile()
    assert "heron.sum_of_products" in traced.code
    assert "aten.mm" not in traced.code
    assert "aten.add" not in traced.code
    torch.testing.assert_close(traced(*parts), gradient(*parts))

    def read_twice(d, w, e, v):
        first = d @ w
        return first + e @ v, first

    traced = make_fx(read_twice, tracing_mode="fake")(*parts)
    products.replace_products(traced.graph)
    traced.recompile()
    assert "heron.sum_of_products" not in traced.code


# On a GPU


@pytest.fixture
def gpu(gpu, monkeypatch, tmp_path):
    """The file of the table of the GPU, which begins empty; every product counts as large."""
    table = Table(torch.device(gpu, 0), tmp_path / "gpu.json")
    monkeypatch.setattr(chosen, "table", lambda index: table)
    monkeypatch.setattr(op, "FEWEST", 0)
    return tmp_path / "gpu.json"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_every_form_gives_pytorchs_bits(gpu, dtype):
    random = torch.Generator("cuda").manual_seed(1)
    n, k, m = 4096, 768, 3072
    for a_turned in (False, True):
        for b_turned in (False, True):
            a = torch.randn((k, n) if a_turned else (n, k), device="cuda", generator=random).to(dtype)
            b = torch.randn((m, k) if b_turned else (k, m), device="cuda", generator=random).to(dtype)
            a, b = (a.T if a_turned else a), (b.T if b_turned else b)
            want = a @ b
            for _ in range(2):
                assert torch.equal(large_product(a, b), want)
            total = torch.randn(n, m, device="cuda", generator=random)
            sums = torch.addmm(total, a, b, out_dtype=torch.float32)
            add_large_product_(total, a, b)
            assert torch.equal(total, sums)
    assert len(json.loads(gpu.read_text())) == 8


@pytest.mark.gpu
def test_a_recorded_product_gives_pytorchs_bits(gpu):
    a, b = (torch.randn(2048, 2048, device="cuda").bfloat16() for _ in range(2))
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = large_product(a, b)
        graph.replay()
        assert torch.equal(y, a @ b)
        large_product(a, b)  # the second recording has what this chose
    assert gpu.exists()
