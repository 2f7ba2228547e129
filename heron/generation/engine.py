"""The engine: prompts are read in pieces, and between two pieces every sequence that is being written gets a token."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import threading
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from heron import machine
from heron.checkpoint.architecture import in_one_dtype
from heron.errors import ConfigError, HeronError
from heron.files import as_path
from heron.generation.checks import check_parts, check_tables, checked_number, in_bf16
from heron.generation.decoder import is_fusible
from heron.generation.decoders import decoder_of
from heron.generation.drawing import DeviceDraws, HostDraws
from heron.generation.incoming import Incoming
from heron.generation.next_tokens import next_tokens
from heron.generation.prefill import PromptReader
from heron.generation.requests import OpenSequence, Piece, Request, check_ids, check_marks, check_seed, prompt_ids
from heron.generation.sampling import Sampling, Token, check_finite
from heron.generation.snapshot import Snapshot, read_snapshot, write_snapshot
from heron.generation.text import TextWriter, stand_for_something
from heron.model import RWKV, State
from heron.model.memory import Documents
from heron.ops.rosa import TokenIndex
from heron.tables.store import fingerprint, off_device
from heron.tokenizer import Tokenizer

PREFILL_TOKENS = 1024  # of a prompt are read at once: enough to fill the machine, little enough to bound the memory
PREFILL_TOKENS_CUDA = 2048  # of a longer prompt on a GPU


class Engine:
    """Runs a model as an RNN, for one sequence or many at a time, at a constant cost per token.

    The weights are read from `model` when the engine is built: build a new one after training on. A v7b, v8-hybrid or
    model with ROSA layers decodes through the model itself, sequence by sequence; its state grows as
    :class:`heron.State` says.
    Threads may share an engine: what they ask of it is done one after another.

    Args:
        model: an RWKV (or a module with its `forward`, `hidden_states`, `config.vocab_size`), in the dtype to run in;
            one that mixes dtypes runs as a copy in the widest of them.
        tokenizer: the one that the model was trained with. Ids that stand for nothing in it are never drawn.
        rows: sequences that can be open at once; their states are allocated now, on a GPU most often twice.
        tables: where DeepEmbed tables are: "device" (with the weights), "host" (in memory, as `model` has them, or
            pinned copies for a GPU), or "disk" (in `tables_file`, mapped; once the caller lets go of `model` they take
            no memory). Their rows are the same bit for bit, and fetched once per token for all layers.
        tables_file: of "disk"; written where it is missing.
        device: where the rest runs; None: where the model is.
        documents: an index that a ROSA memory looks into beside what each sequence has read, see
            :class:`heron.model.memory.Documents`; None: none.
        start: what every sequence begins from that goes on from nothing, such as a tuned state, batch size 1; None:
            zeros.
        packed: prompts whose short pieces are read in one pass, which for ten tokens takes a GPU about as long as for
            hundreds; their states are there twice meanwhile. Above 1 the rounding of a text depends on which they are.
            For v7, v7a and v8 without ROSA memory and without hooks; others are read one by one.
        fit_steps: whether a step on a GPU computes as many places as are written in, in powers of two, not all: few
            sequences are then as fast as in an engine with few. The rounding of a text depends on what is beside it.
        states: "fp32", or "bf16", rounded at random: on a GPU many sequences are faster. Of v7, v7a and v8.

    Raises:
        ConfigError: rows or packed below 1, an unknown `tables`, or one that this model does not have; a tokenizer
            larger than the model; a `start` of another model.
        CheckpointError: `tables_file` belongs to another model or cannot be written.
        HeronError: tables on the host don't fit into memory that can be pinned.
    """

    def __init__(
        self,
        model: RWKV,
        tokenizer: Tokenizer,
        rows: int = 1,
        tables: str = "device",
        tables_file: str | Path | None = None,
        device: torch.device | str | None = None,
        documents: TokenIndex | None = None,
        start: State | None = None,
        packed: int = 1,
        fit_steps: bool = False,
        states: str = "fp32",
    ):
        check_parts(model, tokenizer)
        check_tables(tables, tables_file)
        rows, packed = checked_number("rows", rows), checked_number("packed", packed)
        if start is not None:
            start.check(model.config, 1)
        self.tokenizer, self.vocab_size = tokenizer, model.config.vocab_size
        self._device = next(model.parameters()).device if device is None else machine.numbered(device)
        self._start = None if start is None else start.to(self._device)
        self._fingerprint: str | None = None
        moved = None
        model = in_one_dtype(model)  # token after token, a cast at each step would cost more than the step
        self._is_fusible = is_fusible(model)
        if tables != "device":
            if not self._is_fusible:
                raise ConfigError(
                    "tables: off the device only those of a v8 or v7a model in one dtype, without ROSA; give 'device'"
                )
            self._fingerprint = fingerprint(model.state_dict())  # later there are no tables in the model
            model, moved = off_device(model, self._device, Path(tables_file) if tables_file else None)
        elif next(model.parameters()).device != self._device:
            raise ConfigError(f"device: with tables on the device too, move the model: model.to({str(self._device)!r})")
        self.model = model
        self.documents = None if documents is None else Documents(documents, model.config)
        self._decoder = decoder_of(model, rows, moved, self.documents, fit_steps, in_bf16(states))
        is_cuda = self._device.type == "cuda"
        n_at_once = PREFILL_TOKENS_CUDA if is_cuda else PREFILL_TOKENS
        most_packed = packed if self._is_fusible and model.config.memory is None else 1
        self._reader = PromptReader(model, self._device, n_at_once, moved, self.documents, most_packed)
        self._draws = DeviceDraws(tokenizer, rows, self._device) if is_cuda else HostDraws(tokenizer)
        self._open: list[OpenSequence] = []  # of those with a prompt to read, the first gets the next piece
        self._free = list(range(rows))  # places; one statement changes both, so that no interrupt loses one
        self._is_running = False
        self._lock = threading.RLock()  # of the model, the decoder and everything above

    # -- prompts and states ---------------------------------------------------------------------------------------

    def prefill(self, ids: Sequence[int], state: State | None = None) -> State | None:
        """Read `ids` in parallel, in pieces of `PREFILL_TOKENS`, and give the state behind them; `state` is kept.

        The memory is that of one piece and one state, however long the prompt.

        Raises:
            DataError: an id outside the vocabulary.
        """
        check_ids(ids, self.vocab_size)
        state = self._start if state is None else state
        state = state.fork() if ids and isinstance(state, State) else state
        for start in range(0, len(ids), self._reader.size):
            with self._lock:
                state = self._reader.read(ids[start : start + self._reader.size], state)
        return state.clone() if isinstance(state, State) else state  # clones are no inference tensors

    def embed(self, prompt: str | Sequence[int]) -> Tensor:
        """The mean of the last hidden states (behind ln_out) of the prompt's ids, of length 1: (C,) fp32 on the host.

        Raises:
            ConfigError, DataError: as :meth:`prompt_ids`.
            HeronError: it is not finite.
        """
        ids, state, total = self.prompt_ids(prompt), self._start, torch.zeros(())
        for start in range(0, len(ids), self._reader.size):
            with self._lock:
                hidden, state = self._reader.hidden(ids[start : start + self._reader.size], state)
            total = total + hidden.float().sum(dim=0).cpu()
        mean = total / len(ids)
        check_finite(mean)
        return F.normalize(mean, dim=0)

    def likeliest(self, after: Snapshot, n: int) -> list[tuple[int, float]]:
        """The `n` likeliest next tokens with their probabilities, the likeliest first.

        Ids that stand for nothing in the tokenizer count for the probabilities and are not listed.
        """
        *context, token = self.prompt_ids((), after)
        state = self.prefill(context, after.state)
        with self._lock:
            logits = self._reader.logits(token, state)
        probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)
        ranked = probs[: self.tokenizer.vocab_size].argsort(descending=True, stable=True).tolist()
        known = (token for token in ranked if stand_for_something(self.tokenizer, [token]))
        return [(token, float(probs[token])) for token in itertools.islice(known, min(n, len(ranked)))]

    def prompt_ids(self, prompt: str | Sequence[int], after: Snapshot | None = None) -> list[int]:
        """The ids that are read for `prompt`, those pending in `after` first; never empty.

        A text behind a snapshot is encoded as what goes on there: :func:`heron.tokenizer.continuation.encode_behind`.

        Raises:
            ConfigError: nothing to read under a tokenizer without end of document.
            DataError: a text that cannot be encoded, an id outside the vocabulary.
        """
        return prompt_ids(prompt, after, self.tokenizer, self.vocab_size)

    def check(self, request: Request) -> list[int]:
        """The ids of the request's prompt, if the request can be served. Errors as in :meth:`run`."""
        ids = self._checked(request)
        return ids if request.after is None else ids[len(request.after.pending) :]

    def _checked(self, request: Request) -> list[int]:
        """The ids that are read for a request, those pending first, if it can be served."""
        if not isinstance(request, Request):
            raise ConfigError(f"request: wanted a Request, such as Request(text), got {type(request).__name__}")
        request.check(self.tokenizer, self.vocab_size)
        ids = self.prompt_ids(request.prompt, request.after)
        check_marks(request.marks, len(ids) - (0 if request.after is None else len(request.after.pending)))
        return ids

    def save(self, snapshot: Snapshot, path: str | Path) -> None:
        """Write a snapshot as safetensors, every bit of it, with the model's fingerprint; another one is replaced.

        Raises:
            CheckpointError: the file cannot be written, or is there and no state file.
        """
        write_snapshot(snapshot, as_path(path), self.fingerprint)

    def load(self, path: str | Path) -> Snapshot:
        """A snapshot that :meth:`save` wrote, onto this engine's device.

        Raises:
            CheckpointError: no such file, a damaged one, or one that another model (or another dtype of it) wrote.
        """
        config, n_ids = self.model.config, self.tokenizer.vocab_size
        return read_snapshot(as_path(path), self.fingerprint, config, n_ids, self._device)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the model's weights, names, shapes and dtypes."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model.state_dict())
        return self._fingerprint

    # -- sequences ------------------------------------------------------------------------------------------------

    @property
    def n_free(self) -> int:
        """How many more sequences can be opened or added now."""
        return len(self._free)

    def open(
        self,
        ids: Sequence[int] = (),
        after: Snapshot | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> OpenSequence:
        """Read `ids` (behind `after` and its pending ids) now, and take a place for what follows.

        Raises:
            ConfigError: the engine is full, :meth:`run` is going on, a seed out of range, a state of another shape, or
                nothing at all to read under a tokenizer without end of document.
            DataError: an id outside the vocabulary.
        """
        check_seed(seed)
        request = Request(sampling=sampling, seed=seed, after=after)
        ids = self.prompt_ids(ids, after)
        with self._lock:
            self._refuse_while_running()
            sequence = self._join(ids, request, TextWriter(self.tokenizer, ids))
            try:
                while not sequence.is_read:
                    self._read_pieces([sequence])
            except BaseException:  # an interrupt, too
                self.close(sequence)
                raise
        return sequence

    def add(self, request: Request) -> OpenSequence:
        """Take a place for a request, whose prompt the next steps read, a piece at each.

        The prompts that wait take turns, in order of arrival: a short one is never held up by a long one for more than
        a piece, and each gets on however many come. What a step draws is for :attr:`OpenSequence.text`:
        ``sequence.text.push(token.id)``; close the sequence once that has a `finish`, or before, to cancel it.

        Raises:
            ConfigError: the engine is full, :meth:`run` is going on, no token is wanted, and as :meth:`run`.
            DataError: as :meth:`run`.
        """
        with self._lock:
            self._refuse_while_running()
            return self._add(request)

    def _add(self, request: Request) -> OpenSequence:
        ids = self._checked(request)
        if request.max_tokens == 0:
            raise ConfigError("max_tokens: wanted at least 1 of a request that takes a place, got 0")
        text = TextWriter(self.tokenizer, ids, request.stop, request.stop_ids, request.max_tokens)
        return self._join(ids, request, text)

    def _join(self, ids: list[int], request: Request, text: TextWriter) -> OpenSequence:
        """Take a place for a sequence that reads `ids`, those pending in `request.after` first."""
        after, state, extras = request.after or Snapshot(None), self._start, request.extras(self.tokenizer)
        with self._lock:
            if not self._free:
                raise ConfigError(f"the engine is full (rows={len(self._open)}); close a sequence, or give more rows")
            if after.state is not None:
                state = after.state
                if self._is_fusible:
                    state.check(self.model.config, 1)
            generator = torch.Generator().manual_seed(int(request.seed))
            if after.generator is not None:
                generator.set_state(after.generator)
            place, counts = self._free[0], None
            if request.sampling.has_penalties:
                counts = self._draws.keep(place, after.counts)
            state = state.fork() if isinstance(state, State) else state
            sequence = OpenSequence(place, ids, state, request, extras, counts, generator, text)
            if sequence.is_read:
                self._decoder.write(place, state)
            self._open, self._free = [*self._open, sequence], self._free[1:]
        return sequence

    def _read_pieces(self, waiting: Sequence[OpenSequence]) -> list[OpenSequence]:
        """Read the next piece of the first sequence's prompt, and of others with it where the reader packs them.

        Gives those that were read. Behind the last piece of a prompt the decoder goes on.
        """
        lengths = [min(self._reader.size, one.n_readable) for one in waiting]
        taken = self._reader.packable(lengths)
        turn, lengths = [waiting[i] for i in taken], [lengths[i] for i in taken]
        pieces = [one.unread[:n] for one, n in zip(turn, lengths, strict=True)]
        states = self._reader.read_packed(pieces, [one.state for one in turn])
        for sequence, n, state in zip(turn, lengths, states, strict=True):
            if n == len(sequence.unread) - 1:
                self._decoder.write(sequence.place, state)
            sequence.has_read(n, state)
        return turn

    def step(self) -> list[tuple[OpenSequence, Token | HeronError]]:
        """Read a piece of one prompt that waits, then draw a token for every sequence whose prompt was read.

        With `packed`, short pieces of several prompts are read, together as many tokens as one long piece.
        On a GPU the next step has often begun by the time the tokens are given. Sequences that come then join the one
        after it: no token is drawn for them until then.

        Gives them in order of place. A sequence that cannot go on is closed, and gets an error in place of a token: its
        logits are not finite, or its constraint fails. Where drawing is interrupted, all that are drawn for are closed.

        Raises:
            ConfigError: :meth:`run` is going on.
        """
        with self._lock:
            self._refuse_while_running()
            return self._step()

    def _step(self) -> list[tuple[OpenSequence, Token | HeronError]]:
        with self._lock:
            if waiting := [one for one in self._open if len(one.unread) > 1]:
                turn = self._read_pieces(waiting)
                self._open = [*(one for one in self._open if one not in turn), *turn]
            # By place: a decoder with no place free then need not bring its logits into another order.
            writing = sorted((one for one in self._open if one.is_read), key=operator.attrgetter("place"))
            if not writing:
                return []
            try:
                drawn = next_tokens(self._decoder, self._draws, writing, self.tokenizer.vocab_size)
            except BaseException:  # an interrupt, too: their tokens may have been read, and would be read again
                for one in writing:
                    self.close(one)
                raise
            for one, token in drawn:
                if isinstance(token, HeronError):
                    self.close(one)
            return drawn

    def snapshot(self, sequence: OpenSequence) -> Snapshot:
        """What `sequence` is at, as a copy: opened again, here or from a file, it says the same as if it had gone on.

        Raises:
            ConfigError: the sequence is closed, or another engine's.
        """
        with self._lock:
            self._check_open(sequence)
            counts = None if sequence.counts is None else sequence.counts.clone()  # no wait for the device
            state = self._decoder.read(sequence.place) if sequence.is_read else sequence.state
            return Snapshot(state and state.clone(), tuple(sequence.unread), counts, sequence.generator.get_state())

    def close(self, sequence: OpenSequence) -> None:
        """Free the place of a sequence at once, whatever is still to be read or drawn: the end, or a cancellation.

        Raises:
            ConfigError: the sequence is closed, or another engine's.
        """
        with self._lock:
            self._check_open(sequence)
            self._open, self._free = [one for one in self._open if one is not sequence], [*self._free, sequence.place]
            self._decoder.free(sequence.place)
            sequence.end()

    def _check_open(self, sequence: OpenSequence) -> None:
        if not isinstance(sequence, OpenSequence):
            raise ConfigError(f"sequence: wanted what open or add gave, got {type(sequence).__name__}")
        if not sequence.is_open:
            raise ConfigError("this sequence is closed; its place may be taken by now")
        if sequence not in self._open:
            raise ConfigError("this sequence is another engine's; ask the one that opened it")

    # -- requests -------------------------------------------------------------------------------------------------

    def run(self, requests: Iterable[Request]) -> Generator[Piece]:
        """Continue every request, as many at a time as there are places; each is taken when a place is free for it.

        What a request says depends on nothing but itself. An iterable that is no list or tuple is asked in a thread of
        its own, so that a request that is still to come (from a pipe, say) holds up no text; what it raises is raised
        here. Closing the iterator frees its places.

        Raises:
            ConfigError: sequences are open already, those of another `run` among them; negative `max_tokens`, an empty
                stop text, an empty prompt under a tokenizer without end of document.
            DataError: a prompt that cannot be encoded, or an id outside the vocabulary.
            HeronError: the logits of one are not finite, or its constraint fails.
        """
        if isinstance(requests, Request) or not isinstance(requests, Iterable):
            raise ConfigError(f"requests: wanted several, as in run([request]), got {type(requests).__name__}")
        with self._lock:
            self._refuse_while_running()
            if self._open:
                raise ConfigError(f"{len(self._open)} sequences are open, which run would move on; close them, or step")
            self._is_running = True
        try:
            with contextlib.closing(Incoming(requests)) as incoming:
                yield from self._answers(incoming)
        finally:
            with self._lock:
                self._is_running = False
                for sequence in self._open:
                    self.close(sequence)

    def _answers(self, incoming: Incoming[Request]) -> Generator[Piece]:
        numbers, n_taken = {}, 0
        while numbers or not incoming.is_over:
            for request in incoming.take(self.n_free, wait=not numbers):
                if isinstance(request, Request) and request.max_tokens == 0:
                    self.check(request)
                    yield Piece(n_taken, "", None, "length")
                else:
                    numbers[self._add(request)] = n_taken
                n_taken += 1
            pieces = []
            for sequence, token in self._step():
                if isinstance(token, HeronError):
                    raise token
                text = sequence.text.push(token.id)
                pieces.append(Piece(numbers[sequence], text, token, sequence.text.finish))
                if sequence.text.finish:
                    del numbers[sequence]
                    self.close(sequence)
            yield from pieces

    def _refuse_while_running(self) -> None:
        if self._is_running:
            raise ConfigError("the engine's run is going on; let it end or close it, or build another engine")

    def stream(self, request: Request) -> Generator[str]:
        """The text that follows one request, each piece once it is certain. Errors as :meth:`run`, at the call."""
        request = dataclasses.replace(request, prompt=self.check(request))
        return (piece.text for piece in self.run([request]) if piece.text)
