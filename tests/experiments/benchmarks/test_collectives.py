"""Collectives are counted as often as they run, with the devices that take part."""

import pytest

from experiments.benchmarks.collectives import collectives

TRIPS = 'backend_config={"known_trip_count":{"n":"7"}}'
TEXT = """
HloModule m

%add (p: f32[], q: f32[]) -> f32[] {
  ROOT %s = f32[] add(%p, %q)
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %r = f32[4]{0} all-reduce(%x), replica_groups=GROUPS, to_apply=%add
  ROOT %t = (s32[], f32[4]) tuple(%n, %r)
}

%condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: f32[4], b: bf16[2,8]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = bf16[2,8]{1,0} parameter(1)
  %g = bf16[4,8]{1,0} all-gather(%b), dimensions={0}, metadata={op_name="jit(f)/gather"}
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body, TRIPS
  ROOT %o = f32[4]{0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ],
)
def test_collectives_in_loops_count_by_their_turns(groups, devices):
    reduced, gathered = sorted(
        collectives(TEXT.replace("GROUPS", groups).replace("TRIPS", TRIPS)),
        key=lambda c: -c.times,
    )
    assert (reduced.kind, reduced.times, reduced.bytes) == ("all-reduce", 7, 7 * 16)
    assert reduced.groups == devices
    assert (gathered.kind, gathered.shapes, gathered.bytes) == (
        "all-gather",
        ((4, 8),),
        64,
    )
    assert gathered.name == "jit(f)/gather"
