"""The next token of each sequence that is being written, with the step after it begun meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from heron.errors import HeronError
from heron.generation.decoder import Decoder
from heron.generation.drawing import DeviceDraws, HostDraws
from heron.generation.requests import OpenSequence
from heron.generation.sampling import Token


def next_tokens(
    decoder: Decoder, draws: DeviceDraws | HostDraws, writing: Sequence[OpenSequence], n_ids: int
) -> list[tuple[OpenSequence, Token | HeronError]]:
    """Draw a token, or the error that ends it, for each of `writing`, and note it there.

    Where a step of some of them has begun ahead, for these alone: the others join the step that is begun now.

    Args:
        n_ids: those that can be drawn are below it.
    """
    ahead = decoder.ahead
    turn = [one for one in writing if one.place in ahead] or writing
    joining = {one.place: one.unread[0] for one in writing if one.place not in ahead} if turn is not writing else {}
    places = [one.place for one in turn]
    logits = decoder.step(places, [one.unread[0] for one in turn])[:, :n_ids]
    drawn = draws.draw(turn, logits, decoder.look_ahead(places, joining))
    for one, token in zip(turn, drawn, strict=True):
        if not isinstance(token, HeronError):
            one.go_on(token.id)
    if decoder.longest is not None:
        for i, (token, match) in enumerate(zip(drawn, decoder.longest, strict=True)):
            if isinstance(token, Token) and match.length > 0 and match.predicted == token.id:
                drawn[i] = token._replace(match=match)
    return list(zip(turn, drawn, strict=True))
