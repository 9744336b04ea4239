from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_spherical.banner import PREFIX, Banner, parse

NAMES = st.from_regex(r"[A-Za-z_]\w{0,20}", fullmatch=True)
SIZES = st.floats(min_value=0, max_value=1e12)
COUNTS = st.integers(min_value=0, max_value=2**60)
BANNERS = st.builds(
    Banner,
    pool=NAMES,
    allocator=NAMES,
    tree=NAMES,
    backend=NAMES,
    page_size=COUNTS,
    hot=SIZES,
    warm=SIZES,
    cool=SIZES,
    cold=SIZES,
    frozen=SIZES,
    bf16=SIZES,
    capacity_tokens=COUNTS,
    arena_bytes=COUNTS,
)


@given(BANNERS)
def test_parse_is_the_inverse_of_format(banner: Banner) -> None:
    assert parse(banner.format()) == banner


@given(BANNERS)
def test_found_inside_a_log(banner: Banner) -> None:
    log = f"[2026-01-01] first line a=b\n[2026-01-01] {banner.format()}\nlast line hot=1\n"
    assert parse(log) == banner


def test_the_line_reads_as_documented() -> None:
    parts = "Pool", "Allocator", "Tree", "Backend"
    banner = Banner(*parts, 64, 10.5, 6.0, 5.0, 4.0, 3.5, 20.0, 16384, 4096)
    assert banner.format() == (
        "spherical KV engaged: pool=Pool allocator=Allocator tree=Tree backend=Backend "
        "page_size=64 kv_bytes_per_token hot=10.5 warm=6.0 cool=5.0 cold=4.0 frozen=3.5 bf16=20.0 "
        "capacity_tokens=16384 arena_bytes=4096"
    )


def test_a_dense_log_has_none() -> None:
    assert parse("") is None
    assert parse("[2026-01-01] The server is fired up and ready to roll!\n") is None


def test_a_line_without_a_field_is_an_error() -> None:
    with pytest.raises(ValueError, match="allocator"):
        parse(f"{PREFIX} pool=Pool")
