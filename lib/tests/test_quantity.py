"""Quantities as the API writes them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_storage.kube.quantity import from_bytes, parse, to_bytes

SUFFIXES = ["", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
FACTORS = [1, *(1000**n for n in range(1, 7)), *(1024**n for n in range(1, 7))]


# What Quantity.Value() of k8s.io/apimachinery gives for each.
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("0n", 0),
        ("1", 1),
        ("1Ki", 1024),
        ("8Ki", 8192),
        ("7Mi", 7 * 1024**2),
        ("1Gi", 1073741824),
        ("1.5Gi", 1610612736),
        ("0.5Ti", 549755813888),
        ("1.024k", 1024),
        ("5Ti", 5 * 1024**4),
        ("4Pi", 4 * 1024**5),
        ("3Ei", 3 * 1024**6),
        ("500M", 500_000_000),
        ("1E", 10**18),
        ("1e3", 1000),
        ("1E3", 1000),
        ("1e-3", 1),
        ("1E+6", 1_000_000),
        ("12.34e2", 1234),
        ("1.1e1", 11),
        ("100e-2", 1),
        ("1n", 1),
        ("1u", 1),
        ("1500m", 2),
        ("1000m", 1),
        ("0.1", 1),
        ("1.", 1),
        (".5Gi", 536870912),
        ("+1Gi", 1073741824),
        ("007", 7),
        ("0.3Ki", 308),
        ("9223372036854775807", 2**63 - 1),
        ("-1", -1),
    ],
)
def test_a_quantity_is_as_many_bytes_as_for_the_api_server(text: str, count: int) -> None:
    assert to_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "Gi", "1 Gi", " 1Gi", "1Gi ", "1Gi\n", "1gi", "1GI", "1K", "1ki", "1kB", "1B"),
        *("1.2.3", "--1", "1e", "1e1Gi", "1eGi", "1Gi1", "0x10", "1_000", "1,5Gi", "inf", "nan"),
        *(".", "+", "1/2", "٣Gi"),
    ],
)
def test_what_is_not_a_quantity_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


@given(st.text())
def test_no_text_raises_anything_but_a_value_error(text: str) -> None:
    try:
        value = parse(text)
    except ValueError:
        return
    assert isinstance(value, Fraction)


@given(st.integers(0, 2**70))
def test_from_bytes_is_exact(count: int) -> None:
    assert to_bytes(from_bytes(count)) == count


@given(st.integers(0, 10**6), st.sampled_from(["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]))
def test_from_bytes_is_the_shortest_with_a_binary_suffix(number: int, suffix: str) -> None:
    given_text = f"{number}{suffix}" if number else "0"
    assert len(from_bytes(to_bytes(given_text))) <= len(given_text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1Ki"), (1536, "1536"), (2**30, "1Gi")],
)
def test_from_bytes_uses_a_suffix_only_where_it_is_exact(count: int, text: str) -> None:
    assert from_bytes(count) == text


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes: a size is not negative"):
        from_bytes(-1)


@given(
    st.integers(-(10**9), 10**9),
    st.integers(0, 999),
    st.sampled_from(list(zip(SUFFIXES, FACTORS, strict=True))),
)
def test_a_decimal_number_is_read_exactly(
    whole: int, thousandths: int, unit: tuple[str, int]
) -> None:
    suffix, factor = unit
    sign = -1 if whole < 0 else 1
    expected = (Fraction(abs(whole)) + Fraction(thousandths, 1000)) * factor * sign
    assert parse(f"{whole}.{thousandths:03d}{suffix}") == expected


@given(st.integers(1, 10**6), st.integers(-30, 30))
def test_an_exponent_is_read_exactly(number: int, exponent: int) -> None:
    assert parse(f"{number}e{exponent}") == Fraction(number) * Fraction(10) ** exponent
