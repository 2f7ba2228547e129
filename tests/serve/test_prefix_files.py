"""States of prompts in files: equal answers, restarts, the bound, damaged files, full disks, kill -9."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch

from heron import tokenizer
from heron.generation import Engine, Request, Snapshot, snapshot
from heron.model import State
from heron.serve import ServeConfig, engines, fetches, prefix_files
from heron.serve.engines import Engines
from heron.serve.orders import Order, Start
from heron.serve.prefix_cache import PrefixCache
from heron.serve.prefix_files import MOST_WAITING, Origin, PrefixFiles
from heron.serve.prefixes import prefixes
from tests.serve.running import running, until

LARGE = 1 << 30
HTTP = httpx.Client(timeout=60)  # one for all: each of its own would read all certificates
FIXED = {"seed": 1, "max_tokens": 8, "logit_bias": {"0": -100}, "logprobs": 1}


@pytest.fixture
def engine(random_model):
    return Engine(random_model(vocab_size=256), tokenizer.load("bytes"))


@pytest.fixture
def behind(engine):
    """A function: ids -> the snapshot behind them."""
    return lambda ids: Snapshot(engine.prefill(list(ids)))


@pytest.fixture
def files_of(tmp_path, engine):
    """A function: bytes, what the start is -> files in one folder, of the server that runs now."""
    made = []

    def files_of(max_bytes=LARGE, identity="base", of=engine):
        for one in made:
            one.close([], 0)
        made.append(PrefixFiles(tmp_path / "prefixes", max_bytes, lambda key: Origin(f"{identity}\n{key}", of)))
        made[-1].start()
        return made[-1]

    yield files_of
    for one in made:
        one.close([], 0)


def prefix_of(ids, start_key=""):
    return next(prefixes(ids, start_key, [len(ids)]))


def wrote(files, ids, snapshot, start_key=""):
    """The path of the file that holds the state behind `ids`."""
    prefix = prefix_of(ids, start_key)
    files.offer(prefix, snapshot)
    until(lambda: files.has(prefix))
    return files._folder / files._name_of(prefix)


def same(a, b):
    one, other = a.state.to_list(), b.state.to_list()
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(one, other, strict=True))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


# -- the files --------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_bit_for_bit_also_after_a_restart(files_of, behind):
    files, state = files_of(), behind([1, 2, 3])
    path = wrote(files, [1, 2, 3], state)
    assert files.n_bytes == path.stat().st_size
    for one in (files, files_of()):
        assert one.lengths("", 3) == {3}
        assert one.lengths("", 2) == set()
        assert same(one.read(prefix_of([1, 2, 3])), state)
        assert one.read(prefix_of([1, 2, 4])) is None
        assert one.read(prefix_of([1, 2, 3], "other")) is None
    assert names(path.parent) == [path.name]


def test_another_model_finds_nothing_and_deletes_nothing(files_of, behind):
    path = wrote(files_of(), [1, 2, 3], behind([1, 2, 3]))
    other = files_of(identity="another")
    assert other.lengths("", 9) == set()
    assert other.read(prefix_of([1, 2, 3])) is None
    assert path.exists()


def test_the_files_used_longest_ago_go_where_there_are_too_many(files_of, behind, monkeypatch):
    files, states = files_of(), {n: behind([n]) for n in range(6)}
    sizes = [wrote(files, [n], states[n]).stat().st_size for n in range(3)]
    most = sum(sizes) + sizes[0] // 2

    def there(files):
        return [n for n in states if files.has(prefix_of([n]))]

    assert files.read(prefix_of([0])) is not None  # used last, which the next server knows, too
    files, write, n_bytes = files_of(most), prefix_files.write_snapshot, []

    def noted(state, *more):
        n_bytes.append(files.n_bytes + state.nbytes)
        write(state, *more)

    monkeypatch.setattr(prefix_files, "write_snapshot", noted)
    for n, left in ((3, [0, 2, 3]), (4, [0, 3, 4])):
        wrote(files, [n], states[n])
        assert there(files) == left
        assert files.n_bytes == sum(path.stat().st_size for path in files._folder.glob("*.safetensors")) <= most
    files.offer(prefix_of([0]), states[0])  # is there already, and was in use until now
    wrote(files, [5], states[5])
    assert there(files) == [0, 4, 5]
    assert max(n_bytes) <= most  # while they are written, too
    assert there(files_of(sizes[0] // 2)) == []
    assert names(files._folder) == []


def _cut(path, data):
    path.write_bytes(data[:-7])


def _emptied(path, data):
    path.write_bytes(b"")


def _replaced(path, data):
    path.write_text("something else")


def _flipped(at):
    def flip(path, data):
        place = int(at * (len(data) - 1))
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])

    return flip


def _gone(path, data):
    path.unlink()


DAMAGE = [_cut, _emptied, _replaced, _gone, *(_flipped(at) for at in (0.0, 0.01, 0.5, 0.9, 1.0))]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_a_miss_and_goes(files_of, behind, damage):
    files, state = files_of(), behind([1, 2, 3])
    path = wrote(files, [1, 2, 3], state)
    damage(path, path.read_bytes())
    assert files.read(prefix_of([1, 2, 3])) is None
    assert names(path.parent) == []
    assert (files.n_bytes, files.lengths("", 9)) == (0, set())
    wrote(files, [1, 2, 3], state)
    assert same(files.read(prefix_of([1, 2, 3])), state)


def test_a_file_under_another_ones_name_is_a_miss(files_of, behind):
    files = files_of()
    one, other = (wrote(files, [n], behind([n])) for n in (1, 2))
    shutil.copyfile(one, other)
    assert files.read(prefix_of([2])) is None
    assert names(one.parent) == [one.name]


def test_a_file_of_another_architecture_is_a_miss(files_of, behind, random_model):
    path = wrote(files_of(), [1], behind([1]))
    other = Engine(random_model(vocab_size=256, n_layer=2), tokenizer.load("bytes"))
    files = files_of(of=other)
    assert files.read(prefix_of([1])) is None
    assert not path.exists()


def test_what_is_not_ours_stays(files_of, behind, tmp_path):
    path = wrote(files_of(), [1], behind([1]))
    folder, target = path.parent, tmp_path / "target"
    target.write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "mine.safetensors").write_text("mine")
    (folder / path.name.replace("-1-", "-2-")).symlink_to(target)
    (folder / path.name.replace("-1-", "-3-")).mkdir()
    before = names(folder)
    (folder / f".tmp-0a-{path.name}").write_text("torn")
    files = files_of(1)
    assert files.n_bytes == 0
    assert names(folder) == [name for name in before if name != path.name]
    assert target.read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_turns_them_off_with_one_line(files_of, behind, monkeypatch, caplog, code):
    files, tries = files_of(), []
    wrote(files, [1], behind([1]))

    def full(*arguments):
        tries.append(arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(snapshot.safetensors, "write", full)
    for n in (2, 3):
        files.offer(prefix_of([n]), behind([n]))
    until(lambda: bool(caplog.records))
    files.offer(prefix_of([4]), behind([4]))
    files.close([(prefix_of([5]), behind([5]))], time.monotonic() + 10)
    assert len(tries) == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert os.strerror(code) in caplog.text
    assert files.lengths("", 9) == set()
    assert files.read(prefix_of([1])) is None
    assert len(names(files._folder)) == 1


def test_nobody_waits_for_the_disk_and_what_is_too_much_is_dropped(files_of, behind, monkeypatch):
    files, state, goes_on, n_written, waited = files_of(), behind([1]), threading.Event(), [], []

    def slow(*arguments):
        n_written.append(arguments)
        waited.append(goes_on.wait(30))

    monkeypatch.setattr(prefix_files, "write_snapshot", slow)
    cache = PrefixCache(0, state.nbytes, files)
    for n in range(3 * MOST_WAITING):
        cache.keep([n], state)
        assert cache.find([n, 1])[1] == 1
        assert cache.only_in_file([n + 1, 1]) is None
    assert waited == []
    assert len(files._waiting) == MOST_WAITING
    files._folder.rename(files._folder.with_name("away"))  # then nothing is there to be looked at
    goes_on.set()
    until(lambda: files._is_off)
    assert len(n_written) == 1


def test_a_folder_is_for_one_server(files_of, tmp_path, engine, caplog):
    files_of()
    config = ServeConfig(name="tiny", state_dir=str(tmp_path))
    offered = Engines(config, engine, {}, {})
    assert "another server keeps states there" in caplog.text
    assert offered.cache_levels()["disk"].n_bytes == 0


def _write_forever(files, snapshots):
    while True:
        for n, one in enumerate(snapshots):
            files._write(prefix_of([n]), one)
            files._delete([files._name_of(prefix_of([n - 1 if n else len(snapshots) - 1]))])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_it_writes_a_process_leaves_no_file_that_is_read_wrong(files_of, behind):
    snapshots, chance, n_killed, n_left = [behind([n]) for n in range(3)], random.Random(0), 0, 0
    while n_killed < 12 or n_left == 0:  # one at least in the middle, however busy the machine
        files, n_killed = files_of(), n_killed + 1
        writing = multiprocessing.get_context("fork").Process(target=_write_forever, args=(files, snapshots))
        writing.start()
        until(lambda folder=files._folder: len(names(folder)) > 0)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(writing.pid, signal.SIGKILL)
        writing.join()
        n_left += sum(name.startswith(".tmp") for name in names(files._folder))
        files = files_of()
        assert not any(name.startswith(".tmp") for name in names(files._folder))
        for n, one in enumerate(snapshots):
            found = files.has(prefix_of([n])) and files.read(prefix_of([n]))
            assert not found or same(found, one)
            assert files.has(prefix_of([n])) == bool(found)  # none was damaged


# -- in the cache -----------------------------------------------------------------------------------------------------


def test_what_falls_out_of_memory_is_found_in_its_file(files_of, behind):
    states = {n: behind([n, 7, 8]) for n in range(4)}
    size, files = states[0].nbytes, files_of()
    cache = PrefixCache(size, size, files)
    for n, state in states.items():
        cache.keep([n, 7, 8], state)
    until(lambda: len(names(files._folder)) == 2)
    assert cache.find([0, 7, 8, 9]) is None
    assert cache.only_in_file([3, 7, 8, 9]) is None
    assert cache.only_in_file([2, 7, 8, 9]) is None
    assert cache.only_in_file([0, 7]) is None
    prefix = cache.only_in_file([0, 7, 8, 9])
    assert prefix == prefix_of([0, 7, 8])
    cache.fetch(prefix)
    assert cache.only_in_file([0, 7, 8, 9]) is None  # in memory, too
    for _ in range(2):
        found, n = cache.find([0, 7, 8, 9])
        assert n == 3
        assert same(found, states[0])
    assert {name: level.hits for name, level in cache.levels().items()} == {"device": 1, "host": 0, "disk": 1}
    assert cache.find([3, 7, 8])[1] == 3
    assert cache.levels()["host"].hits == 1
    cache.keep([0], behind([0]))
    assert cache.only_in_file([0, 9]) is None  # a shorter one, in memory


def test_at_the_end_what_is_in_memory_is_written_newest_first(files_of, behind):
    states = {n: behind([n]) for n in range(6)}

    def there(files):
        return [n for n in states if files.has(prefix_of([n]))]

    files = files_of()
    size = wrote(files, [9], states[0]).stat().st_size
    for most, until_, left in ((LARGE, 30, [0, 1, 2, 3, 4, 5]), (3 * size, 30, [3, 4, 5]), (LARGE, -1, [])):
        files._delete(names(files._folder))
        files = files_of(most)
        cache = PrefixCache(2 * states[0].nbytes, LARGE, files)
        for n, state in states.items():
            cache.keep([n], state)
        cache.close(time.monotonic() + until_)
        cache.close(time.monotonic() + until_)
        assert there(files) == left
        assert there(files_of(2 * size)) == left[-2:]
    files = files_of(4 * size)
    PrefixCache(LARGE, LARGE, files).close(0)


# -- behind HTTP ------------------------------------------------------------------------------------------------------


def said(address, text, **more):
    answer = HTTP.post(f"{address}/v1/completions", json={"prompt": text, **FIXED, **more})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    details = body["usage"].get("prompt_tokens_details") or {}
    return body["choices"], details.get("cached_tokens", 0)


def chat(address, words):
    messages = [{"role": "user", "content": words}]
    answer = HTTP.post(f"{address}/v1/chat/completions", json={"messages": messages, **FIXED, "logprobs": True})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"], answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def hits(address):
    lines = HTTP.get(f"{address}/metrics").text.splitlines()
    return {line.split('"')[1]: float(line.split()[1]) for line in lines if line.startswith("heron_prefix_hits_total")}


def test_answers_are_the_same_with_files_and_without(engine_of, tmp_path, monkeypatch):
    one = engine_of(2)
    monkeypatch.setattr(engines, "_MIB", one.prefill([1]).nbytes)  # so that memory has room for two states
    with running(engine_of(2), cache_device=0, cache_host=0) as address:
        wanted = [chat(address, f"{n} and more")[0] for n in range(5)]
    with running(one, cache_device=1, cache_host=1, cache_disk=64, state_dir=str(tmp_path)) as address:
        for again in (False, True):
            for n in range(5):
                answer, n_cached = chat(address, f"{n} and more")
                assert answer == wanted[n]
                assert bool(n_cached) == again
                n_gone = 8 if again else 2 * n  # of two states a chat
                until(lambda n=n_gone: len(names(tmp_path / engines.PREFIXES)) >= n)
        assert hits(address)["disk"] == 5


def test_after_a_restart_another_prompt_alone_is_read(engine_of, tmp_path, random_model):
    def server(which, **more):
        return running(which, name="renamed", state_dir=str(tmp_path), grace=20.0, **more)

    with running(engine_of(2), state_dir=str(tmp_path), grace=20.0) as address:
        wanted = chat(address, "hello")
        assert wanted[1] == 0
        HTTP.post(f"{address}/v1/completions", json={"prompt": "a", **FIXED, "session_id": "talk"}).raise_for_status()
        HTTP.post(f"{address}/v1/states", json={"name": "kept", "session_id": "talk"}).raise_for_status()
        said = HTTP.post(f"{address}/v1/responses", json={"input": "hello", "max_output_tokens": 2}).json()
    with server(engine_of(2)) as address:
        answer, n_cached = chat(address, "hello")
        assert answer == wanted[0]
        assert n_cached > 10
        assert hits(address) == {"device": 0, "host": 0, "disk": 1}
        assert [one["id"] for one in HTTP.get(f"{address}/v1/states").json()["data"]] == ["kept"]
        for place, lost in (
            ("responses", {"input": "and?", "previous_response_id": said["id"]}),
            ("states", {"name": "late", "response_id": said["id"]}),
        ):
            refused = HTTP.post(f"{address}/v1/{place}", json=lost)
            assert (refused.status_code, said["id"] in refused.text) == (404, True)
            assert "in the server's memory alone" in refused.json()["error"]["message"]
    other = Engine(random_model(seed=1, vocab_size=256), tokenizer.load("bytes"), 2)
    with server(other) as address:
        assert chat(address, "hello")[1] == 0
    with server(engine_of(2), cache_disk=0) as address:
        assert chat(address, "hello")[1] == 0
    for path in (tmp_path / engines.PREFIXES).glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with server(engine_of(2)) as address:
        assert chat(address, "hello") == (wanted[0], 0)


def tuned(model, seed):
    state, generator = State.zeros(model.config, 1, "cpu", torch.float32), torch.Generator().manual_seed(seed)
    for layer in state.layers:
        layer.wkv.normal_(0, 1, generator=generator)
    return state


def test_a_name_that_stands_for_another_start_finds_none_of_the_first(engine_of, random_model, monkeypatch):
    def origins(engine, others=None, states=None):
        offered = Engines(ServeConfig(name="tiny"), engine, others or {}, states or {})
        return {name: offered._origin_of(name).identity for name in offered.offers}

    one = engine_of(1)
    first = origins(one, {"a": one}, {"poet": tuned(one.model, 1), "clerk": tuned(one.model, 2)})
    assert first["tiny"] == first["tiny:a"]
    assert len(set(first.values())) == 3
    again = origins(one, {"poet": one}, {"a": tuned(one.model, 1)})
    assert again["tiny:a"] == first["tiny:poet"]
    begun = Engine(one.model, tokenizer.load("bytes"), start=tuned(one.model, 1))
    other = Engine(random_model(seed=1, vocab_size=256), tokenizer.load("bytes"))
    assert not {origins(begun)["tiny"], origins(other)["tiny"]} & {first["tiny"], first["tiny:clerk"]}
    monkeypatch.setattr(begun, "documents", SimpleNamespace(hash="of other documents"))
    assert origins(begun) != origins(Engine(one.model, tokenizer.load("bytes"), start=tuned(one.model, 1)))
    offered = Engines(ServeConfig(name="tiny"), one, {}, {})
    assert offered._origin_of("tiny\nmine\n1").identity != offered._origin_of("tiny\nmine\n2").identity


class Noting:
    """A scheduler that notes what is asked of it."""

    def __init__(self):
        self.asked = []

    def submit(self, *orders):
        self.asked.append(("submit", [order.number for order in orders]))

    def cancel(self, number):
        self.asked.append(("cancel", number))


class Waits:
    """A cache that has one state in a file, which takes a while to read."""

    def __init__(self, fails):
        self._fails, self.goes_on = fails, threading.Event()

    def only_in_file(self, ids, start_key):
        return prefix_of([1]) if ids[0] == 1 else None

    def fetch(self, prefix):
        self.goes_on.wait(30)
        if self._fails:
            raise RuntimeError("no memory")


@pytest.mark.parametrize("fails", [False, True])
def test_an_order_that_waits_for_a_file_holds_up_none_and_can_be_cancelled(fails, caplog):
    cache, scheduler = Waits(fails), Noting()
    taken = fetches.Fetches(cache)
    waits, gone, other = (Order(Request(ids), 1.0, Start()) for ids in ((1, 2), (1, 2), (2, 2)))
    taken.submit(scheduler, [waits])
    taken.submit(scheduler, [gone])
    taken.submit(scheduler, [other])
    taken.cancel(scheduler, gone.number)
    taken.cancel(scheduler, other.number)
    assert scheduler.asked == [("submit", [other.number]), ("cancel", other.number)]
    cache.goes_on.set()
    taken.close()
    rest = scheduler.asked[2:]
    assert sorted(rest, key=str) == sorted(
        [("submit", [waits.number]), ("submit", [gone.number]), ("cancel", gone.number)], key=str
    )
    assert rest.index(("submit", [gone.number])) < rest.index(("cancel", gone.number))
    assert bool(caplog.records) == fails
    taken.submit(scheduler, [waits])
    assert scheduler.asked[-1] == ("submit", [waits.number])
