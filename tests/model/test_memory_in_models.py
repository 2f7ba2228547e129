"""ROSA memory in the network, against its definition in loops; in pieces, packs, forks, copies, graphs and threads."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import importlib.util
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree

import heron
from heron import ops
from heron.checkpoint.migrate import upcycle
from heron.config import RosaConfig
from heron.errors import CheckpointError, ConfigError, KernelError
from heron.model import memory as memory_module
from heron.model.memory import Recollection, longest_match, n_length_rows
from heron.model.state import State
from heron.train.leaves import all_weights

VARIANTS = {
    "v7": {},
    "v7a": {},
    "v7b": {},
    "v8": {},
    "v8, 4x": dict(variant="v8", deep_embed_4x=True),
    "v8-hybrid": {},
    "v8 and ROSA": dict(variant="v8", rosa="qkv-4bit"),
    "rosa-lm": {},
}
SEVERAL = dict(params=["v8", "v7b", "rosa-lm"])


def changes_of(name):
    return {"variant": name, **VARIANTS[name]}


@pytest.fixture(params=VARIANTS)
def changes(request):
    return changes_of(request.param)


@pytest.fixture(**SEVERAL)
def model(request, random_model):
    return random_model(n_layer=2, memory="memory", **changes_of(request.param)).double()


def ids(rows, tokens, seed=0, kinds=5):
    """Few kinds of ids, so that most positions have matches, and long ones."""
    return torch.randint(0, kinds, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def assert_close(got, want, tolerance=1e-9):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def found(x, t, rosa):
    """The matches of position t of the list x, by the words of their definition: (predicted, length, end)."""
    shared = {}
    for j in range(0 if rosa.window is None else max(0, t - rosa.window), t):
        n = 0
        while n < min(rosa.max_match, j + 1) and x[j - n] == x[t - n] and not (n > 0 and x[t - n] == rosa.end):
            n += 1
        shared[j] = n
    matches = []
    for length in range(rosa.max_match, 0, -1):
        ends = [j for j, n in shared.items() if n >= length]
        if ends and x[ends[-1] + 1] not in {predicted for predicted, *_ in matches}:
            matches.append((x[ends[-1] + 1], shared[ends[-1]], ends[-1]))
    return matches[: rosa.n_matches]


def row_of(length):
    """Lengths to 16 have a row each, then 17 to 32, 33 to 64 and so on share one."""
    return length - 1 if length <= 16 else next(16 + i for i in range(9) if length <= 32 << i)


def definition(model, tokens):
    """Logits by the formulas, position by position; the blocks are those of the model."""
    rosa, memory, table = model.config.memory, model.memory, model.emb.weight
    x, bonus = table[tokens], torch.zeros(*tokens.shape, model.config.vocab_size, dtype=table.dtype)
    for b, t in itertools.product(*map(range, tokens.shape)):
        for k, (predicted, length, _) in enumerate(found(tokens[b].tolist(), t, rosa)):
            x[b, t] += table[predicted] * memory.scale[k] + memory.length[k, row_of(length)]
            bonus[b, t, predicted] += memory.copy[k, row_of(length)]
    if model.config.has_ln0:
        x = model.blocks[0].ln0(x)
    without = copy.deepcopy(model)
    without.config, without.memory = dataclasses.replace(model.config, memory=None), None
    with without.blocks[0].register_forward_pre_hook(lambda _, given: (x, *given[1:])):
        return without(tokens)[0] + bonus


def test_a_fresh_model_is_its_twin_without_bit_for_bit(changes):
    sizes = dict(n_layer=2, n_embd=32, vocab_size=37, head_size=16)
    models = []
    for memory in (None, "memory"):
        torch.manual_seed(3)
        models.append(heron.RWKV(heron.ModelConfig(**changes, **sizes, memory=memory)))
    twin, model = models
    assert list(model.state_dict()) == [*twin.state_dict(), "memory.scale", "memory.length", "memory.copy"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(twin.named_parameters()).get(name, torch.zeros_like(parameter))), name
    tokens, targets = ids(2, 40), ids(2, 40, seed=1)
    assert torch.equal(model(tokens)[0], twin(tokens)[0])
    assert torch.equal(model.loss(tokens, targets), twin.loss(tokens, targets))
    model.loss(tokens, targets).backward()
    assert all(p.grad.any() for p in (model.memory.copy, model.emb.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upcycled_model_gives_the_old_logits_bit_for_bit(changes, random_model, dtype):
    model = random_model(**changes).to(dtype)
    config = model.config
    new = upcycle(model, config.variant, config.deep_embed_4x, RosaConfig.preset("memory", n_matches=3, window=20))
    assert new.config == dataclasses.replace(config, memory=RosaConfig.preset("memory", n_matches=3, window=20))
    tokens = ids(2, 50)
    assert torch.equal(new(tokens)[0], model(tokens)[0])
    with pytest.raises(ConfigError, match="the model has a ROSA memory already"):
        upcycle(new, config.variant, config.deep_embed_4x, RosaConfig.preset("memory"))
    kept = upcycle(new, config.variant, config.deep_embed_4x)
    assert kept.config == new.config


def test_a_trained_memory_is_not_moved_to_where_ln0_is_not_applied(random_model):
    model = random_model(variant="v8", memory="memory")
    with pytest.raises(CheckpointError, match="cannot become a v8-hybrid: what memory.scale adds .* through ln0"):
        upcycle(model, "v8-hybrid")
    with torch.no_grad():
        model.memory.scale.zero_()
        model.memory.length.zero_()
        tokens = ids(2, 40)
        assert torch.equal(upcycle(model, "v8-hybrid")(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("rosa", [{}, dict(n_matches=1, max_match=3), dict(n_matches=3, window=9, end=2)], ids=str)
def test_logits_are_those_of_the_definition(changes, random_model, rosa):
    model = random_model(n_layer=2, memory=RosaConfig.preset("memory", **rosa), **changes).double()
    tokens = torch.cat((ids(2, 30), ids(2, 30), ids(2, 30)), dim=1)  # also matches of more than 32
    with torch.no_grad():
        assert_close([model(tokens)[0]], [definition(model, tokens)])


def test_lengths_have_the_rows_that_the_docs_say(random_model):
    for max_match in range(1, 256):
        assert n_length_rows(max_match) == row_of(max_match) + 1
        assert row_of(longest_match(n_length_rows(max_match))) == row_of(max_match)
    model = random_model(memory=RosaConfig.preset("memory", max_match=255, n_matches=1))
    lengths = torch.arange(256).view(1, -1, 1)
    _, values = model.memory.bonus(torch.stack((torch.zeros_like(lengths), lengths), dim=-1))
    wanted = [model.memory.copy[0, row_of(length)] for length in range(1, 256)]
    assert torch.equal(values.flatten(), torch.stack([torch.zeros(()), *wanted]))


def test_gradients_are_those_of_the_loss_by_finite_differences(changes, random_model):
    model = random_model(n_layer=2, vocab_size=7, memory="memory", **changes).double()
    tokens, targets = ids(2, 20), ids(2, 20, seed=1)

    def loss():
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())

    names = [name for name, _ in model.named_parameters() if ".rosa." not in name and ".ln3." not in name]
    if changes != {"variant": "v8"}:
        names = [name for name in names if not name.startswith("blocks.0.")]
    if changes["variant"] == "rosa-lm":  # below a bit, gradients are stand-ins
        names = ["head.weight", "ln_out.weight", "memory.copy"]
    elif "rosa" in changes:
        names = ["head.weight", "ln_out.weight", "memory.copy", "blocks.1.ffn.value.weight"]
    slopes = torch.autograd.grad(loss(), [model.get_parameter(name) for name in names], allow_unused=True)
    generator, step = torch.Generator().manual_seed(0), 1e-6
    for name, slope in zip(names, slopes, strict=True):
        parameter = model.get_parameter(name)
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            start = parameter.clone()
            for sign in (1, -1):
                parameter.copy_(start + sign * step * way)
                ends.append(float(loss()))
            parameter.copy_(start)
        want = 0.0 if slope is None else float((slope * way).sum())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(want, rel=1e-5, abs=1e-8), name
        assert slope is None or not name.startswith("memory") or slope.any()


def test_the_loss_is_that_of_the_logits_with_every_gradient(model):
    tokens, targets = ids(2, 30), ids(2, 30, seed=1)
    targets[0, :5] = -100
    results = []
    for loss in (model.loss(tokens, targets), ops.cross_entropy(model(tokens)[0], targets)):
        slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append([loss, *(slope for slope in slopes if slope is not None)])
    assert_close(*results)


def test_gradients_are_the_same_where_blocks_are_computed_again(model):
    results = []
    for model.grad_checkpoint in (False, True):
        loss = model.loss(ids(2, 30), ids(2, 30, seed=1))
        results.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_text_in_pieces_is_the_whole_text_from_any_of_its_states(model):
    tokens = ids(2, 60)
    with torch.no_grad():
        whole, end = model(tokens)
        states, parts = [None], []
        for piece in tokens.split([1, 7, 1, 30, 21], dim=1):
            logits, state = model(piece, states[-1])
            parts.append(logits)
            states.append(state)
        assert_close([torch.cat(parts, dim=1)], [whole])
        assert_close(states[-1].to_list(), end.to_list())
        for at, state in zip((8, 9, 1), (states[2], states[3], states[1]), strict=True):  # each has been read on from
            for _ in range(2):
                logits, fork = model(tokens[:, at:], state)
                assert_close([logits, *fork.to_list()], [whole[:, at:], *end.to_list()])
        other = ids(2, 20, seed=9)
        logits, _ = model(other, states[2])
        assert_close([logits], [model(torch.cat((tokens[:, :8], other), dim=1))[0][:, 8:]])


def test_packed_sequences_are_as_if_each_were_alone(model):
    lengths = [7, 0, 1, 20]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    with torch.no_grad():
        states, alone = None, [None] * len(lengths)
        for seed in range(3):
            tokens = ids(1, sum(lengths), seed)
            logits, states = model(tokens, states, offsets)
            pieces = tokens.split(lengths, dim=1)
            wanted = [model(piece, state) for piece, state in zip(pieces, alone, strict=True) if piece.shape[1]]
            assert_close([logits], [torch.cat([part for part, _ in wanted], dim=1)])
            after = iter(wanted)
            alone = [next(after)[1] if piece.shape[1] else None for piece in pieces]
            one_each = states if isinstance(states, tuple) else [states.of([i]) for i in range(len(lengths))]
            for got, want in zip(one_each, alone, strict=True):
                if want is not None:
                    assert_close(got.to_list(), want.to_list())
    assert_close([model.loss(tokens, tokens, offsets)], [ops.cross_entropy(model(tokens, None, offsets)[0], tokens)])


def test_states_of_packed_sequences_may_remember_nothing_yet(random_model):
    model = random_model(variant="v7b", memory="memory")
    _, read = model(ids(1, 9))
    fresh = State.zeros(model.config, 1, torch.device("cpu"), torch.float32)
    logits, states = model(ids(1, 12, seed=1), (fresh, read), [0, 5, 12])
    wanted = model(ids(1, 12, seed=1)[:, 5:], read)
    assert_close([logits[:, 5:], *states[1].to_list()], [wanted[0], *wanted[1].to_list()], 1e-5)
    assert [len(state.memory[0].tokens()) for state in states] == [5, 16]


def test_what_is_given_as_recalled_takes_the_place_of_what_would_be_found(model):
    tokens, targets = ids(2, 30), ids(2, 30, seed=1)
    recalled, memory = model.recall(tokens, None)
    rosa = model.config.memory
    for b, t in itertools.product(range(2), range(30)):
        matches = [match[:2] for match in found(tokens[b].tolist(), t, rosa)]
        assert recalled[b, t].tolist() == [list(match) for match in (*matches, (0, 0), (0, 0))[:2]]
    with torch.no_grad():
        logits, state = model(tokens)
        again, untouched = model(tokens, recalled=recalled)
        assert torch.equal(again, logits)
        assert untouched.memory is None
        assert torch.equal(model.loss(tokens, targets, recalled=recalled), model.loss(tokens, targets))
        hidden, after, told = model.read(tokens)
        assert torch.equal(told, recalled)
        assert torch.equal(model.logits(hidden, told), logits)
        assert_close(after.to_list(), state.to_list(), 0)
        assert [one.n_read for one in memory] == [30, 30]
        assert not torch.allclose(model(tokens, recalled=torch.zeros_like(recalled))[0], logits)


def test_recalled_that_can_not_be_is_refused_in_a_line(random_model):
    tokens = ids(2, 6)
    model = random_model(n_layer=1, memory="memory")
    recalled, _ = model.recall(tokens, None)
    for wrong, told in (
        (recalled[:1], r"wanted \(2, 6, 2, 2\) int64, got \(1, 6, 2, 2\) torch.int64"),
        (recalled.int(), "got .* torch.int32"),
        (recalled + torch.tensor([37, 0]), "wanted ids to 36 and lengths to 64"),
        (recalled + torch.tensor([0, 65]), "lengths to 64"),
        (recalled - 1, "wanted ids to 36"),
    ):
        with pytest.raises(ConfigError, match=f"recalled: .*{told}"):
            model(tokens, recalled=wrong)
    with pytest.raises(ConfigError, match="recalled: this model has no ROSA memory; leave it out"):
        random_model(n_layer=1)(tokens, recalled=recalled)


def leaks(model, recall):
    """Whether logits change with tokens that come later."""
    tokens, other = ids(2, 40), ids(2, 40)
    other[:, 25:] = ids(2, 15, seed=3)
    with torch.no_grad():
        logits, changed = (model(x, recalled=recall(x))[0][:, :25] for x in (tokens, other))
    return not torch.allclose(logits, changed, rtol=1e-9, atol=1e-9)


def test_no_logit_depends_on_a_later_token_and_a_planted_leak_is_seen(model):
    def recall(tokens):
        return model.recall(tokens, None)[0]

    assert not leaks(model, recall)
    assert leaks(model, lambda tokens: recall(tokens).roll(-1, dims=1))


def test_matches_end_at_the_end_of_a_document_and_within_the_window():
    rosa = RosaConfig.preset("memory", end=0, window=6, n_matches=1, max_match=8)
    tokens = torch.tensor([5, 6, 0, 5, 6, 7, 0, 5, 6])
    recalled, src, memory = Recollection().read(tokens, rosa)
    assert recalled[:, 0].tolist() == [[0, 0]] * 3 + [[6, 1], [0, 2], [0, 0], [5, 1], [6, 1], [7, 2]]
    assert src.flatten().tolist() == [-1, -1, -1, 0, 1, -1, 2, 3, 4]
    across = dataclasses.replace(rosa, end=None)
    assert memory.read(torch.tensor([7]), across)[0].tolist() == [[[0, 4]]]  # by other rules than it was read by
    assert memory.read(torch.tensor([7]), rosa)[0].tolist() == [[[0, 3]]]
    assert Recollection(tokens).read(torch.tensor([7]), across)[0].tolist() == [[[0, 4]]]


def test_a_state_is_copied_with_what_it_has_read(model):
    tokens, rest = ids(3, 30), ids(3, 20, seed=1)
    _, state = model(tokens)
    state = state.detach()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.no_grad():
        wanted = model(rest, state)[0]
        for name, same in {
            "list": State.from_list(state.to_list()),
            "clone": state.clone(),
            "device": state.to("cpu"),
            "map": state.map(lambda part: part + 0),
            "tree": _pytree.tree_map(lambda part: part, state),
            "deep copy": copy.deepcopy(state),
            "pickle": pickle.loads(pickle.dumps(state)),
            "file": torch.load(file, weights_only=False),
            "sequences": State.joined([state.of([0]), state.of([1, 2])]),
        }.items():
            assert [memory.n_read for memory in same.memory] == [30, 30, 30], name
            assert torch.equal(model(rest, same)[0], wanted), name
        assert_close([model(rest[[2, 0]], state.of([2, 0]))[0]], [wanted[[2, 0]]])
        twice = state.of([1, 1])
        assert twice.memory[0] is state.memory[1]
        assert_close([*model(rest[[1, 1]], twice)[0]], [wanted[1], wanted[1]])
        one = state.of([0])
        runtime = one.to_runtime()
        assert runtime[-1].dtype == torch.int32
        assert torch.equal(runtime[-1].long(), tokens[0])
        assert_close([model(rest[:1], State.from_runtime(runtime))[0]], [model(rest[:1], one)[0]], 0)


def test_a_copy_outlives_the_state_that_it_was_made_of(random_model):
    model = random_model(n_layer=1, memory="memory")
    tokens = ids(1, 30)
    state = copy.deepcopy(model(tokens)[1].detach())
    for seed in range(20):
        model(ids(1, 200, seed))
    assert torch.equal(state.memory[0].tokens(), tokens[0])
    assert_close([model(ids(1, 9), state)[0]], [model(torch.cat((tokens, ids(1, 9)), 1))[0][:, 30:]], 1e-4)


def test_a_tree_of_other_things_than_tensors_can_be_put_together(random_model):
    _, state = random_model(n_layer=1, memory="memory")(ids(2, 9))
    leaves, spec = _pytree.tree_flatten(state)
    numbers = _pytree.tree_unflatten(range(len(leaves)), spec)
    assert (list(numbers.layers[0][:3]), len(numbers.memory)) == ([0, 1, 2], 2)


def test_bytes_of_a_state_count_the_memory_of_each_sequence(random_model):
    model = random_model(n_layer=1, memory="memory")
    _, state = model(ids(2, 3000))
    held = state.nbytes - dataclasses.replace(state, memory=None).nbytes
    assert held == sum(memory.nbytes for memory in state.memory)
    assert 2 * 12 * 3000 <= held <= 2 * (24 * 3000 + 4 * 4096 + 100)
    assert State.from_list(state.to_list()).memory[0].nbytes == 8 * 3000


def test_states_that_do_not_fit_are_refused_in_a_line(random_model):
    model = random_model(n_layer=1, memory="memory")
    tokens, (_, state) = ids(2, 9), model(ids(2, 9))
    small = random_model(n_layer=1, vocab_size=3, memory="memory")
    for run, told in (
        (lambda: random_model(n_layer=1)(tokens, state), "state: wanted the ROSA memories of none sequences, got 2"),
        (lambda: model(tokens, dataclasses.replace(state, memory=state.memory[:1])), "memories of 2 sequences, got 1"),
        (lambda: state.check(model.config, 3), "memories of 3 sequences, got 2"),
        (lambda: model(tokens[:1], state), "memories of 1 sequences, got 2"),
        (lambda: State.from_list(state.to_list()).check(small.config, 2), "state, memory: ids must be 0 to 2"),
        (lambda: model(tokens, state.to_list()), "wanted a State, got list"),
    ):
        with pytest.raises(ConfigError, match=told):
            run()


def test_a_fork_beyond_the_window_says_to_clone_and_a_clone_goes_on(random_model):
    model = random_model(n_layer=1, memory=RosaConfig.preset("memory", window=20, max_match=4))
    tokens, rest = ids(1, 50), ids(1, 100, seed=1)
    with torch.no_grad():
        _, state = model(tokens)
        kept = state.clone()
        wanted, after = model(rest, state)
        with pytest.raises(KernelError, match="not all that a window needs are kept; copy in time"):
            model(rest, state)
        assert torch.equal(model(rest, kept)[0], wanted)
        listed = State.from_list(after.to_list())
        assert [len(memory.tokens()) for memory in listed.memory] == [24]
        assert_close([model(rest, listed)[0]], [model(rest, after.clone())[0]], 0)
        assert after.memory[0].nbytes < 24 * 32 + 4 * 4096 + 100
        both = after.of([0, 0])
        assert torch.equal(*model(rest.expand(2, -1), both)[0])


def test_threads_may_go_on_from_one_state(random_model):
    """Some of them read on in its stream, the others anew, and none while another does."""
    rosa = RosaConfig.preset("memory")
    start = Recollection().read(ids(1, 20_000)[0], rosa)[2]
    ends = [ids(1, 20_000, seed)[0] for seed in range(1, 9)]
    wanted = [start.clone().read(end, rosa)[0] for end in ends]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda end: start.read(end, rosa)[0], ends))
    assert all(map(torch.equal, got, wanted))


def test_weights_of_several_dtypes_compute_in_the_widest(random_model):
    model = random_model(variant="v7b", memory="memory")
    tokens = ids(2, 30)
    mixed = copy.deepcopy(model).bfloat16()
    tensors = {**mixed.state_dict(), "memory.length": model.memory.length, "ln_out.weight": model.ln_out.weight}
    mixed.load_state_dict(tensors, assign=True)
    assert mixed.mixes_dtypes
    wide = copy.deepcopy(model)
    wide.load_state_dict(mixed.state_dict())
    assert_close([mixed(tokens)[0], mixed.loss(tokens, tokens)], [wide(tokens)[0], wide.loss(tokens, tokens)], 1e-5)
    found_by = [part.recall(tokens, None)[0] for part in (mixed, wide)]
    assert_close([mixed(tokens, recalled=found_by[0])[0]], [wide(tokens)[0]], 1e-5)


def test_a_copy_in_bf16_computes_with_rounded_parameters(random_model):
    model = random_model(variant="v8", memory="memory")
    network = all_weights(model, in_half=True).network
    for name, parameter in network.memory.named_parameters():
        assert torch.equal(parameter, model.get_parameter(f"memory.{name}").bfloat16())
    tokens, targets = ids(2, 30), ids(2, 30, seed=1)
    network.loss(tokens, targets).backward()
    model.loss(tokens, targets).backward()
    for name, parameter in network.memory.named_parameters():
        want = model.get_parameter(f"memory.{name}").grad
        assert (parameter.grad.float() - want).norm() < 0.05 * want.norm(), name


def test_the_copy_learns_ten_times_as_fast_and_nothing_of_a_memory_decays(random_model):
    model = random_model(n_layer=1, memory="memory")
    groups = {id(p): group for group in heron.build_optimizer(model, lr=1e-3).param_groups for p in group["params"]}
    for name, wanted in (("copy", ("10x", 1e-2)), ("scale", ("1x", 1e-3)), ("length", ("1x", 1e-3))):
        group = groups[id(model.get_parameter(f"memory.{name}"))]
        assert (group["name"], group["lr"], group["weight_decay"]) == (*wanted, 0.0)


def test_graphs_and_transforms_take_what_was_recalled_before(random_model):
    model = random_model(n_layer=1, memory="memory")
    tokens = ids(2, 30)
    recalled, _ = model.recall(tokens, None)
    _, state = model(ids(2, 9, seed=1))
    state, weights = state.detach(), dict(model.named_parameters())
    with_state = model(tokens, state, recalled=recalled)
    exported = torch.export.export(model, (tokens, state, None, recalled)).module()(tokens, state, None, recalled)
    assert_close([exported[0], *exported[1].to_list()], [with_state[0], *with_state[1].to_list()], 1e-6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(tokens, state, None, recalled)[0], with_state[0])

    def total(weights, tokens, recalled):
        return torch.func.functional_call(model, weights, (tokens, None, None, recalled))[0].square().mean()

    slopes = torch.func.grad(total)(weights, tokens, recalled)
    wanted = torch.autograd.grad(model(tokens)[0].square().mean(), list(weights.values()), allow_unused=True)
    assert_close([slopes[n] for n, g in zip(weights, wanted, strict=True) if g is not None],
                 [g for g in wanted if g is not None], 1e-5)  # fmt: skip
    each = torch.func.vmap(total, in_dims=(None, 0, 0))(weights, tokens.unsqueeze(1), recalled.unsqueeze(1))
    assert_close([each.mean()], [total(weights, tokens, recalled)], 1e-5)
    with pytest.raises(ConfigError, match="inside a graph what memory found must be given; model.recall finds it"):
        torch.func.grad(lambda w: torch.func.functional_call(model, w, (tokens,))[0].sum())(weights)


def test_a_memory_begins_on_the_cpu_where_the_package_is_first_used_under_another_device():
    spec = importlib.util.spec_from_file_location("heron_model_memory_again", memory_module.__file__)
    again = importlib.util.module_from_spec(spec)
    with torch.device("meta"):  # under which `with torch.device("meta"): heron.RWKV(config)` imports it
        spec.loader.exec_module(again)
    assert again.Recollection().tokens().tolist() == []
