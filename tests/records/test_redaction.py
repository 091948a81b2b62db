import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.records.redaction import MAX_TEXT_CHARACTERS
from foreshock.records.strict_json import dump_json, to_json_value

REDACTED = {"redacted": True}


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "db_password",
        "dbPassword",
        "DB-PASSWORD",
        "passwd",
        "authorization",
        "Authorization",
        "clientSecret",
        "AWS_SECRET_ACCESS_KEY",
        "credentials",
        "api_key",
        "API_KEY",
        "apiKey",
        "APIKey",
        "apikey",
        "x-auth-token",
        "accessToken",
        "access_token",
        "refresh_token",
        "private_key",
    ],
)
def test_everything_under_the_name_of_a_secret_is_redacted(key):
    for value in ["hunter2", 123456, 1.5, None, ["a", "b"], {"a": "b"}, b"hunter2"]:
        assert to_json_value({key: value}) == {key: REDACTED}
        assert to_json_value({key: value}, redact=False) == {key: REDACTED}


@pytest.mark.parametrize("key", ["token", "key", "Token", "key_2", "KEY"])
@pytest.mark.parametrize("value", ["hunter2", 123456, ["hunter2"]])
def test_bare_token_and_key_hide_text_and_integers(key, value):
    assert "hunter2" not in str(to_json_value({key: value}))
    assert "123456" not in str(to_json_value({key: value}))


def test_attention_statistics_under_the_bare_word_key_stay():
    norms = {"query": 0.5, "key": 0.25, "value": {"key": [0.5, 1.5]}}
    assert to_json_value({"norms": norms}) == {"norms": norms}


@pytest.mark.parametrize(
    "key",
    [
        "tokens_per_second",
        "num_tokens",
        "numTokens",
        "tokens",
        "token_count",
        "pad_token_id",
        "loss_per_token",
        "num_key_value_heads",
        "encoder.layer.0.attention.self.key.weight",
    ],
)
def test_numbers_under_names_of_metrics_are_kept(key):
    for value in [7, 0.5, True, None, [1, 2.5], {"mean": 0.5, "count": 3}]:
        assert to_json_value({key: value}) == {key: value}


@pytest.mark.parametrize("key", ["hf_token", "WANDB_KEY", "githubToken", "tokens", "ssh.keys"])
@pytest.mark.parametrize("value", ["hunter2", ["hunter2"], {"a": {"b": "hunter2"}}])
def test_text_under_names_that_may_be_secrets_is_redacted_at_any_depth(key, value):
    assert "hunter2" not in dump_json(to_json_value({key: value}, redact=False))


@pytest.mark.parametrize(
    "key", ["monkey", "keyboard", "tokenizer", "author", "secretary", "turkey_count", "hockey"]
)
def test_words_that_only_contain_a_secret_word_are_kept(key):
    assert to_json_value({key: "text"}) == {key: "text"}


def test_text_hidden_under_a_key_stays_hidden_below_an_innocent_key():
    value = to_json_value({"key": {"tokens": {"name": "hunter2", "count": 3, "mean": 0.5}}})
    inner = {"name": REDACTED, "count": REDACTED, "mean": 0.5}
    assert value == {"key": {"tokens": inner}}


def test_hiding_ends_with_the_key_that_asked_for_it():
    assert to_json_value({"hf_token": "a", "name": "b"}) == {"hf_token": REDACTED, "name": "b"}


@pytest.mark.parametrize(
    "text", ["x" * (MAX_TEXT_CHARACTERS + 1), "é" * 300, "\N{SNOWMAN}" * 10_000]
)
def test_long_text_is_replaced_by_its_length_and_digest(text):
    digest = hashlib.sha256(text.encode()).hexdigest()
    expected = {"redacted": True, "length": len(text), "sha256": digest}
    assert to_json_value([text]) == [expected]
    assert to_json_value([text], redact=False) == [text]


def test_text_of_256_characters_is_kept():
    text = "x" * MAX_TEXT_CHARACTERS
    assert to_json_value(text) == text


def test_long_key_is_replaced_by_its_length_and_digest():
    key = "x" * 257
    (shown,) = to_json_value({key: 1})
    assert "257 characters" in shown
    assert hashlib.sha256(key.encode()).hexdigest() in shown
    assert to_json_value({key: 1}, redact=False) == {key: 1}


def test_long_key_that_names_a_secret_is_still_seen():
    assert list(to_json_value({"password_" + "x" * 300: "hunter2"}).values()) == [REDACTED]


_innocent = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@st.composite
def _data_with_a_secret(draw):
    key = draw(st.sampled_from(["password", "token", "hf_token", "apiKey", "Authorization"]))
    secret = "hunter2-canary"
    value = draw(st.sampled_from([secret, [secret], {"a": secret}, {"a": [1, {"b": secret}]}]))
    data = {"a": draw(_innocent), key: value, "b": draw(_innocent)}
    for _ in range(draw(st.integers(0, 4))):
        data = draw(st.sampled_from([[data], {"x": data}, (1, data), {"x": [data, data]}]))
    return data


@settings(deadline=None, max_examples=50)
@given(_data_with_a_secret(), st.booleans())
def test_secret_is_found_wherever_it_is_nested(data, redact):
    assert "hunter2" not in json.dumps(to_json_value(data, redact=redact))
