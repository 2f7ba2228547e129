"""States kept between requests: what is found again, what goes first, names, and files under kill -9."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from heron import tokenizer
from heron.checkpoint.formats import safetensors
from heron.errors import CheckpointError, ConfigError
from heron.generation import Engine, Request, Sampling, Snapshot
from heron.serve import sessions
from heron.serve.prefix_cache import PrefixCache
from heron.serve.sessions import NoSuchState, StateStore

LETTERS = tokenizer.load("bytes")
LARGE = 1 << 30


@pytest.fixture
def engine(random_model):
    return Engine(random_model(vocab_size=256), LETTERS)


@pytest.fixture
def behind(engine):
    """A function: ids -> the snapshot behind them."""
    return lambda ids: Snapshot(engine.prefill(list(ids)))


def same(a, b):
    one, other = a.state.to_list(), b.state.to_list()
    return a.pending == b.pending and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# -- the prefix cache -------------------------------------------------------------------------------------------------


def chat(engine, cache, turns):
    """A conversation in which each turn sends everything again: the answers, and tokens found and sent by turn."""
    ids, answers, found, sent = [], [], [], []
    for number in range(turns):
        ids += LETTERS.encode(f"User: turn {number}?\n\n")
        mark = len(ids)
        ids += LETTERS.encode("Assistant:")
        before, n = (cache and cache.find(ids[:-1], "base")) or (None, 0)
        bias = {LETTERS.eod: -100.0}
        request = Request(ids[n:], 90, Sampling(temperature=0), after=before, logit_bias=bias, marks=(mark - n,))
        sequence, answer = engine.add(request), []
        while len(answer) < 90:
            answer += [token.id for _, token in engine.step()]
        if cache is not None:
            for place, snapshot in sequence.snapshots.items():
                cache.keep(ids[: n + place], snapshot, "base")
            cache.keep([*ids, *answer[:-1]], engine.snapshot(sequence), "base")
        engine.close(sequence)
        found.append(n)
        sent.append(len(ids))
        ids += [*answer, *LETTERS.encode("\n\n")]
        answers.append(answer)
    return answers, found, sent


def test_of_a_chat_that_is_sent_again_each_turn_its_new_message_alone_is_read(engine):
    _, found, sent = chat(engine, PrefixCache(LARGE, LARGE), 20)
    assert sum(found) >= 0.95 * sum(sent)
    new = len(LETTERS.encode("\n\nUser: turn 19?\n\nAssistant:")) + 1
    assert sent[-1] - found[-1] <= new


def test_what_is_found_is_the_longest_prefix_of_its_start(behind):
    cache, ids = PrefixCache(LARGE, LARGE), [*range(40)]
    kept = {n: behind(ids[:n]) for n in (3, 17, 20)}
    for n, snapshot in kept.items():
        cache.keep(ids[:n], snapshot, "base")
    for n, want in ((2, None), (3, 3), (16, 3), (17, 17), (19, 17), (20, 20), (40, 20)):
        found = cache.find(ids[:n], "base")
        assert (found and found[1]) == want
        assert found is None or same(found[0], kept[want])
    assert cache.find(ids, "other") is None
    assert cache.find([9, *ids], "base") is None
    assert cache.find([*ids[:18], 99, 99, 99], "base")[1] == 17
    assert cache.find([], "base") is None


def test_a_prefix_keeps_the_state_alone(engine):
    sequence = engine.open([1, 2, 3], sampling=Sampling(presence_penalty=1.0))
    snapshot = engine.snapshot(sequence)
    assert snapshot.pending == (3,)
    cache = PrefixCache(LARGE, LARGE)
    cache.keep([1, 2], snapshot)
    cache.keep([], snapshot)
    cache.keep([7], Snapshot(None, (7,)))
    found, n = cache.find([1, 2, 3])
    assert (n, found.pending, found.counts, found.generator) == (2, (), None, None)
    assert cache.find([7]) is None


def test_the_states_used_longest_ago_go_to_the_host_and_then(behind, monkeypatch):
    moves, move = [], Snapshot.to
    monkeypatch.setattr(Snapshot, "to", lambda self, device: moves.append(str(device)) or move(self, device))
    monkeypatch.setattr(Snapshot, "device", property(lambda self: torch.device("cpu", 0)))
    size = behind([0]).nbytes
    cache = PrefixCache(2 * size, 2 * size + size // 2)

    def there():
        return [n for n in range(6) if cache.find([n, 50]) is not None]

    for n in range(4):
        cache.keep([n], behind([n]))
    assert moves == ["cpu", "cpu"]
    assert cache.find([0, 50])[1] == 1  # from the host, which sends another one there
    assert moves == ["cpu", "cpu", "cpu:0", "cpu"]
    for n in (4, 5):
        cache.keep([n], behind([n]))
    assert there() == [0, 3, 4, 5]  # 1 was used longest ago, then 2
    for n in range(6):
        cache.keep([n], behind([n]))
    assert len(there()) == 4
    assert cache._lengths._counts == {"": {1: 4}}


def test_a_cache_without_room_keeps_nothing(behind):
    size = behind([0]).nbytes
    for cache in (PrefixCache(0, 0), PrefixCache(size - 1, size - 1)):
        cache.keep([1], behind([1]))
        assert cache.find([1]) is None
        assert not cache._lengths._counts
    host = PrefixCache(0, size)
    host.keep([1], behind([1]))
    assert host.find([1])[1] == 1
    assert host.find([1])[1] == 1


def test_threads_may_share_a_cache(behind):
    states = [behind([n]) for n in range(8)]
    cache, errors = PrefixCache(3 * states[0].nbytes, 2 * states[0].nbytes), []

    def use(seed):
        chance = random.Random(seed)
        try:
            for _ in range(300):
                n = chance.randrange(8)
                cache.keep([n], states[n])
                found = cache.find([chance.randrange(8), 1])
                assert found is None or found[1] == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert cache._lengths._counts == {"": {1: 5}}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_state_comes_back_to_its_device(random_model):
    engine = Engine(random_model(vocab_size=256).to("cuda"), LETTERS)
    state = Snapshot(engine.prefill([1, 2, 3]))
    cache = PrefixCache(0, LARGE)
    cache.keep([1, 2, 3], state)
    found, _ = cache.find([1, 2, 3])
    assert found.device.type == "cuda"
    assert same(found, state)


# -- saved states -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "none"])
def store(request, tmp_path):
    return StateStore(tmp_path / "new" / "states" if request.param == "folder" else None, LARGE)


def test_states_are_saved_listed_forked_loaded_and_deleted(store, engine):
    assert list(store.list()) == []
    sequence = engine.open([1, 2, 3], sampling=Sampling(presence_penalty=1.0), seed=7)
    engine.step()
    snapshot = engine.snapshot(sequence)
    store.save("b", snapshot, engine)
    first = store.version("b")
    store.fork("b", "A.1-x_")
    assert list(store.list()) == ["A.1-x_", "b"]
    for name in ("b", "A.1-x_"):
        loaded = store.load(name, engine)
        assert same(loaded, snapshot)
        assert torch.equal(loaded.counts, snapshot.counts)
        assert torch.equal(loaded.generator, snapshot.generator)
    store.save("b", Snapshot(engine.prefill([9])), engine)
    assert store.version("b") != first
    assert not same(store.load("b", engine), store.load("A.1-x_", engine))
    store.delete("A.1-x_")
    assert list(store.list()) == ["b"]
    for use in (store.delete, store.version, lambda name: store.load(name, engine), lambda name: store.fork(name, "c")):
        with pytest.raises(NoSuchState, match="state 'A.1-x_': there is none of this name"):
            use("A.1-x_")


def test_a_folder_is_gone_on_with(tmp_path, engine, behind):
    StateStore(tmp_path, LARGE).save("mine", behind([1, 2]), engine)
    (tmp_path / "notes.txt").write_text("not a state")
    (tmp_path / ".hidden.safetensors").write_text("not ours")
    (tmp_path / "a b.safetensors").write_text("not ours")
    (tmp_path / ".tmp-0123-mine.safetensors").write_text("torn")
    store = StateStore(tmp_path, LARGE)
    assert list(store.list()) == ["mine"]
    assert same(store.load("mine", engine), behind([1, 2]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".hidden.safetensors", "a b.safetensors", "mine.safetensors", "notes.txt",
    ]  # fmt: skip


HOSTILE = [
    "", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".x", "x\0y", "x\n", "ü", "a b", "x" * 65, "~", "$HOME",
    "%2e%2e", "a:b", "*", "\u202e", None, 3, b"x", ["x"],
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_name_leads_out_of_the_folder(store, engine, behind, name):
    store.save("good", behind([1]), engine)
    uses = [
        lambda: store.save(name, behind([1]), engine),
        lambda: store.load(name, engine),
        lambda: store.fork("good", name),
        lambda: store.fork(name, "good"),
        lambda: store.delete(name),
        lambda: store.version(name),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="state: wanted a name of 1 to 64 letters"):
            use()
    assert list(store.list()) == ["good"]
    store.save("x" * 64, behind([1]), engine)


def test_another_models_state_and_a_damaged_file_are_refused_without_a_path(tmp_path, engine, behind, random_model):
    store, other = StateStore(tmp_path, LARGE), Engine(random_model(vocab_size=256, seed=1), LETTERS)
    store.save("mine", behind([1]), engine)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "mine.safetensors").read_bytes()[:-100])
    for name, reader, words in (("mine", other, "belongs to another model"), ("torn", engine, "not a readable state")):
        with pytest.raises(CheckpointError, match=f"^state '{name}': .*{words}") as raised:
            store.load(name, reader)
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(CheckpointError, match="state 'torn'") as raised:
        store.save("torn", behind([1]), engine)
    assert str(tmp_path) not in str(raised.value)


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path, engine, behind, monkeypatch):
    store, old = StateStore(tmp_path, LARGE), behind([1])
    store.save("mine", old, engine)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "write", full)
        patch.setattr(sessions.shutil, "copyfile", full)
        for use in (lambda: store.save("mine", behind([2]), engine), lambda: store.fork("mine", "other")):
            with pytest.raises(
                CheckpointError, match="^state '(mine|other)': cannot be written: No space left on device$"
            ):
                use()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
    assert same(store.load("mine", engine), old)


def test_a_folder_that_cannot_be_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file.*: no folder that states can be written into: "):
        StateStore(tmp_path / "file" / "states", LARGE)


def test_threads_that_ask_first_make_one_folder(monkeypatch):
    made, make = [], tempfile.TemporaryDirectory

    def slowly(*given, **named):
        time.sleep(0.02)
        made.append(make(*given, **named))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryDirectory", slowly)
    store = StateStore(None, LARGE)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: list(store.list()), range(4))) == [[]] * 4
    assert len(made) == 1


def test_a_session_does_not_wait_for_a_file_that_is_being_written(tmp_path, engine, behind, monkeypatch):
    store, begun, goes_on = StateStore(tmp_path, LARGE), threading.Event(), threading.Event()

    def slowly(*_):
        begun.set()
        assert goes_on.wait(10)

    monkeypatch.setattr(Engine, "save", slowly)
    saving = threading.Thread(target=store.save, args=("a", behind([1]), engine))
    saving.start()
    assert begun.wait(10)
    keeping = threading.Thread(target=store.keep, args=("b", behind([2])), daemon=True)
    keeping.start()
    keeping.join(5)
    has_kept = not keeping.is_alive()
    goes_on.set()
    saving.join()
    assert has_kept


def test_saved_states_are_bounded(tmp_path, engine, behind):
    StateStore(tmp_path, LARGE).save("one", behind([1]), engine)
    size = (tmp_path / "one.safetensors").stat().st_size
    store = StateStore(tmp_path, 2 * size)
    store.save("two", behind([2]), engine)
    for use in (lambda: store.save("three", behind([3]), engine), lambda: store.fork("one", "three")):
        with pytest.raises(
            CheckpointError, match=r"state 'three': with it .* MiB, and .* are theirs; delete one first"
        ):
            use()
    store.save("two", behind([3]), engine)  # in place of another
    store.delete("one")
    store.fork("two", "three")
    assert list(store.list()) == ["three", "two"]


def _save_forever(store, engine, snapshots):
    os.fsync = lambda _: time.sleep(0.002)  # about as long as a disk takes
    while True:
        for snapshot in snapshots:
            store.save("mine", snapshot, engine)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_it_saves_a_process_leaves_no_torn_file(tmp_path, engine, behind):
    store, snapshots = StateStore(tmp_path, LARGE), [behind([1]), behind([2])]
    store.save("mine", snapshots[0], engine)
    chance, n_left = random.Random(0), 0
    for _ in range(12):
        saving = multiprocessing.get_context("fork").Process(target=_save_forever, args=(store, engine, snapshots))
        version = store.version("mine")
        saving.start()
        while store.version("mine") == version:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(saving.pid, signal.SIGKILL)
        saving.join()
        n_left += sum(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
        store = StateStore(tmp_path, LARGE)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
        assert any(same(store.load("mine", engine), snapshot) for snapshot in snapshots)
    assert n_left > 0  # some were killed in the middle


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path):
    for name in (".tmp-1f-mine.safetensors", ".tmpA1b2C3", ".tmp-notes", "mine.safetensors"):
        (tmp_path / name).touch()
    StateStore(tmp_path, LARGE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-notes", "mine.safetensors"]


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_of_sessions_those_used_longest_ago_are_forgotten(behind):
    states = [behind([n]) for n in range(4)]
    store = StateStore(None, 2 * states[0].nbytes)
    store.keep("a", states[0])
    store.keep("b", states[1])
    assert same(store.find("a"), states[0])
    store.keep("c", states[2])
    assert store.find("b") is None
    store.keep("a", states[3])
    assert same(store.find("a"), states[3])
    assert same(store.find("c"), states[2])
