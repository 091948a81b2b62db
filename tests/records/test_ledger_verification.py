"""Every way to tamper with a ledger is found, and the first bad line is named.

Line n is bad if it is not what has to stand behind line n - 1. So the first bad line is: of altered
lines the first, of removed lines the place of the first, of inserted lines the first, of two
swapped the upper one.
"""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ledgers import KEY, OTHER_KEY, write_ledger

from foreshock.records import Ledger, read_ledger, verify
from foreshock.records.ledger_chain import canonical_json, hash_of, hmac_of

NUM_LINES = 6
NUMBERS = st.integers(0, NUM_LINES - 1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def lines(path):
    return write_ledger(path, NUM_LINES)


def tamper(*strategies, max_examples=150):
    def decorate(test):
        shared = [HealthCheck.function_scoped_fixture]
        profile = settings(deadline=None, max_examples=max_examples, suppress_health_check=shared)
        return profile(given(*strategies)(test))

    return decorate


def first_bad(path, lines, **arguments):
    path.write_bytes(b"".join(lines))
    found = verify(path, **arguments)
    assert found.is_intact == bool(found) == (found.problem is None)
    assert found.is_intact == (found.first_bad_line is None)
    if not found:
        assert found.lines == found.first_bad_line - 1
    return found.first_bad_line


def head_of(line):
    return json.loads(line)["hash"]


def number_at(lines, place):
    """Of the line that holds this byte of the file."""
    for number, line in enumerate(lines, start=1):
        place -= len(line)
        if place < 0:
            return number
    return len(lines) + 1


def is_only_unfinished(lines, changed):
    """Whether of the changed file no more is bad than that its last line has no end."""
    return changed[: changed.rfind(b"\n") + 1] == b"".join(lines[: changed.count(b"\n")])


def check_change(path, lines, changed, place):
    path.write_bytes(changed)
    expected = number_at(lines, place)
    found = verify(path)
    if is_only_unfinished(lines, changed):
        assert found
        assert found.lines == expected - 1
        assert found.torn_bytes > 0
    else:
        assert found.first_bad_line == expected
    # With the head no exception is left but what was added behind all lines and has no end.
    with_head = verify(path, head=head_of(lines[-1]))
    if place < sum(map(len, lines)):
        assert with_head.first_bad_line == expected
    else:
        assert found.torn_bytes or not with_head


@tamper(st.data())
def test_every_change_of_one_byte_is_found(path, lines, data):
    whole = b"".join(lines)
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    check_change(path, lines, whole[:place] + bytes([byte]) + whole[place + 1 :], place)


def test_every_flip_of_a_bit_is_found_wherever_it_is(path):
    lines = write_ledger(path, 2)
    whole = b"".join(lines)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        check_change(path, lines, bytes(changed), place)


@tamper(st.data())
def test_every_removed_byte_is_found(path, lines, data):
    whole = b"".join(lines)
    place = data.draw(st.integers(0, len(whole) - 1))
    check_change(path, lines, whole[:place] + whole[place + 1 :], place)


@tamper(st.data())
def test_every_inserted_byte_is_found(path, lines, data):
    whole = b"".join(lines)
    place = data.draw(st.integers(0, len(whole)))
    byte = data.draw(st.sampled_from(b' \n\r\t0a"}\x00') | st.integers(0, 255))
    changed = whole[:place] + bytes([byte]) + whole[place:]
    # A byte repeated is the same as one put behind it: the change is where the two files differ.
    while place < len(whole) and changed[place] == whole[place]:
        place += 1
    check_change(path, lines, changed, place)


@tamper(NUMBERS, st.integers(1, 3), max_examples=40)
def test_removed_lines_are_found_where_the_first_stood(path, lines, first, count):
    kept = lines[:first] + lines[first + count :]
    is_end = first + count >= NUM_LINES
    assert first_bad(path, kept) == (None if is_end else first + 1)
    assert first_bad(path, kept, head=head_of(lines[-1])) == first + 1


@tamper(NUMBERS, NUMBERS, max_examples=40)
def test_a_line_inserted_again_is_found_where_it_stands(path, lines, which, place):
    changed = [*lines[:place], lines[which], *lines[place:]]
    # Before or behind its like it makes the same file: the second of the two is the one too many.
    assert first_bad(path, changed) == place + 1 + (which == place)


@tamper(st.integers(0, NUM_LINES), st.sampled_from([b"\n", b"{}\n", b"[]\n", b"\xff\n", b"null\n"]))
def test_a_foreign_line_is_found_where_it_stands(path, lines, place, foreign):
    assert first_bad(path, [*lines[:place], foreign, *lines[place:]]) == place + 1


@tamper(NUMBERS, NUMBERS, max_examples=40)
def test_of_two_swapped_lines_the_upper_is_named(path, lines, one, other):
    swapped = list(lines)
    swapped[one], swapped[other] = lines[other], lines[one]
    assert first_bad(path, swapped) == (None if one == other else min(one, other) + 1)


@tamper(st.data())
def test_an_end_cut_off_anywhere_is_found_against_the_head(path, lines, data):
    whole = b"".join(lines)
    size = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:size])
    num_whole = whole[:size].count(b"\n")
    found = verify(path)
    assert found
    assert found.lines == num_whole
    assert found.torn_bytes == size - (whole[:size].rfind(b"\n") + 1)
    assert verify(path, head=head_of(lines[-1])).first_bad_line == num_whole + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:2] + lines[3:], "written as line 4: what stood between is removed"),
        (lambda lines: [*lines[:2], lines[0], *lines[2:]], "written as line 1: inserted again"),
        (lambda lines: [*lines[:2], b'{"seq": 3}\n'], "not a record in the ledger's spelling"),
        (lambda lines: [*lines[:2], b"\n"], "not a record in JSON"),
        (lambda lines: [*lines[:2], b'{"a":NaN}\n'], "not a record in JSON"),
        (lambda lines: [*lines[:2], b'{"a":1e999}\n'], "not a record"),
        (lambda lines: [*lines[:2], b'{"a":"\\ud800"}\n'], "not a record"),
        (lambda lines: [*lines[:2], b"[" * 100_000 + b"\n"], "not a record in JSON"),
        (lambda lines: [*lines[:2], b"9" * 10_000 + b"\n"], "not a record in JSON"),
        (
            lambda lines: [*lines[:2], lines[2].replace(b"Schicht 2", b"Schicht 5")],
            "altered: its content does not fit its hash",
        ),
        (
            lambda lines: [*lines[:2], lines[2].replace(b"\n", b"\r\n")],
            "not a record in the ledger's spelling",
        ),
    ],
)
def test_the_problem_is_told_in_plain_words(path, lines, change, words):
    assert first_bad(path, change(lines)) == 3
    assert words in verify(path).problem


def rewritten(lines, first, *, key=None, **changes):
    """Changes a line and makes every hash from there on fit again."""
    records = [json.loads(line) for line in lines]
    records[first] |= changes
    for record, before in zip(records[first:], [None, *records][first:], strict=False):
        if before is not None:
            record["prev"] = before["hash"]
        if key is not None:
            record["hmac"] = hmac_of(record, key)
        record["hash"] = hash_of(record)
    return [canonical_json(record) + b"\n" for record in records]


def test_a_line_given_a_new_hash_is_found_by_the_line_behind_it(path, lines):
    changed = rewritten(lines, 2, theta=9.0)[:3] + lines[3:]
    assert first_bad(path, changed) == 4
    assert "does not continue the line before" in verify(path).problem


@example(first=5)
@given(first=NUMBERS)
@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
def test_a_chain_rewritten_is_found_by_a_head_and_by_nothing_else_without_a_key(path, lines, first):
    changed = rewritten(lines, first, theta=9.0)
    assert first_bad(path, changed) is None
    assert first_bad(path, changed, head=head_of(lines[-1])) == NUM_LINES + 1


@pytest.mark.parametrize("as_new", [{}, {"key": OTHER_KEY}], ids=["old HMAC", "HMAC of another"])
@pytest.mark.parametrize("first", [0, 2, 5])
def test_a_chain_rewritten_is_found_by_the_key_in_the_very_line(path, first, as_new):
    lines = write_ledger(path, NUM_LINES, hmac_key=KEY)
    changed = rewritten(lines, first, theta=9.0, **as_new)
    assert first_bad(path, changed) is None
    assert first_bad(path, changed, hmac_key=KEY) == first + 1
    assert first_bad(path, lines, hmac_key=KEY) is None
    assert first_bad(path, lines, hmac_key=OTHER_KEY) == 1


@pytest.mark.parametrize("first", [0, 2, 5])
def test_a_chain_rewritten_is_found_by_the_public_key_in_the_very_line(path, first):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_key = Ed25519PrivateKey.from_private_bytes(KEY).public_key()
    lines = write_ledger(path, NUM_LINES, signing_key=KEY)
    changed = rewritten(lines, first, theta=9.0)
    assert first_bad(path, changed) is None
    assert first_bad(path, changed, public_key=public_key) == first + 1
    assert first_bad(path, lines, public_key=public_key) is None
    other = Ed25519PrivateKey.from_private_bytes(OTHER_KEY).public_key()
    assert first_bad(path, lines, public_key=other) == 1


@pytest.mark.parametrize("seal", ["ed25519:zz", "ed25519:00", "x", 3, None])
def test_seals_that_are_none_do_not_fit(path, seal):
    public = {"public_key": public_bytes(KEY)}
    lines = write_ledger(path, 2, hmac_key=KEY, signing_key=KEY)
    changed = rewritten(lines, 1, signature=seal)
    assert first_bad(path, changed, **public) == 2
    assert first_bad(path, rewritten(lines, 1, hmac=seal), hmac_key=KEY) == 2


def test_seals_cannot_be_left_out(path):
    lines = write_ledger(path, 3)
    assert first_bad(path, lines, hmac_key=KEY) == 1
    assert "bears no HMAC" in verify(path, hmac_key=KEY).problem
    assert first_bad(path, lines, public_key=public_bytes(KEY)) == 1
    assert "bears no signature" in verify(path, public_key=public_bytes(KEY)).problem


def public_bytes(raw):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw()


def test_keys_are_taken_in_every_form(path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(KEY)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for signing_key in (key, pem, KEY):
        write_ledger(path, 2, signing_key=signing_key)
        for public_key in (key.public_key(), public_pem, public_bytes(KEY)):
            assert verify(path, public_key=public_key).is_signed
    assert not verify(path).is_signed
    with pytest.raises(TypeError, match=r"public_key must be an Ed25519PublicKey.*PrivateKey"):
        verify(path, public_key=key)
    with pytest.raises(ValueError, match=r"public_key must be .* these bytes are neither"):
        verify(path, public_key=pem)


def test_without_cryptography_the_error_says_what_to_install(path, run_python):
    script = """
sys.modules["cryptography"] = None
from foreshock.records import Ledger, verify
Ledger(sys.argv[1]).append("forget")
assert verify(sys.argv[1])
for use in (lambda: Ledger(sys.argv[1], signing_key=bytes(32)),
            lambda: verify(sys.argv[1], public_key=bytes(32))):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    said = run_python(script, path).splitlines()
    assert len(said) == 2
    assert said[0].startswith("signing_key needs the package cryptography")
    assert said[1].startswith("public_key needs the package cryptography")
    assert all("pip install 'foreshock[signing]'" in line for line in said)


def test_lines_behind_the_head_are_no_fault_and_its_line_is_told(path, lines):
    for number, line in enumerate(lines, start=1):
        found = verify(path, head=head_of(line))
        assert found
        assert (found.head_line, found.lines) == (number, NUM_LINES)
        assert found.head == head_of(lines[-1])


def test_an_empty_ledger_is_intact_and_has_the_head_of_an_empty_ledger(path):
    with Ledger(path) as ledger:
        head = ledger.head
    found = verify(path, head=head)
    assert (found.is_intact, found.lines, found.head, found.head_line) == (True, 0, head, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head": "x"}, ValueError, "head must be sha256: and 64 digits of 0-9a-f, not 'x'"),
        ({"head": "sha256:" + "A" * 64}, ValueError, "head must be sha256:"),
        ({"head": b"x"}, TypeError, "head must be text, not bytes"),
        ({"hmac_key": b"x"}, ValueError, "hmac_key must have at least 16 bytes"),
        ({"public_key": 3}, TypeError, "public_key must be an Ed25519PublicKey"),
        ({"path": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"path": 3}, TypeError, "path must be str"),
    ],
)
def test_bad_arguments_of_verify_are_named(path, lines, arguments, error, message):
    with pytest.raises(error, match=message):
        verify(**{"path": path, **arguments})


def test_the_reader_names_a_line_that_is_no_record_and_leaves_an_unfinished_one_out(path, lines):
    path.write_bytes(b"".join(lines)[:-5])
    assert len(read_ledger(path)) == NUM_LINES - 1
    path.write_bytes(lines[0] + b"[]\n")
    with pytest.raises(ValueError, match="no JSON object in line 2"):
        read_ledger(path)


def test_the_reader_gives_floats_back_that_json_does_not_have(path):
    with Ledger(path) as ledger:
        ledger.append("forget", theta=float("-inf"))
    assert read_ledger(path)[0]["theta"] == float("-inf")
    assert read_ledger(path, decode_nonfinite=False)[0]["theta"] == "-Infinity"
