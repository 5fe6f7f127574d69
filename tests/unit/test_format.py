# SPDX-License-Identifier: Apache-2.0
"""Values are formatted for people."""

from __future__ import annotations

import pytest

from cwndtrace import format as fmt


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0 us"),
        (45, "45 us"),
        (999.4, "999 us"),
        (1000, "1.00 ms"),
        (2100, "2.10 ms"),
        (20_400, "20.4 ms"),
        (204_000, "204 ms"),
        (999_400, "999 ms"),
        (1_300_000, "1.30 s"),
        (3_600_000_000, "3600 s"),
    ],
)
def test_spans_have_three_digits_and_a_unit(us: float, text: str) -> None:
    assert fmt.span(us) == text


@pytest.mark.parametrize(
    ("value", "whole", "span"),
    [
        (241, "+241 ms", "+241 us"),
        (-367.4, "-367 ms", "-367 us"),
        (0, "0 ms", "0 us"),
        (-0.0, "0 ms", "0 us"),
        (-0.4, "0 ms", "0 us"),
        (0.4, "0 ms", "0 us"),
        (-10_000, "-10000 ms", "-10.0 ms"),
    ],
)
def test_a_difference_has_a_sign_unless_it_is_shown_as_zero(value: float, whole: str, span: str) -> None:
    assert fmt.signed(value, "{:.0f} ms".format) == whole
    assert fmt.signed(value, fmt.span) == span
    assert fmt.signed(value, "{:.0f} 1/min".format) == whole.replace("ms", "1/min")


@pytest.mark.parametrize("us", [999.6, 9_999, 99_990, 999_600, 9_999_000])
def test_a_span_never_shows_more_than_three_digits(us: float) -> None:
    number, unit = fmt.span(us).split()
    assert len(number.replace(".", "")) <= 3, fmt.span(us)
    assert float(number) * {"us": 1, "ms": 1e3, "s": 1e6}[unit] == pytest.approx(us, rel=0.01)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (4096, "4.10 kB"),
        (2.8e9, "2.80 GB"),
        (3e12, "3.00 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes_have_decimal_units(count: float, text: str) -> None:
    assert fmt.size(count) == text


def test_an_infinite_threshold_is_inf() -> None:
    assert fmt.threshold(2120) == "2120"
    assert fmt.threshold(0x7FFFFFFF) == "inf"


def test_ipv6_addresses_of_endpoints_are_in_brackets() -> None:
    assert fmt.endpoint("10.0.0.1", 443) == "10.0.0.1:443"
    assert fmt.endpoint("2001:db8::1", 443) == "[2001:db8::1]:443"
    row = {"saddr": "10.0.0.1", "sport": 1, "daddr": "::1", "dport": 2}
    assert fmt.connection(row) == "10.0.0.1:1 > [::1]:2"


def test_a_process_is_its_name_and_pid_without_control_characters() -> None:
    assert fmt.process("nginx", 7) == "nginx[7]"
    assert fmt.process("", 0) == "-"
    assert fmt.process("\x1b[2Jevil\n", 7) == "?[2Jevil?[7]"


def test_a_thread_of_another_name_stands_beside_its_process() -> None:
    assert fmt.process("grpc", 7, "event_engine") == "grpc/event_engine[7]"
    assert fmt.process("nginx", 7, "nginx") == fmt.process("nginx", 7, "") == "nginx[7]"
    assert fmt.process("grpc", 7, "a\x1b[31m") == "grpc/a?[31m[7]"
    assert fmt.process("", 0, "swapper/0") == "-"
    assert fmt.holder({"process": "grpc", "pid": 7, "thread": "event_engine"}) == "grpc/event_engine[7]"


def test_lost_records_are_counted_in_the_right_number() -> None:
    assert fmt.lost(1, "record", "block_io") == "1 record of block_io was lost"
    assert fmt.lost(2345, "block request") == "2,345 block requests were lost"


def test_a_number_and_its_unit_are_joined_by_a_no_break_space() -> None:
    nb = "\u00a0"
    assert fmt.unbroken("saves 11.0 s, 3 of 1,234 connections, 12 %; 2 -> 1") == (
        f"saves 11.0{nb}s, 3{nb}of 1,234{nb}connections, 12{nb}%; 2 -> 1"
    )
    # A command may be pasted into a shell, so its spaces stay.
    command = "ip netns exec web-1 ip route change 10.0.0.0/24 via 10.0.0.1 dev eth0 proto static; ip -6 addr"
    assert fmt.unbroken(command) == command


@pytest.mark.parametrize(("count", "text"), [(16, "16 B"), (100_000, "100 kB"), (1_500_000, "1.5 MB"), (2e9, "2 GB")])
def test_a_chosen_size_has_no_trailing_zeros(count: float, text: str) -> None:
    assert fmt.nominal_size(count) == text


@pytest.mark.parametrize(
    ("utc_ns", "text"),
    [
        (0, "1970-01-01 00:00:00 UTC"),
        (1_795_000_000_999_999_999, "2026-11-18 11:06:40 UTC"),
        (2**63 - 1, "2262-04-11 23:47:16 UTC"),
        (10**30, "an impossible time"),
        (-(10**30), "an impossible time"),
    ],
)
def test_a_moment_is_in_utc_to_the_second(utc_ns: int, text: str) -> None:
    assert fmt.moment(utc_ns) == text


def test_numbers_agree_with_their_nouns() -> None:
    assert [fmt.plural(number, "reset") for number in (0, 1, 2, 2000)] == [
        "0 resets",
        "1 reset",
        "2 resets",
        "2,000 resets",
    ]
    assert fmt.left_out("cgroups", 1) == (
        "at least 1 requested cgroup isn't traced, because the filter is full: "
        "ask for a cgroup further down the hierarchy"
    )
    assert fmt.left_out("sockets", 2000) == (
        "at least 2,000 requested sockets aren't traced, because the filter is full: ask for a port, or its cgroup"
    )
    assert fmt.left_out("files", 2) == "at least 2 requested files aren't traced, because the filter is full"
    assert fmt.lost(2, "record") == "2 records were lost"
    because = "(inferred), because the kernel didn't show who submitted"
    assert fmt.guessed(1) == f"1 block request is charged to the task that queued it {because} it"
    assert fmt.guessed(5) == f"5 block requests are charged to the task that queued them {because} them"


def test_round_trips_are_not_broken_either() -> None:
    assert fmt.unbroken("it takes 3 round trips") == "it takes 3\u00a0round\u00a0trips"


def test_json_is_printable_ascii() -> None:
    assert fmt.json_line({"comm": "a\x7f\x1b\u00e9"}) == '{"comm": "a\\u007f\\u001b\\u00e9"}'
    assert fmt.json_line({"cost": float("nan")}) == '{"cost": NaN}'
    with pytest.raises(ValueError, match="JSON"):
        fmt.json_line({"cost": float("nan")}, allow_nan=False)
