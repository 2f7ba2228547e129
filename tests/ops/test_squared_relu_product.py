"""heron.ops.squared_relu_product: the definition, how graphs come to it, and on a GPU PyTorch's bits."""

from __future__ import annotations

import ctypes
import json
import threading
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.fx.experimental.proxy_tensor import make_fx

from heron.errors import KernelError
from heron.model import products
from heron.ops import _build, ahead
from heron.ops._choice import Choice, NativeForm, counting_on_builds
from heron.ops.squared_relu_product import (
    chosen,
    cuda,
    squared_relu_product,
    squared_relu_product_choice,
    squared_relu_product_gradient,
    squared_relu_product_gradient_reference,
    squared_relu_product_reference,
)
from heron.ops.squared_relu_product.chosen import Measured
from tests.ops.kernels import check_that_none_spills, kernels_launched, needs_nvcc

BF16 = torch.bfloat16
EMULATOR = Path(__file__).parent / "emulator"
needs_compiler = pytest.mark.skipif(_build.find_compiler() is None, reason="no C++ compiler")
SMALLEST = 2.0**-63  # its square is the smallest normal number


def drawn(n, n_in, hidden, dtype=torch.float64, device="cpu", seed=0):
    """x, weight of the key, weight of the value and the gradient of what it makes."""
    random = torch.Generator(device).manual_seed(seed)
    sizes = (n, n_in), (hidden, n_in), (n_in, hidden), (n, n_in)
    x, key, value, d_out = (torch.randn(size, generator=random, device=device) for size in sizes)
    return [part.to(dtype) for part in (x, key * n_in**-0.5, value * n_in**-0.5, d_out)]


def by_pytorch(x, key, value, d_out):
    """The square, and the gradient of the key, by autograd."""
    of_key = F.linear(x, key).requires_grad_()
    square = torch.relu(of_key).square()
    (d_key,) = torch.autograd.grad(F.linear(square, value), of_key, d_out)
    return square.detach(), d_key


def numbers_in_bf16():
    """All that are not NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    return every[~every.isnan()]


def test_the_root_of_a_square_in_bf16_is_the_number_itself():
    x = numbers_in_bf16()
    x = x[(x >= SMALLEST) & (x < 2.0**64)]
    assert len(x) == 127 * 2**7
    assert torch.equal(x.square().sqrt(), x)
    assert torch.equal(x.double().square().to(BF16).double().sqrt().to(BF16), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16])
def test_the_definition_is_what_autograd_computes(dtype):
    x, key, value, d_out = drawn(37, 24, 56, dtype)
    square, d_key = by_pytorch(x, key, value, d_out)
    got = squared_relu_product_reference(x, key)
    d_got = squared_relu_product_gradient_reference(d_out, value, got)
    assert got.dtype == d_got.dtype == dtype
    assert torch.equal(got, square)
    if dtype == BF16:
        assert torch.equal(d_got, d_key)
    torch.testing.assert_close(d_got, d_key)
    assert torch.equal(squared_relu_product(x, key), square)
    assert torch.equal(squared_relu_product_gradient(d_out, value, square), d_got)


def test_what_is_no_number_stays_so_and_a_gradient_is_zero_where_the_square_is():
    square = torch.tensor([[0.0, torch.nan, 4.0, torch.inf]])
    d_key = squared_relu_product_gradient_reference(torch.full((1, 1), torch.inf), torch.ones(1, 4), square)
    torch.testing.assert_close(d_key, torch.tensor([[0.0, torch.nan, torch.inf, torch.inf]]), equal_nan=True)


def test_a_compiler_is_told_the_shapes():
    x, key, value, d_out = drawn(5, 24, 56, torch.float32)
    square = squared_relu_product_reference(x, key)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.heron.squared_relu_product, (x, key), test_utils=tests)
    torch.library.opcheck(torch.ops.heron.squared_relu_product_gradient, (d_out, value, square), test_utils=tests)


# The kernels' source on a CPU


@pytest.fixture(scope="module")
def emulated():
    """What the kernels' source computes on a CPU."""
    depends = [cuda.SOURCE, *EMULATOR.glob("*.h")]
    sources, flags = [EMULATOR / "squared_relu_product.cpp"], ("-O2", "-U_FORTIFY_SOURCE")
    library = _build.load_c_library("squared_relu_product_emulated", sources, flags, depends)

    def compute(form, x, weight, square, blocks, beside, switches):
        n, n_in = x.shape
        hidden = weight.shape[0 if square is None else 1]
        unwritten = torch.full((n, hidden), 0x7FC0, dtype=torch.int16).view(BF16)
        places = (None if part is None else ctypes.c_void_p(part.data_ptr()) for part in (x, weight, square, unwritten))
        forms = library.squared_relu_product_emulated(form, n, n_in, hidden, blocks, beside, switches, *places)
        assert forms == cuda.FORMS
        return unwritten

    return compute


@needs_compiler
@pytest.mark.parametrize("form", range(cuda.FORMS))
@pytest.mark.parametrize(
    ("size", "blocks", "beside", "switches"),
    [
        ((64, 64, 128), 2, 12, True),  # less than a tile, and a stage
        ((700, 104, 520), 4, 2, True),  # tiles that a cluster has alone; fewer beside one another at the end
        ((900, 456, 264), 2, 1, False),  # more stages than the ring has
    ],
)
def test_kernels_compute_on_a_cpu(emulated, form, size, blocks, beside, switches):
    x, key, value, d_out = drawn(*size, BF16)
    square, d_key = by_pytorch(*(part.float() for part in (x, key, value, d_out)))
    got = emulated(form, x, key, None, blocks, beside, switches)
    torch.testing.assert_close(got, square.bfloat16(), rtol=2**-6, atol=2**-10)
    d_got = emulated(form, d_out, value, got, blocks, beside, switches)
    torch.testing.assert_close(d_got, d_key.bfloat16(), rtol=2**-5, atol=2**-8)


# Graphs


@pytest.fixture
def graphs(monkeypatch):
    """compile(function): it, with the pass over its graph; and the graphs that came of it, as code."""
    asked = []

    def choose(x, weight):
        asked.append((tuple(x.shape), tuple(weight.shape)))
        return Choice("cuda", "as a test wants it")

    def compiled(function):
        seen = []

        def partition(joint, inputs, **settings):
            with torch._inductor.config.patch(joint_custom_post_pass=products.settings()["joint_custom_post_pass"]):
                joint_graph_passes(joint)
            joint.recompile()
            return min_cut_rematerialization_partition(joint, inputs, **settings)

        def keep(graph, _):
            seen.append(graph.code)
            return make_boxed_func(graph)

        settings = dict(partition_fn=partition, decompositions=select_decomp_table())
        return aot_function(function, keep, keep, **settings), seen

    monkeypatch.setattr(products, "squared_relu_product_choice", choose)
    compiled.asked = asked
    return compiled


def gradients_of(function, parts, d_out):
    leaves = [part.clone().requires_grad_() for part in parts]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def channel_mix(x, key, value):
    return F.linear(torch.relu(F.linear(x, key)).square(), value)


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
def test_the_graph_of_a_channel_mix_keeps_the_square_alone(graphs, shape):
    x, key, value, d_out = drawn(6, 16, 24, BF16)
    x, d_out = x.view(shape), d_out.view(shape)
    function, codes = graphs(channel_mix)
    want = gradients_of(channel_mix, (x, key, value), d_out)
    for a, b in zip(gradients_of(function, (x, key, value), d_out), want, strict=True):
        assert torch.equal(a, b)
    forward, backward = codes
    assert graphs.asked == [((6, 16), (24, 16))]
    assert forward.count("heron.squared_relu_product.") == 1
    assert backward.count("heron.squared_relu_product_gradient.") == 1
    assert forward.count("aten.mm.") == 1
    assert backward.count("aten.mm.") == 3  # the gradients of x and of both weights
    for elementwise in ("relu", "pow", "where", "aten.mul"):
        assert f"aten.{elementwise}" not in forward + backward


def gated(x, key, value):
    return F.linear(torch.relu(F.linear(x, key)).square() * x[..., :1], value)


def read_twice(x, key, value):
    of_key = F.linear(x, key)
    return F.linear(torch.relu(of_key).square(), value) + of_key[..., :1]


def relu_read_twice(x, key, value):
    relu = torch.relu(F.linear(x, key))
    return F.linear(relu.square(), value) + relu[..., :1]


def cubed(x, key, value):
    return F.linear(torch.relu(F.linear(x, key)).pow(3), value)


def two_values(x, key, value):
    square = torch.relu(F.linear(x, key)).square()
    return F.linear(square, value) + F.linear(square, value.flip(0))


def with_bias(x, key, value):
    return F.linear(torch.relu(F.linear(x, key) + 1).square(), value)


@pytest.mark.parametrize("function", [gated, read_twice, relu_read_twice, cubed, two_values, with_bias])
def test_other_graphs_stay_as_they_are(graphs, function):
    x, key, value, d_out = drawn(6, 16, 24, torch.float32)
    compiled, codes = graphs(function)
    want = gradients_of(function, (x, key, value), d_out)
    for a, b in zip(gradients_of(compiled, (x, key, value), d_out), want, strict=True):
        torch.testing.assert_close(a, b)
    assert "squared_relu" not in "".join(codes)
    assert not graphs.asked


@pytest.mark.parametrize(
    ("factor", "filling", "reads_gradient_twice", "replaced"),
    [(2, 0.0, False, True), (3, 0.0, False, False), (2, 1.0, False, False), (2, 0.0, True, False)],
)
def test_what_only_looks_like_the_gradient_stays_as_it_is(graphs, factor, filling, reads_gradient_twice, replaced):
    def both_ways(x, key, value, d_out):
        relu = torch.relu(x @ key.T)
        d_relu = (d_out @ value) * (relu * factor)
        d_key = torch.where(relu <= 0, torch.full([], filling, dtype=x.dtype), d_relu)
        return relu.pow(2) @ value.T, d_key, d_relu if reads_gradient_twice else x

    parts = drawn(6, 16, 24, BF16)
    traced = make_fx(both_ways, tracing_mode="fake")(*parts)
    products.replace_squared_relus(traced.graph)
    traced.recompile()
    assert ("heron.squared_relu_product_gradient" in traced.code) == replaced
    for a, b in zip(traced(*parts), both_ways(*parts), strict=True):
        assert torch.equal(a, b)


def test_matrices_that_do_not_lie_in_rows_of_16_bytes_are_left_to_pytorch(graphs):
    x, key, value, d_out = drawn(6, 12, 24, BF16)
    for parts in ((x, key, value), (x.T.contiguous().T, key, value)):
        function, codes = graphs(channel_mix)
        gradients_of(function, parts, d_out)
        assert "squared_relu" not in "".join(codes)


def test_where_it_is_no_faster_the_graph_stays_as_it_is(graphs, monkeypatch):
    monkeypatch.setattr(products, "squared_relu_product_choice", lambda *_: Choice("reference", "as a test wants it"))
    x, key, value, d_out = drawn(6, 16, 24, BF16)
    function, codes = graphs(channel_mix)
    gradients_of(function, (x, key, value), d_out)
    assert "squared_relu" not in "".join(codes)


# The choice


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """What is measured, and what it says; matrices without contents are on a device of compute capability 9.0."""
    measured = []

    def measure(*sizes):
        measured.append(sizes)
        if isinstance(measure.says, Exception):
            raise measure.says
        return measure.says

    measure.says = Measured(2, 1, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(chosen.cublaslt, "version", lambda: 1)
    monkeypatch.setattr(_build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cuda.FORM, "load", lambda capability: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(chosen, "_measure", measure)
    monkeypatch.setattr(chosen, "_known", {})
    return measured, measure


def choice(n=32768, n_in=768, hidden=3072, dtype=BF16):
    """Of x and weight without contents."""

    class OnCuda:
        def __init__(self, *shape):
            self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda", 0)

    return squared_relu_product_choice(OnCuda(n, n_in), OnCuda(hidden, n_in))


def test_what_was_measured_is_kept_for_the_next_process(hopper, tmp_path):
    measured, measure = hopper
    assert choice().impl == choice().impl == "cuda"
    measure.says = Measured(0, 3, False)
    assert choice(n=16384).impl == "reference"
    assert "take less time" in choice(n=16384).reason
    assert [sizes[1:] for sizes in measured] == [(32768, 768, 3072), (16384, 768, 3072)]
    (file,) = (tmp_path / "products").iterdir()
    text = file.read_text()
    assert sorted(json.loads(text).values()) == [[0, 3, False], [2, 1, True]]
    file.unlink()
    assert choice().impl == "cuda"
    assert len(measured) == 2
    file.write_text(text)
    chosen._known.clear()  # another process
    assert choice().impl == "cuda"
    assert choice(n=16384).impl == "reference"
    assert len(measured) == 2


def test_without_room_to_measure_products_stay_as_they_are(hopper):
    measured, measure = hopper
    measure.says = torch.OutOfMemoryError("no room")
    assert choice().impl == "reference"
    measure.says = Measured(2, 1, True)
    assert choice().impl == "cuda"


def test_without_cublaslt_it_is_measured_too(hopper, monkeypatch):
    def missing():
        raise KernelError("libcublasLt.so.13 can't be loaded")

    monkeypatch.setattr(chosen.cublaslt, "version", missing)
    assert choice().impl == "cuda"
    assert len(hopper[0]) == 1


def test_while_a_graph_is_recorded_nothing_is_measured(hopper, monkeypatch):
    measured, _ = hopper
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choice().impl == "reference"
    assert not measured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choice().impl == "cuda"


@pytest.mark.parametrize("damage", ["{", '{"32768 tokens, 768 x 3072": 7}', '{"32768 tokens, 768 x 3072": [1]}'])
def test_a_damaged_file_is_measured_anew(hopper, tmp_path, damage):
    measured, _ = hopper
    assert choice().impl == "cuda"
    (file,) = (tmp_path / "products").iterdir()
    file.write_text(damage)
    chosen._known.clear()
    assert choice().impl == "cuda"
    assert len(measured) == 2
    assert json.loads(file.read_text()) == {"32768 tokens, 768 x 3072": [2, 1, True]}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (dict(dtype=torch.float16), "bf16"),
        (dict(n=64), "operations"),
        (dict(n_in=772), "772"),
        (dict(hidden=3076), "3076"),
    ],
)
def test_it_says_what_the_kernels_do_not_take(hopper, facts, reason):
    assert choice(**facts).impl == "reference"
    assert reason in choice(**facts).reason
    assert not hopper[0]


def test_other_devices_have_no_kernels(hopper, monkeypatch):
    built = []
    monkeypatch.setattr(_build, "load_kernels_for", lambda *arguments: built.append(arguments[0]))
    for capability in ((8, 0), (9, 0), (12, 0)):
        cuda.library.__wrapped__(capability)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert choice().impl == ("cuda" if capability == (9, 0) else "reference")
    assert built == [(9, 0)]
    assert squared_relu_product_choice(torch.zeros(8, 8), torch.zeros(8, 8)).impl == "reference"


def test_a_failed_build_leaves_products_as_they_are(hopper, monkeypatch, capsys):
    def fail(capability):
        raise KernelError("squared_relu_product: no nvcc")

    monkeypatch.setattr(cuda.FORM, "load", fail)
    assert choice().impl == "reference"
    assert "no nvcc" in capsys.readouterr().err


def test_a_build_that_fails_while_a_compiler_counts_on_it_leaves_products_as_they_are(hopper, monkeypatch):
    measured, _ = hopper
    fails = threading.Event()

    def fail(capability):
        assert fails.wait(30)
        raise KernelError("squared_relu_product: no nvcc")

    form = NativeForm("squared_relu_product", "cuda", "products of a test", cuda.why_not, fail)
    monkeypatch.setattr(cuda, "FORM", form)
    form.begin(torch.device("cuda", 0))
    threading.Timer(0.2, fails.set).start()
    with counting_on_builds():
        found = choice()
    assert found.impl == "reference"
    assert "no nvcc" in found.reason
    assert not measured


@pytest.mark.parametrize(
    "change",
    [
        lambda x, key, value, square: (x.half(), key.half(), None),
        lambda x, key, value, square: (x[:, :16], key, None),
        lambda x, key, value, square: (x, key.T.contiguous().T, None),
        lambda x, key, value, square: (x[:, :20], key[:, :20].contiguous(), None),
        lambda x, key, value, square: (x, key.to("meta"), None),
        lambda x, key, value, square: (x, value, None),
        lambda x, key, value, square: (x, key, square),
        lambda x, key, value, square: (x, value, square[1:]),
        lambda x, key, value, square: (x, value, square.float()),
    ],
)
def test_matrices_that_the_kernels_do_not_read_are_errors(hopper, change):
    x, key, value, _ = drawn(6, 24, 56, BF16)
    square = squared_relu_product_reference(x, key)
    for parts in ((x, key, None), (x, value, square)):
        cuda.check(*parts)
    with pytest.raises(KernelError, match="rows a multiple of 8"):
        cuda.by_boxes(*change(x, key, value, square), 0)


def test_a_device_without_kernels_is_an_error(hopper, monkeypatch):
    x, key, _, _ = drawn(6, 24, 56, BF16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(KernelError, match="compute capability 9.0, this device has"):
        cuda.by_boxes(x, key, None, 0)


def test_they_are_built_ahead_for_training():
    assert cuda.FORM in ahead.TRAINING


@needs_nvcc
def test_the_kernels_compile_without_spilling(tmp_path):
    kernels = [
        f"products_with_squares<std::tuple_element_t<{form}, Forms>, {backward}>(const __grid_constant__ Problem)"
        for form in range(cuda.FORMS)
        for backward in ("false", "true")
    ]
    check_that_none_spills(tmp_path, cuda.SOURCE, kernels, "90a", ["tuple", "type_traits", *cuda.HEADERS])


# On a GPU


@pytest.fixture
def on_hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no CUDA device of compute capability 9.0")
    return "cuda"


SIZES = [(32768, 768, 3072), (8191, 768, 3072), (4096, 2048, 8192), (1003, 776, 3080), (257, 104, 200), (1, 8, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_it_gives_pytorchs_bits(on_hopper, size):
    n, n_in, hidden = size
    x, key, value, d_out = drawn(*size, BF16, on_hopper, seed=n)
    square, d_key = by_pytorch(x, key, value, d_out)
    got, d_got = squared_relu_product(x, key), squared_relu_product_gradient(d_out, value, square)
    if n >= 4096:  # else cuBLASLt may divide the sum
        assert torch.equal(got, square)
        assert torch.equal(d_got, d_key)
    want = squared_relu_product_gradient(d_out, value, got)
    for form in range(cuda.FORMS):
        assert torch.equal(cuda.by_boxes(x, key, None, form), got)
        assert torch.equal(cuda.by_boxes(d_out, value, got, form), want)
    exact, d_exact = by_pytorch(*(part.double() for part in (x, key, value, d_out)))
    for mine, theirs, want in ((got, square, exact), (d_got, d_key, d_exact)):
        assert (mine.double() - want).norm() <= 1.1 * (theirs.double() - want).norm()
    for _ in range(3):
        assert torch.equal(squared_relu_product(x, key), got)
        assert torch.equal(squared_relu_product_gradient(d_out, value, square), d_got)


@pytest.mark.gpu
def test_it_computes_all_of_its_result_and_nothing_beside_it(on_hopper):
    x, key, value, d_out = drawn(1003, 776, 3080, BF16, on_hopper)
    square = squared_relu_product(x, key)
    want = squared_relu_product_gradient(d_out, value, square)
    torch.cuda.empty_cache()
    for filling in (torch.nan, 1.0):  # what memory held before
        before = [torch.full_like(square, filling) for _ in range(3)]
        del before
        assert torch.equal(squared_relu_product(x, key), square)
        assert torch.equal(squared_relu_product_gradient(d_out, value, square), want)


@pytest.mark.gpu
def test_matrices_may_begin_anywhere_and_have_rows_further_apart(on_hopper):
    x, key, value, d_out = drawn(1000, 768, 3072, BF16, on_hopper)
    square = squared_relu_product(x, key)
    d_key = squared_relu_product_gradient(d_out, value, square)

    def moved(matrix):
        room = torch.empty(matrix.numel() + 1, dtype=matrix.dtype, device=matrix.device)
        return room[1:].view_as(matrix).copy_(matrix)

    def apart(matrix):
        return F.pad(matrix, (8, 16))[:, 8:-16]

    for change in (moved, apart):
        assert torch.equal(squared_relu_product(change(x), change(key)), square)
        assert torch.equal(squared_relu_product_gradient(change(d_out), change(value), change(square)), d_key)


@pytest.mark.gpu
def test_every_number_has_pytorchs_square_and_gradient(on_hopper):
    x = F.pad(numbers_in_bf16(), (0, 6)).to(on_hopper)
    n = len(x)
    assert n % 8 == 0
    one_hot = torch.zeros(8, 8, dtype=BF16, device=on_hopper)
    one_hot[:, 0] = 1.0
    key = torch.zeros(n, 8, dtype=BF16, device=on_hopper)
    key[:, 0] = x
    square = squared_relu_product(one_hot, key)
    assert torch.equal(square, torch.relu(x).square().expand(8, n))
    value = torch.zeros(8, n, dtype=BF16, device=on_hopper)
    value[0] = 1.5
    d_key = squared_relu_product_gradient(one_hot, value, square)
    kept = (x <= 0) | ((x >= SMALLEST) & (x < 2.0**64))
    assert torch.equal(d_key[:, kept], (3 * torch.relu(x)).expand(8, n)[:, kept])
    assert (d_key[:, ~kept & (x < 1)].float() <= 2**-61).all()


@pytest.mark.gpu
def test_what_is_no_number_stays_so_on_a_gpu(on_hopper):
    x, key, value, d_out = drawn(300, 64, 128, BF16, on_hopper)
    x[7, 5] = d_out[9, 3] = torch.nan
    square, d_key = by_pytorch(x, key, value, d_out)
    torch.testing.assert_close(squared_relu_product(x, key), square, equal_nan=True, rtol=2e-2, atol=1e-2)
    got = squared_relu_product_gradient(d_out, value, square)
    assert torch.equal(got.isnan(), d_key.isnan())
    assert (got[8] == d_key[8]).float().mean() > 0.9


@pytest.mark.gpu
def test_a_compiled_channel_mix_computes_by_it(on_hopper, monkeypatch):
    from heron.model.compiled import _compile, compiled

    monkeypatch.setattr(chosen, "measured", lambda *_: Measured(1, 0, True))
    x, key, value, d_out = drawn(16384, 768, 3072, BF16, on_hopper)
    want = gradients_of(channel_mix, (x, key, value), d_out)
    function = compiled(channel_mix, _compile)
    for _ in range(2):
        got = gradients_of(function, (x, key, value), d_out)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    names = kernels_launched(lambda: gradients_of(function, (x, key, value), d_out))
    assert sum("products_with_squares" in name for name in names) == 2
    assert not any("relu" in name for name in names if "products_with_squares" not in name)


@pytest.mark.gpu
def test_a_recorded_product_gives_the_same_bits(on_hopper):
    x, key, value, d_out = drawn(4096, 768, 3072, BF16, on_hopper)
    want = squared_relu_product(x, key)
    d_want = squared_relu_product_gradient(d_out, value, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        square = squared_relu_product(x, key)
        d_key = squared_relu_product_gradient(d_out, value, square)
    for _ in range(2):
        graph.replay()
        assert torch.equal(square, want)
        assert torch.equal(d_key, d_want)


@pytest.mark.gpu
def test_it_measures_which_form_is_the_fastest(on_hopper, monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(chosen, "_known", {})
    found = chosen.measured(torch.device(on_hopper, 0), 8192, 768, 3072)
    assert {found.forward, found.backward} <= {*range(cuda.FORMS)}
    (file,) = (tmp_path / "products").glob("*squared-relu*")
    assert json.loads(file.read_text()) == {"8192 tokens, 768 x 3072": list(found)}
