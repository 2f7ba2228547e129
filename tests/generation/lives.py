"""Sequences that come to an engine, are written beside others, and go, each in its own way."""

from __future__ import annotations

import torch

from heron.generation import Request, Sampling


class Even:
    """Allows ids that are even at one token and odd at the next."""

    is_over = False

    def __init__(self, n_ids):
        self.n_ids, self.at = n_ids, 0

    def allowed(self):
        return torch.arange(self.n_ids) % 2 == self.at

    def accept(self, token):
        assert token % 2 == self.at
        self.at = 1 - self.at


def lives(chance, n, n_ids=37):
    """For n sequences: the request of each, the step at which it joins, and how it ends (stop text, limit, cancel)."""
    return [
        (
            dict(
                prompt=[chance.randrange(n_ids) for _ in range(chance.randint(1, 5))],
                max_tokens=chance.choice((1, 2, 9, 25)),
                sampling=Sampling(chance.choice((0, 1.0)), 0.95, presence_penalty=chance.choice((0, 0.3))),
                stop=tuple(str(chance.randrange(n_ids)) for _ in range(chance.choice((0, 3)))),
                seed=number,
                logit_bias={5: 1.5} if chance.random() < 0.3 else {},
                logprobs=chance.choice((None, 2)),
            ),
            chance.random() < 0.3,  # constrained
            chance.randrange(40),  # the step at which it comes
            chance.choice((None, None, 4)),  # cancelled behind so many tokens
        )
        for number in range(n)
    ]


def lived(engine, some):
    """Of each: its tokens, its text, and what it is at behind its last token, taken while a step may be ahead."""
    said, coming, going, step = {}, sorted(enumerate(some), key=lambda life: life[1][2]), {}, 0
    while coming or going:
        while coming and engine.n_free and coming[0][1][2] <= step:
            number, (wanted, is_constrained, _, cancelled) = coming.pop(0)
            constraint = Even(engine.vocab_size) if is_constrained else None
            going[engine.add(Request(**wanted, constraint=constraint))] = number, cancelled
            said[number] = [], [], None
        for sequence, token in engine.step():
            number, cancelled = going[sequence]
            tokens, pieces, _ = said[number]
            tokens.append(token)
            pieces.append(sequence.text.push(token.id))
            if sequence.text.finish or len(tokens) == cancelled:
                said[number] = tokens, [*pieces, sequence.text.finish], engine.snapshot(sequence)
                engine.close(sequence)
                del going[sequence]
        step += 1
    return said
