"""Retention: which pages are lowered, which nodes are dropped, and that the answer is enough."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_spherical.config import TIERS, SphericalConfig
from sglang_spherical.pool.layout import default_levels
from sglang_spherical.retention import policy
from sglang_spherical.retention.distortion import DROPPED, distortions
from sglang_spherical.retention.ladder import BOTTOM, Ladder
from sglang_spherical.retention.nodes import ROOT, NodeTable
from sglang_spherical.retention.operations import SINK_PAGES, Drop, Lower, NodeView, Operation
from sglang_spherical.retention.policy import lowerable, relieve, settle
from sglang_spherical.retention.worth import halving, worth

COSTS = (16, 9, 7, 5, 4)
DISTORTION = (0.0, 0.003, 0.016, 0.05, 0.12)
LEVELS = range(len(COSTS))
LADDER = Ladder.over(COSTS, DISTORTION, 1.0)


@dataclass(eq=False)
class Node:
    name: str
    levels: np.ndarray
    row: int = ROOT


@dataclass
class Tree:
    """Nodes as the tree tells the policy of them: sinks are hot whatever `levels` says."""

    table: NodeTable = field(default_factory=lambda: NodeTable(len(COSTS)))
    nodes: list[Node] = field(default_factory=list)

    def add(
        self,
        name: str,
        levels: Sequence[int],
        parent: Node | None = None,
        *,
        age: int = 0,
        reuses: float = 0.0,
        locked: bool = False,
    ) -> Node:
        node = Node(name, np.array(levels, np.uint8))
        above = ROOT if parent is None else parent.row
        first = 0 if parent is None else self.first(parent) + len(parent.levels)
        node.levels[: max(0, SINK_PAGES - first)] = 0
        node.row = self.table.add(node, above, first, node.levels)
        self.table.used[node.row] = self.table.clock - age
        self.table.reuses[node.row] = reuses
        self.table.locked[node.row] = locked
        self.nodes.append(node)
        return node

    def first(self, node: Node) -> int:
        return int(self.table.first_page[node.row])

    def unlocked(self) -> list[Node]:
        return [node for node in self.nodes if not self.table.locked[node.row]]

    def worth(self, node: Node) -> float:
        rows = np.array([node.row])
        reuses, age = self.table.reuses[rows], self.table.age(rows)
        return float(worth(reuses, age, len(self.table))[0])

    def held(self) -> int:
        return sum(COSTS[level] for node in self.unlocked() for level in node.levels)

    def view(self, node: Node) -> NodeView:
        return NodeView(node, self.first(node), node.levels)

    def gain(self, operations: list[Operation]) -> int:
        """What operations free, each checked to be possible when its turn comes."""
        levels = {id(node): node.levels.copy() for node in self.unlocked()}
        parents = [int(self.table.parent[node.row]) for node in self.nodes]
        gained = 0
        for operation in operations:
            held = levels[id(operation.node)]
            if isinstance(operation, Drop):
                assert operation.node.row not in parents, "a parent is dropped after its children"
                gained += sum(COSTS[level] for level in held)
                del levels[id(operation.node)]
                parents.remove(int(self.table.parent[operation.node.row]))
            else:
                assert len(set(operation.pages.tolist())) == len(operation.pages)
                for page in operation.pages:
                    assert held[page] < operation.level, "lowering never raises"
                    gained += COSTS[held[page]] - COSTS[operation.level]
                    held[page] = operation.level
        return gained

    def after(self, operations: list[Operation]) -> dict[str, list[int]]:
        """Levels of the nodes that are left."""
        found = {node.name: node.levels.copy() for node in self.nodes}
        for operation in operations:
            if isinstance(operation, Drop):
                del found[operation.node.name]
            else:
                found[operation.node.name][operation.pages] = operation.level
        return {name: levels.tolist() for name, levels in found.items()}


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Up to seven nodes. Whatever holds a node holds its parents; worth may be out of order."""
    tree = Tree()
    tree.table.clock = 20
    for i, age in enumerate(draw(st.permutations(range(draw(st.integers(1, 7)))))):
        levels = draw(st.lists(st.sampled_from(LEVELS), min_size=1, max_size=5))
        place = draw(st.integers(-1, i - 1))
        parent = tree.nodes[place] if place >= 0 else None
        unheld = parent is None or bool(tree.table.locked[parent.row])
        reuses = draw(st.sampled_from([0.0, 0.0, 1.0, 3.5]))
        locked = unheld and draw(st.booleans())
        tree.add(str(i), levels, parent, age=age, reuses=reuses, locked=locked)
    return tree


def drops(operations: list[Operation]) -> list[str]:
    return [op.node.name for op in operations if isinstance(op, Drop)]


def lowered(operations: list[Operation]) -> dict[str, list[int]]:
    return {op.node.name: op.pages.tolist() for op in operations if isinstance(op, Lower)}


# --- the ladder ----------------------------------------------------------------------------------


def test_steps_grow_dearer_from_level_to_level() -> None:
    assert LADDER.next_level.tolist() == [1, 2, 3, 4, BOTTOM]
    slopes = [*LADDER.slope[:-1], LADDER.drop_slope]
    assert slopes == sorted(slopes)
    assert slopes[1] == pytest.approx(0.013 / 2)
    assert LADDER.drop_slope == pytest.approx(0.88 / 4)
    assert LADDER.gain.tolist() == [7, 2, 2, 1, 0]


def test_a_level_that_frees_nothing_is_never_gone_to() -> None:
    """As on small pages, where cool rounds up to warm's cost and frozen to cold's."""
    ladder = Ladder.over((16, 12, 12, 8, 8), DISTORTION, 1.0)
    assert ladder.next_level.tolist() == [1, 3, 3, BOTTOM, BOTTOM]


def test_a_level_above_the_hull_is_skipped_and_left_all_the_same() -> None:
    ladder = Ladder.over((16, 8, 7, 4), (0.0, 0.01, 0.06, 0.07), 1.0)
    assert ladder.next_level.tolist() == [1, 3, 3, BOTTOM]
    assert ladder.passes.tolist() == [[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert ladder.targets(np.array([True, True, False, False])).tolist() == [3, 3, 2, 3]


@given(
    costs=st.lists(st.integers(1, 64), min_size=2, max_size=6),
    losses=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_every_path_down_is_convex(costs: list[int], losses: list[float]) -> None:
    costs = sorted(costs, reverse=True)
    losses = sorted(losses)[: len(costs)]
    ladder = Ladder.over(costs, losses, 2.0)
    for level, after in enumerate(ladder.next_level):
        if after == BOTTOM:
            continue
        assert costs[after] < costs[level]
        if ladder.next_level[after] != BOTTOM:
            assert ladder.slope[level] <= ladder.slope[after] * (1 + 1e-9) + 1e-12
        assert ladder.slope[level] <= ladder.drop_slope


@pytest.mark.parametrize("hot", [4, 8])
@pytest.mark.parametrize(("warm", "cold"), [(4, 2), (4, 3), (3, 2)])
def test_every_ladder_that_flags_can_name_is_measured(hot: int, warm: int, cold: int) -> None:
    if hot == warm:
        return
    config = SphericalConfig("spherical", hot_bits=hot, warm_bits=warm, cold_bits=cold)
    levels = default_levels(config)
    found = distortions(levels)
    assert [level.name for level in levels] == list(TIERS)
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert found[-1] < DROPPED


def test_the_ladder_ends_where_dropping_is_the_cheaper_step() -> None:
    """As where cold and frozen pages differ by next to nothing."""
    assert Ladder.over((64, 32, 26, 20, 18), DISTORTION, 1.0).next_level.tolist()[3:] == [4, BOTTOM]
    ladder = Ladder.over((64, 32, 26, 19, 18), DISTORTION, 1.0)
    assert ladder.next_level.tolist() == [1, 2, 3, BOTTOM, BOTTOM]
    assert ladder.drop_slope == pytest.approx(0.95 / 19)
    assert ladder.passes[:, 3].tolist() == [1, 1, 1, 1, 0]


def test_dropping_must_be_the_worst() -> None:
    with pytest.raises(ValueError, match=r"drop_distortion: expected more than .* 0.12, got 0.1"):
        Ladder.over(COSTS, DISTORTION, 0.1)


# --- worth ---------------------------------------------------------------------------------------


def test_worth_is_halved_by_every_turn_of_the_cache() -> None:
    ages = np.array([0, 5, 10, 20, 30])
    assert halving(ages, 10.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.125]
    assert np.all(np.diff(halving(np.arange(1000), 7.0)) <= 0)
    assert halving(10**9, 1.0) >= 0
    private, shared = worth(np.array([0.0, 1.0]), np.zeros(2), 10)
    assert shared == 3 * private


def test_reuses_long_ago_count_less() -> None:
    table = NodeTable(1)
    row = table.add("node", ROOT, 0, np.zeros(1, np.uint8))
    for _ in range(4):
        table.count_reuse(row, 0.5)
    assert table.reuses[row] == 2.0
    table.clock += 1
    table.count_reuse(row, 0.5)
    assert table.reuses[row] == 1.5, "one node makes a turn of one access"


# --- the table -----------------------------------------------------------------------------------


def test_rows_are_reused_and_columns_grow() -> None:
    tree = Tree()
    nodes = [tree.add(str(i), [0, 1], reuses=i) for i in range(200)]
    assert len(tree.table) == 200
    assert [node.row for node in nodes] == sorted({node.row for node in nodes})
    for node in nodes[::2]:
        tree.table.remove(node.row)
    assert len(tree.table) == 100
    assert set(tree.table.unlocked()) == {node.row for node in nodes[1::2]}
    again = tree.add("again", [2, 2, 2])
    assert again.row in {node.row for node in nodes[::2]}
    assert tree.table.reuses[again.row] == 0
    assert tree.table.reuses[nodes[199].row] == 199
    tree.table.clear()
    assert len(tree.table) == 0


def test_a_split_inherits_the_past() -> None:
    tree = Tree()
    node = tree.add("node", [0, 1, 2, 2], age=3, reuses=2.0, locked=True)
    upper = Node("upper", node.levels[:1])
    node.levels = node.levels[1:]
    upper.row = tree.table.split(node.row, upper, upper.levels, node.levels)
    rows = [upper.row, node.row]
    assert tree.table.parent[rows].tolist() == [ROOT, upper.row]
    assert tree.table.first_page[rows].tolist() == [0, 1]
    assert tree.table.sinks[rows].tolist() == [1, 0]
    assert tree.table.pages[rows].tolist() == [[0] * 5, [0, 1, 2, 0, 0]]
    for column in (tree.table.used, tree.table.reuses, tree.table.locked):
        assert column[rows[0]] == column[rows[1]]


# --- relieve -------------------------------------------------------------------------------------

ladders = st.sampled_from([LADDER, Ladder.of_drops(COSTS)])


@given(tree=trees(), need=st.integers(-5, 250), ladder=ladders)
@settings(max_examples=300, deadline=None)
def test_enough_is_freed_whenever_there_is_enough(tree: Tree, need: int, ladder: Ladder) -> None:
    before = [node.levels.copy() for node in tree.nodes]
    operations = relieve(tree.table, need, ladder)
    gained = tree.gain(operations)
    if tree.held() >= need:
        assert gained >= need
    else:
        assert gained == tree.held()
        assert len(drops(operations)) == len(tree.unlocked())
    for node, levels in zip(tree.nodes, before):
        assert np.array_equal(node.levels, levels), "a policy changes nothing itself"


@given(tree=trees(), need=st.integers(1, 250))
@settings(max_examples=300, deadline=None)
def test_no_page_more_than_needed_is_touched_by_the_last_step(tree: Tree, need: int) -> None:
    operations = relieve(tree.table, need, LADDER)
    gained = tree.gain(operations)
    if drops(operations) or gained < need:
        return
    assert gained - need < max(LADDER.gain), "less than a page's step over"


@given(tree=trees(), need=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_the_cheapest_loss_goes_first(tree: Tree, need: int) -> None:
    """What was done nowhere costs more, for what it frees, than anything that was done."""
    operations = relieve(tree.table, need, LADDER)
    left = tree.after(operations)
    done, undone = [0.0], [np.inf]
    for node in tree.unlocked():
        after = left.get(node.name)
        for page, level in enumerate(node.levels.tolist()):
            if tree.first(node) + page < SINK_PAGES:
                assert after is None or after[page] == level, "sinks stay as they are"
                continue
            while level != BOTTOM and (after is None or level != after[page]):
                done.append(tree.worth(node) * LADDER.slope[level])
                level = int(LADDER.next_level[level])
            if after is not None and level != BOTTOM and LADDER.next_level[level] != BOTTOM:
                undone.append(tree.worth(node) * LADDER.slope[level])
    assert max(done) <= min(undone) * (1 + 1e-12)


@given(tree=trees(), need=st.integers(1, 300), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_the_answer_does_not_depend_on_rows(tree: Tree, need: int, seed: int) -> None:
    """Unless nodes are alike: then by rows, which every rank hands out alike."""
    other = Tree()
    other.table.clock = tree.table.clock
    for _ in range(seed):
        other.add("in the way", [0])
    for node in other.nodes:
        other.table.remove(node.row)
    other.nodes.clear()
    copies: dict[int, Node] = {}
    for node in tree.nodes:
        row = node.row
        copies[row] = other.add(
            node.name, node.levels.tolist(), copies.get(int(tree.table.parent[row])),
            age=int(tree.table.clock - tree.table.used[row]),
            reuses=float(tree.table.reuses[row]), locked=bool(tree.table.locked[row]),
        )  # fmt: skip
    one, two = relieve(tree.table, need, LADDER), relieve(other.table, need, LADDER)
    assert tree.after(one) == other.after(two)


def test_the_last_page_needed_is_the_last_page_taken() -> None:
    tree = Tree()
    tree.add("old", [0, 0, 1, 3, 0], age=9)
    tree.add("new", [0, 0, 0], age=1)
    assert lowered(relieve(tree.table, 7, LADDER)) == {"old": [4]}
    assert lowered(relieve(tree.table, 8, LADDER)) == {"old": [1, 4]}
    assert relieve(tree.table, 0, LADDER) == []


def test_old_nodes_go_down_first_and_further_down() -> None:
    tree = Tree()
    tree.add("old", [1] * 4, age=2)
    tree.add("new", [1] * 4)
    assert tree.after(relieve(tree.table, 6, LADDER)) == {"old": [0, 2, 2, 2], "new": [0, 1, 1, 1]}
    assert tree.after(relieve(tree.table, 12, LADDER))["new"] == [0, 2, 2, 2]
    far = tree.after(relieve(tree.table, 20, LADDER))
    assert far == {"old": [0, 3, 3, 3], "new": [0, 2, 2, 3]}


def test_shared_prefixes_yield_after_private_ones() -> None:
    """At the same age: a private node is several levels down before a shared one leaves its own."""
    tree = Tree()
    tree.add("shared", [1] * 5, reuses=3.0)
    tree.add("private", [1] * 5)
    order = []
    for need in (8, 16, 24, 28, 36):
        after = tree.after(relieve(tree.table, need, LADDER))
        assert all(len(set(levels[1:])) == 1 for levels in after.values())
        order.append((after["shared"][1], after["private"][1]))
    assert order == [(1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]
    operations = relieve(tree.table, 37, LADDER)
    assert tree.after(operations) == {"shared": [0, 3, 3, 3, 3]}


def test_an_old_favourite_yields_in_the_end() -> None:
    tree = Tree()
    tree.table.clock = 100
    tree.add("favourite", [1] * 5, reuses=3.0, age=20)
    tree.add("new", [1] * 5)
    assert set(lowered(relieve(tree.table, 4, LADDER))) == {"favourite"}


def test_leaves_go_before_their_parents_and_old_ones_before_new_ones() -> None:
    tree = Tree()
    root = tree.add("root", [4, 4], age=1)
    branch = tree.add("branch", [4], root, age=4)
    tree.add("old leaf", [4], branch, age=8)
    tree.add("new leaf", [4], root, age=1)
    tree.add("middle", [4, 4], age=3)
    expected = ["old leaf", "branch", "middle", "new leaf", "root"]
    for count, need in enumerate([4, 8, 28, 32, 52], start=1):
        assert drops(relieve(tree.table, need, LADDER)) == expected[:count]
    assert drops(relieve(tree.table, 10**6, LADDER)) == expected


def test_a_parent_worth_less_than_its_child_waits_for_it() -> None:
    tree = Tree()
    root = tree.add("root", [4, 4], age=50)
    tree.add("leaf", [4], root)
    tree.add("other", [4, 4], age=10)
    assert drops(relieve(tree.table, 21, LADDER)) == ["other", "leaf"]
    assert drops(relieve(tree.table, 25, LADDER)) == ["other", "leaf", "root"]


def test_nodes_of_equal_worth_are_all_lowered_before_one_is_dropped() -> None:
    tree = Tree()
    for name in "abc":
        tree.add(name, [0] * 4)
    by_lowering = 9 * (COSTS[0] - COSTS[4])
    operations = relieve(tree.table, by_lowering, LADDER)
    assert not drops(operations)
    assert all(levels == [0, 4, 4, 4] for levels in tree.after(operations).values())
    assert len(drops(relieve(tree.table, by_lowering + 1, LADDER))) == 1


def test_what_is_dropped_is_not_lowered_first() -> None:
    tree = Tree()
    tree.add("old", [0] * 4, age=40)
    tree.add("new", [0] * 4)
    operations = relieve(tree.table, 80, LADDER)
    assert drops(operations) == ["old"]
    assert "old" not in lowered(operations)


def test_before_frames_are_ready_pages_can_only_be_dropped() -> None:
    tree = Tree()
    tree.add("old", [0, 0, 0], age=2)
    tree.add("new", [0, 0, 0], age=1)
    operations = relieve(tree.table, 20, Ladder.of_drops(COSTS))
    assert drops(operations) == ["old"]
    assert not lowered(operations)


@given(tree=trees(), need=st.integers(1, 300), most=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_bounded_relief_drops_nothing_and_lowers_no_more_than_it_may(
    tree: Tree, need: int, most: int
) -> None:
    operations = relieve(tree.table, need, LADDER, drops=False, most_pages=most)
    free = relieve(tree.table, need, LADDER, drops=False)
    assert not drops(operations)
    assert sum(map(len, lowered(operations).values())) <= most
    assert tree.gain(operations) <= tree.gain(free)
    if free:
        assert operations


def test_nothing_unlocked_frees_nothing() -> None:
    tree = Tree()
    assert relieve(tree.table, 100, LADDER) == []
    tree.add("held", [0, 0], locked=True)
    assert relieve(tree.table, 100, LADDER) == []
    assert relieve(tree.table, 100, LADDER, drops=False) == []


@given(tree=trees(), need=st.integers(1, 250))
@settings(max_examples=200, deadline=None)
def test_sorting_a_part_of_the_steps_changes_nothing(tree: Tree, need: int) -> None:
    everything = relieve(tree.table, need, LADDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "SORTED_AT_FIRST", 1)
        some = relieve(tree.table, need, LADDER)
    assert tree.after(some) == tree.after(everything)
    assert drops(some) == drops(everything)


def test_of_thousands_of_nodes_few_are_touched() -> None:
    tree, chance = Tree(), random.Random(0)
    for i in range(5000):
        tree.add(
            str(i), [chance.randrange(4)] * 8, reuses=chance.random(), age=chance.randrange(99)
        )
    operations = relieve(tree.table, 40, LADDER)
    assert 1 <= len(operations) <= 40
    assert tree.gain(operations) >= 40


# --- settle --------------------------------------------------------------------------------------


def path_of(tree: Tree) -> list[NodeView]:
    return [tree.view(node) for node in tree.nodes]


@pytest.mark.parametrize("budget", [1, 2])
def test_a_prefix_settles_between_its_sinks_and_its_newest_pages(budget: int) -> None:
    tree = Tree()
    first = tree.add("first", [0, 0, 2])
    tree.add("second", [0, 1, 0, 0], first)
    operations, count = settle(path_of(tree), budget, 6, {}, 99)
    assert lowered(operations) == {"first": [1], "second": [0, 2] if budget == 1 else [0, 1, 2]}
    assert all(op.level == budget for op in operations if isinstance(op, Lower))
    assert count == (3 if budget == 1 else 4)


@given(
    tree=trees(),
    budget=st.sampled_from(LEVELS),
    end_page=st.integers(0, 12),
    most=st.integers(0, 20),
)
@settings(max_examples=200, deadline=None)
def test_settling_lowers_all_that_is_finer_and_nothing_else(
    tree: Tree, budget: int, end_page: int, most: int
) -> None:
    operations, count = settle(path_of(tree), budget, end_page, {}, most)
    down = lowered(operations)
    eligible = [
        (node.name, page)
        for node in tree.nodes
        for page, level in enumerate(node.levels)
        if SINK_PAGES <= tree.first(node) + page < end_page and level < budget
    ]
    chosen = [(name, page) for name, pages in down.items() for page in pages]
    assert chosen == eligible[:most], "in order, so that the beginning settles first"
    assert count == len(chosen)


@pytest.mark.parametrize("end_page", [0, 1])
def test_a_short_prefix_stays_as_it_is(end_page: int) -> None:
    tree = Tree()
    tree.add("prompt", [0, 0])
    assert settle(path_of(tree), 1, end_page, {}, 99) == ([], 0)


def test_what_another_request_reads_hot_is_left_alone() -> None:
    tree = Tree()
    first = tree.add("first", [0, 0, 0])
    second = tree.add("second", [0, 0], first)
    tails = {id(first): 2, id(second): 0}
    assert lowered(settle(path_of(tree), 1, 5, tails, 99)[0]) == {"first": [1]}
    del tails[id(second)]
    assert lowered(settle(path_of(tree), 1, 5, tails, 99)[0]) == {"first": [1], "second": [0, 1]}


def test_sinks_are_never_lowerable() -> None:
    for first, pages in itertools.product(range(3), range(4)):
        chosen = lowerable(np.zeros(pages, np.uint8), first, 4)
        assert all(first + page >= SINK_PAGES for page in chosen)
        assert len(chosen) == pages - max(0, min(SINK_PAGES - first, pages))
