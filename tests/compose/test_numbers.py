"""Numbers in the two styles: a report's pages, and documents beside the terminal."""

from __future__ import annotations

from compose.numbers import PAGE, PLAIN, four_digits, three_places

THIN = "\u202f"


def test_digits_of_documents() -> None:
    values = (0.0004, 0.1041, 1.0899, 16.83, 374.9, 1319.6)
    assert [three_places(v) for v in values] == ["0.000", "0.104", "1.09", "16.8", "375", "1320"]
    assert [four_digits(v) for v in (12.3456, 0.5, 1319.6)] == ["12.35", "0.5", "1,320"]


def test_one_factor_in_both_styles() -> None:
    assert PAGE.ratio(1.6249, (1.5, 1.75)) == "×1.62 (1.50–1.75)"
    assert PLAIN.ratio(1.6249, (1.5, 1.75)) == "1.62x (1.50 to 1.75)"
    assert PAGE.ratio(1.01, (0.964, 1.06)) == "no difference (0.96–1.06)"
    assert PLAIN.ratio(1.01, (0.964, 1.06)) == "no difference (0.964 to 1.06)"
    assert PLAIN.ratio(1.01, (0.964, 1.06), differs=True) == "1.01x (0.964 to 1.06)"
    assert PLAIN.ratio(2.0, None) == "2.00x"


def test_shares_and_sizes() -> None:
    assert PAGE.percent(0.8124) == f"81.2{THIN}%"
    assert PLAIN.percent(0.8124, (0.7, 1.08)) == "81.2 % (70.0 to 108)"
    assert (PAGE.megabytes(1_234_567_890), PAGE.megabytes(9.5e6)) == (f"1{THIN}235", "9.50")
    assert PLAIN.percent(None) == PLAIN.with_ends(None, None) == "–"
