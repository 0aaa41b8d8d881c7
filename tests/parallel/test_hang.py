"""Who keeps the others waiting, from what ranks tell of themselves."""

from __future__ import annotations

from leanmill.parallel.flight import Standing
from leanmill.parallel.hang import Seen, silent_ranks, verdict


def standing(number: int, *, is_done: bool = False, operation: str = "all_reduce", size: int = 4) -> Standing:
    return Standing(number=number, operation=operation, sizes=((size,),), is_done=is_done)


def seen(rank: int, *, beat: int = 5, phase: str = "update", step: int = 57, **standings: Standing) -> Seen:
    groups = {name.replace("_", " "): one for name, one in standings.items()}
    return Seen(
        host=f"node{rank}", pid=100 + rank, beat=beat, phase=phase, step=step, phase_seconds=61.4, standings=groups
    )


def test_a_rank_that_does_not_come_is_named() -> None:
    late = seen(2, phase="reading data", all_ranks=standing(511, is_done=True))
    told = verdict(0, {0: seen(0, all_ranks=standing(512)), 1: seen(1, all_ranks=standing(512)), 2: late}, ())
    assert told == (
        "2 ranks wait in all_reduce [4] (number 512) of all ranks; rank 2 (node2, process 102) is not there: it is in "
        "reading data of step 57 for 61 s, its last there all_reduce [4] (number 511)"
    )


def test_a_rank_that_is_gone_is_silent() -> None:
    before = {1: seen(1, beat=7, all_ranks=standing(3)), 2: seen(2, beat=8), 3: None}
    after = {1: seen(1, beat=7, all_ranks=standing(3)), 2: seen(2, beat=9), 3: None}
    assert silent_ranks(before, after) == {1}
    told = verdict(0, {0: seen(0, all_ranks=standing(4)), 1: after[1], 3: None}, {1})
    assert "1 rank waits in all_reduce [4] (number 4)" in told
    assert "rank 1 (node1, process 101) is silent: stopped, or its machine is; last heard in update of step 57" in told
    assert "rank 3 has never been heard of" in told


def test_the_branch_of_few_is_the_other_one() -> None:
    # Whoever tells: the odd rank does not take itself for the rule.
    everyone = {rank: seen(rank, all_ranks=standing(9)) for rank in range(3)}
    everyone[0] = seen(0, phase="checkpoint", all_ranks=standing(9, operation="broadcast"))
    for teller in everyone:
        told = verdict(teller, everyone, ())
        assert told.startswith("2 ranks wait in all_reduce [4] (number 9) of all ranks; rank 0 (node0"), told
        assert "took another branch: it is in broadcast [4] (number 9) in its checkpoint of step 57" in told
    everyone[0] = seen(0, all_ranks=standing(9, size=5))
    assert "rank 0 (node0, process 100) took another branch: it is in all_reduce [5]" in verdict(1, everyone, ())


def test_a_rank_that_waits_in_another_group_is_named_and_one_of_no_such_group_is_not() -> None:
    everyone = {
        0: seen(0, mesh_ep=standing(2)),
        1: seen(1, mesh_ep=standing(2)),
        2: seen(2, all_ranks=standing(8, operation="all_gather")),
        3: seen(3, all_ranks=standing(7, is_done=True)),
    }
    told = verdict(0, everyone, ())
    assert "rank 2 (node2, process 102) waits in all_gather [4] (number 8) of all ranks in its update" in told
    assert "rank 3" not in told


def test_a_rank_that_went_on_is_named() -> None:
    told = verdict(0, {0: seen(0, all_ranks=standing(4)), 1: seen(1, all_ranks=standing(6))}, ())
    assert "rank 1 (node1, process 101) is past it" in told


def test_everybody_in_one_collective_is_the_networks() -> None:
    told = verdict(1, {rank: seen(rank, all_ranks=standing(4)) for rank in range(4)}, ())
    assert told.startswith("every rank is in all_reduce [4] (number 4) of all ranks, which does not end")


def test_many_are_counted() -> None:
    everyone = {0: seen(0, all_ranks=standing(4))}
    everyone |= {rank: seen(rank, all_ranks=standing(3, is_done=True)) for rank in range(1, 30)}
    told = verdict(0, everyone, ())
    assert told.endswith("; and 25 more")
    assert told.count("; rank ") == 4


def test_what_is_told_comes_back_from_json() -> None:
    mine = seen(0, all_ranks=standing(4), mesh_ep=standing(2, is_done=True))
    assert Seen.from_state(mine.state()) == mine
