import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heron import strict_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_what_is_json_is_read(value, ascii_only):
    assert strict_json.loads(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")) == value


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_a_value_error(data):
    try:
        value = strict_json.loads(data)
    except ValueError:
        return
    assert json.loads(data) == value


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_depth_is_bounded_exactly(opening):
    levels = opening.count(b"[") + opening.count(b"{")
    closing = b"".join({ord("["): b"]", ord("{"): b"}"}.get(byte, b"") for byte in reversed(opening))
    deepest = strict_json.DEEPEST // levels
    strict_json.loads(opening * deepest + b"1" + closing * deepest)
    for count in (deepest + 1, 100_000):
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            strict_json.loads(opening * count + b"1" + closing * count)


def test_brackets_in_strings_and_beside_each_other_are_not_depth():
    strict_json.loads(json.dumps({"text": "[{" * 500 + '\\"[', "n": [[i] for i in range(500)]}).encode())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' comes twice"),
        (b'{"a": 1, "\\u0061": 2}', "the key 'a' comes twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "the number 1e999 is beyond"),
        (b"1" * 5000, "not JSON: "),
        (b'"\xff"', "not UTF-8: byte 0xff at position 1: invalid start byte"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON: "),
        (b"{} {}", "not JSON: Extra data at character 3"),
        (b'"a\tb"', "not JSON: Invalid control character"),
        (b"", "not JSON: "),
    ],
)
def test_the_rest_is_refused(data, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        strict_json.loads(data)
