"""Data as JSON knows it, with the floats that JSON lacks, and what it means to be the same."""

import math

from hypothesis import strategies as st

from foreshock.records.redaction import Secrecy, secrecy_of_key


def is_same(a, b):
    """Equality that also holds for NaN, and tells 1 from 1.0 and True."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(is_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


# Three texts stand for floats, so as texts they do not survive.
_texts = st.text(max_size=20).filter(lambda text: text not in ("NaN", "Infinity", "-Infinity"))
_keys = st.text(max_size=10).filter(lambda key: secrecy_of_key(key) is Secrecy.NOTHING)
json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=20,
)
