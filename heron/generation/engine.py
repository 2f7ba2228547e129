"""The engine: prompts in parallel, then one token for every open row at each step, rows coming and going."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from heron.checkpoint.architecture import in_one_dtype
from heron.config import plain
from heron.errors import CheckpointError, ConfigError, DataError, did_you_mean
from heron.files import as_path
from heron.generation import state_files
from heron.generation.decoder import is_fusible, only_computing
from heron.generation.decoders import decoder_of
from heron.generation.drawing import DeviceDraws
from heron.generation.graphed import GraphedReader
from heron.generation.requests import Piece, Request, Snapshot, Token, Writing, check_seed
from heron.generation.sampling import Sampling, fade, increments, log_softmax, sample
from heron.generation.text import stand_for_something
from heron.model import State
from heron.tables.store import PLACES, fingerprint, off_device
from heron.tokenizer import Tokenizer
from heron.tokenizer.continuation import encode_behind

PREFILL_TOKENS = 1024  # of a prompt are read at once: enough to fill the machine, little enough to bound the memory
PREFILL_TOKENS_CUDA = 2048  # of a longer prompt on a GPU; pieces of just this length are read by a CUDA graph


class Row:
    """A sequence that an engine is writing. Made by :meth:`Engine.open`."""

    def __init__(self, number: int, token: int, sampling: Sampling, counts: Tensor | None, generator: torch.Generator):
        self.number, self.sampling = number, sampling
        self._token, self._counts, self._generator = token, counts, generator


class Engine:
    """Runs a model as an RNN, for one sequence or many at a time, at a constant cost per token.

    The weights are read from `model` when the engine is built: build a new one after training on. A v7b, v8-hybrid or
    ROSA model decodes through the model itself, row by row; its state grows as :class:`heron.State` says.

    Args:
        model: an RWKV (or a module with its `forward`, `hidden_states`, `config.vocab_size`), in the dtype to run in;
            one that mixes dtypes runs as a copy in the widest of them.
        tokenizer: the one that the model was trained with. Ids that stand for nothing in it are never drawn.
        rows: sequences that can be open at once; their states are allocated now.
        tables: where DeepEmbed tables are: "device" (with the weights), "host" (in memory, as `model` has them, or
            pinned copies for a GPU), or "disk" (in `tables_file`, mapped; once the caller lets go of `model` they take
            no memory). Rows are the same bit for bit, and fetched once per token for all layers.
        tables_file: of "disk"; written where it is missing.
        device: where the rest runs; None: where the model is.

    Raises:
        ConfigError: rows below 1, an unknown `tables`, or one that this model does not have; a tokenizer larger than
            the model.
        CheckpointError: `tables_file` belongs to another model or cannot be written.
        HeronError: tables on the host don't fit into memory that can be pinned.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        rows: int = 1,
        tables: str = "device",
        tables_file: str | Path | None = None,
        device: torch.device | str | None = None,
    ):
        _check_kinds(model, tokenizer)
        rows = plain(rows)
        if type(rows) is not int or rows < 1:
            raise ConfigError(f"rows: wanted a whole number from 1 on, got {rows!r}")
        if tables not in PLACES:
            raise ConfigError(f"tables: wanted {', '.join(PLACES)}, got {tables!r}.{did_you_mean(tables, PLACES)}")
        if (tables == "disk") != (tables_file is not None):
            raise ConfigError("tables: 'disk' needs a tables_file, and nothing else takes one")
        vocab_size = model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} token ids, the model only {vocab_size} (its vocab_size); "
                "give the tokenizer that the model was trained with"
            )
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._device = torch.device(device) if device is not None else next(model.parameters()).device
        self._fingerprint: str | None = None
        self._tables = None
        model = in_one_dtype(model)  # token after token, a cast at each step would cost more than the step
        self._is_fusible = is_fusible(model)
        if tables != "device":
            if not self._is_fusible:
                raise ConfigError(
                    "tables: off the device only those of a v8 or v7a model in one dtype, without ROSA; give 'device'"
                )
            self._fingerprint = fingerprint(model.state_dict())  # later there are no tables in the model
            model, self._tables = off_device(model, self._device, Path(tables_file) if tables_file else None)
        elif next(model.parameters()).device != self._device:
            raise ConfigError(f"device: with tables on the device too, move the model: model.to({str(self._device)!r})")
        self.model = model
        self._decoder = decoder_of(model, rows, self._tables)
        self._reads_by_graph = self._device.type == "cuda" and self._is_fusible and self._tables is None
        self._reader: GraphedReader | None = None
        self._draws = DeviceDraws(tokenizer, rows, self._device) if self._device.type == "cuda" else None
        self._free = list(range(rows))
        self._open: list[Row] = []
        self._is_running = False

    # -- prompts and states ---------------------------------------------------------------------------------------

    def prefill(self, ids: Sequence[int], state: State | None = None) -> State | None:
        """Read `ids` in parallel, in pieces of `PREFILL_TOKENS`, and give the state behind them; `state` is kept.

        The memory is that of one piece and one state, however long the prompt.

        Raises:
            DataError: an id outside the vocabulary.
        """
        self._check(ids)
        size = PREFILL_TOKENS_CUDA if self._device.type == "cuda" else PREFILL_TOKENS
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            if len(piece) == size and self._reads_by_graph:
                if self._reader is None:
                    self._reader = GraphedReader(self.model, size)
                state = self._reader.read(piece, state)
            else:
                _, state = self._ask(self.model.hidden_states, piece, state)
        return state.clone() if isinstance(state, State) else state  # clones are no inference tensors

    def likeliest(self, after: Snapshot, n: int) -> list[tuple[int, float]]:
        """The `n` likeliest next tokens with their probabilities, the likeliest first.

        Ids that stand for nothing in the tokenizer count for the probabilities and are not listed.
        """
        *context, token = self.prompt_ids((), after)
        logits, _ = self._ask(self.model, [token], self.prefill(context, after.state))
        probs = logits[0, -1].to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)
        ranked = probs[: self.tokenizer.vocab_size].argsort(descending=True, stable=True).tolist()
        known = (token for token in ranked if stand_for_something(self.tokenizer, [token]))
        return [(token, float(probs[token])) for token in itertools.islice(known, min(n, len(ranked)))]

    def _ask(
        self, function: Callable[[Tensor, State | None], tuple[Tensor, State]], ids: Sequence[int], state: State | None
    ) -> tuple[Tensor, State]:
        """Call the model or one of its methods on ids; table rows are there before it starts."""
        tokens = torch.tensor([list(ids)], device=self._device)
        with only_computing(self.model):
            if self._tables is not None:
                self._tables.fetch(tokens, self._device)
            return function(tokens, state)

    def prompt_ids(self, prompt: str | Sequence[int], after: Snapshot | None = None) -> list[int]:
        """The ids that are read for `prompt`, those pending in `after` first; never empty.

        A text behind a snapshot is encoded as what goes on there: :func:`heron.tokenizer.continuation.encode_behind`.

        Raises:
            ConfigError: nothing to read under a tokenizer without end of document.
            DataError: a text that cannot be encoded, an id outside the vocabulary.
        """
        pending = () if after is None else after.pending
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        is_bytes = isinstance(prompt, bytes | bytearray)  # ids under the tokenizer of bytes, a mistake under others
        if not isinstance(prompt, Iterable) or (is_bytes and self.tokenizer.spec != "bytes"):
            raise DataError(f"prompt: wanted a text or token ids, got {type(prompt).__name__}")
        if not isinstance(prompt, str):
            ids = list(prompt)
        elif pending or (after is not None and after.state is not None):
            ids = encode_behind(self.tokenizer, pending, prompt)
        else:
            ids = self.tokenizer.encode(prompt)
        ids = [*pending, *ids]
        if not ids:
            if self.tokenizer.eod is None:
                raise ConfigError(
                    "prompt: it is empty, and this tokenizer has no end-of-document token to start from; give some text"
                )
            ids = [self.tokenizer.eod]
        self._check(ids)
        return ids

    def save(self, snapshot: Snapshot, path: str | Path) -> None:
        """Write a snapshot as safetensors, every bit of it, with the model's fingerprint; another one is replaced.

        Raises:
            CheckpointError: the file cannot be written, or is there and no state file.
        """
        state_files.write(snapshot, as_path(path), self.fingerprint)

    def load(self, path: str | Path) -> Snapshot:
        """A snapshot that :meth:`save` wrote, onto this engine's device.

        Raises:
            CheckpointError: no such file, a damaged one, or one that another model (or another dtype of it) wrote.
        """
        path = as_path(path)
        tensors, model = state_files.read(path)
        if model != self.fingerprint:
            raise CheckpointError(
                f"{path}: this state belongs to another model (fingerprint {model}, this one has "
                f"{self.fingerprint}); a state fits only the weights and the dtype that made it"
            )
        parts = state_files.take_state(path, tensors, self._device)
        state_files.check_rest(path, tensors, self.tokenizer.vocab_size)
        try:
            state = State.from_list(parts) if parts else None
            if state is not None:
                state.check(self.model.config, 1)
            pending = tuple(tensors["pending"].tolist())
            self._check(pending)
        except (ConfigError, DataError) as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        return Snapshot(state, pending, tensors.get("counts"), tensors.get("generator"))

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the model's weights, names, shapes and dtypes."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model.state_dict())
        return self._fingerprint

    # -- rows -----------------------------------------------------------------------------------------------------

    def open(
        self,
        ids: Sequence[int] = (),
        after: Snapshot | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> Row:
        """Read `ids` (behind `after` and its pending ids) and take a row for what follows.

        Raises:
            ConfigError: all rows are taken, :meth:`run` is going on, a seed out of range, a state of another shape, or
                nothing at all to read under a tokenizer without end of document.
            DataError: an id outside the vocabulary.
        """
        self._refuse_while_running()
        return self._take(ids, after, sampling, seed)

    def _take(self, ids: Sequence[int], after: Snapshot | None, sampling: Sampling, seed: int) -> Row:
        if not self._free:
            raise ConfigError(f"all {len(self._open)} rows of the engine are taken; close one, or build it with more")
        check_seed(seed)
        after = after or Snapshot(None)
        *context, token = self.prompt_ids(ids, after)
        if after.state is not None and self._is_fusible:
            after.state.check(self.model.config, 1)
        state = self.prefill(context, after.state)
        generator = torch.Generator().manual_seed(int(seed))
        if after.generator is not None:
            generator.set_state(after.generator)
        counts = None
        if sampling.has_penalties:
            counts = torch.zeros(self.tokenizer.vocab_size) if after.counts is None else after.counts.clone()
        number = self._free.pop(0)
        if counts is not None and self._draws is not None:
            counts = self._draws.keep(number, counts)
        row = Row(number, token, sampling, counts, generator)
        self._decoder.write(row.number, state)
        self._open.append(row)
        return row

    def step(self) -> list[tuple[Row, Token]]:
        """Draw one token for every open row, in the order in which they were opened.

        Raises:
            ConfigError: :meth:`run` is going on.
            HeronError: the logits are not finite.
        """
        self._refuse_while_running()
        return self._advance()

    def _advance(self) -> list[tuple[Row, Token]]:
        if not self._open:
            return []
        logits = self._decoder.step([row.number for row in self._open], [row._token for row in self._open])
        logits = logits[:, : self.tokenizer.vocab_size]
        if self._draws is not None:
            settings = [(row.number, row.sampling) for row in self._open]
            generators = [row._generator for row in self._open]
            look_ahead = self._decoder.look_ahead
            try:
                drawn = self._draws.draw(settings, generators, logits, look_ahead)
            except BaseException:  # an interrupt, too
                for row in self._open if look_ahead is not None else ():
                    self._decoder.write(row.number, self._decoder.read(row.number))  # not what was looked ahead
                raise
            tokens = [(row, Token(*token)) for row, token in zip(self._open, drawn, strict=True)]
            for row, token in tokens:
                row._token = token.id
            return tokens
        logits = logits.cpu()
        return [(row, self._draw(row, logits[i])) for i, row in enumerate(self._open)]

    def snapshot(self, row: Row) -> Snapshot:
        """What `row` is at, as a copy: opened again, here or from a file, it says the same as if it had gone on."""
        self._check_open(row)
        counts = None if row._counts is None else row._counts.to("cpu", copy=True)
        state = self._decoder.read(row.number)
        return Snapshot(state and state.clone(), (row._token,), counts, row._generator.get_state())

    def close(self, row: Row) -> None:
        """Free a row for another sequence."""
        self._check_open(row)
        self._open.remove(row)
        self._free.append(row.number)

    def _check_open(self, row: Row) -> None:
        if row not in self._open:
            raise ConfigError("this row is closed, or another engine's; its number may be taken by now")

    def _draw(self, row: Row, logits: Tensor) -> Token:
        allowed = logits
        token = sample(allowed, row.sampling, row._counts, row._generator)
        while not stand_for_something(self.tokenizer, [token]):
            allowed = allowed.clone()
            allowed[token] = -math.inf
            token = sample(allowed, row.sampling, row._counts, row._generator)
        row._token = token
        if row._counts is not None:
            fade(row._counts, row.sampling.penalty_decay)
            row._counts[token] += self._increments[int(row.sampling.count_digits), token]
        return Token(token, float(log_softmax(logits)[token]))

    @functools.cached_property
    def _increments(self) -> Tensor:
        return increments(self.tokenizer)

    def _check(self, ids: Sequence[int]) -> None:
        for position, token in enumerate(ids):
            if not isinstance(token, numbers.Integral) or isinstance(token, bool):
                raise DataError(f"prompt: token {position} must be an id, a whole number, got {token!r}")
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"prompt: token {position} has id {token}, the model knows 0 to {self.vocab_size - 1} "
                    f"(vocab_size {self.vocab_size}); give the tokenizer that the model was trained with"
                )

    # -- text -----------------------------------------------------------------------------------------------------

    def run(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Continue every request, as many at a time as there are free rows; each is taken when a row is free for it.

        What a request says depends on nothing but itself. Closing the iterator frees its rows.

        Raises:
            ConfigError: rows are open already, those of another `run` among them; negative `max_tokens`, an empty stop
                text, an empty prompt under a tokenizer without end of document.
            DataError: a prompt that cannot be encoded, or an id outside the vocabulary.
        """
        self._refuse_while_running()
        if self._open:
            raise ConfigError(f"{len(self._open)} rows are open, and run would move them on; close them, or use step")
        self._is_running = True
        waiting = enumerate(requests)
        running: dict[int, tuple[Row, Writing]] = {}
        try:
            more = True
            while more or running:
                while more and self._free:
                    number, request = next(waiting, (0, None))
                    more = request is not None
                    if not more:
                        break
                    ids = self.check(request)
                    if request.max_tokens == 0:
                        yield Piece(number, "", None, "length")
                        continue
                    row = self._take(ids, request.after, request.sampling, request.seed)
                    pending = request.after.pending if request.after else ()
                    running[row.number] = row, Writing(number, request, self.tokenizer, [*pending, *ids])
                pieces = []
                for row, token in self._advance():
                    pieces.append(piece := running[row.number][1].push(token))
                    if piece.finish:
                        del running[row.number]
                        self.close(row)
                yield from pieces
        finally:
            self._is_running = False
            for row, _ in running.values():
                self.close(row)

    def _refuse_while_running(self) -> None:
        if self._is_running:
            raise ConfigError("the engine's run is going on; let it end or close it, or build another engine")

    def stream(self, request: Request) -> Iterator[str]:
        """The text that follows one request, piece by piece, each as soon as it is certain. Errors as in :meth:`run`,
        but at the call."""
        request = dataclasses.replace(request, prompt=self.check(request))
        return (piece.text for piece in self.run([request]) if piece.text)

    def check(self, request: Request) -> list[int]:
        """The ids of the request's prompt, if the request can be served. Errors as in :meth:`run`."""
        if not isinstance(request, Request):
            raise ConfigError(f"request: wanted a Request, such as Request(text), got {type(request).__name__}")
        request.check(self.tokenizer, self.vocab_size)
        ids = self.prompt_ids(request.prompt, request.after)
        return ids if request.after is None else ids[len(request.after.pending) :]


def _check_kinds(model: object, tokenizer: object) -> None:
    """ConfigError for what is no model or no tokenizer."""
    if not hasattr(model, "config") or not isinstance(model, nn.Module):
        raise ConfigError(f"model: wanted an RWKV, such as heron.load gives, got {type(model).__name__}")
    if not hasattr(tokenizer, "vocab_size") or isinstance(tokenizer, nn.Module):
        raise ConfigError(
            f"tokenizer: wanted a tokenizer, such as heron.tokenizer.load gives, got {type(tokenizer).__name__}"
        )
