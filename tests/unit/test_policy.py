"""Retention by age: which pages are lowered, which are dropped, and that the answer is enough."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_spherical.retention.operations import Drop, Lower, NodeView, Operation
from sglang_spherical.retention.policy import SINK_PAGES, lowerable, relieve, settle

COSTS = (16, 12, 8)
COLD = 2


@dataclass(eq=False)
class Node:
    name: str


@dataclass
class Tree:
    """Unlocked nodes as the tree shows them. A parent that is not among the views is locked."""

    views: list[NodeView] = field(default_factory=list)

    def add(
        self, name: str, levels: list[int], age: int, parent: Node | None = None, first: int = 0
    ) -> Node:
        node = Node(name)
        self.views.append(NodeView(node, parent, 0, -age, first, np.array(levels, np.uint8)))
        self.views = [self._with_children(view) for view in self.views]
        return node

    def _with_children(self, view: NodeView) -> NodeView:
        children = sum(other.parent is view.node for other in self.views)
        return NodeView(
            view.node, view.parent, children, view.last_access, view.first_page, view.levels
        )

    def held(self) -> int:
        return sum(COSTS[level] for view in self.views for level in view.levels)

    def gain(self, operations: list[Operation]) -> int:
        """What operations free, each checked to be possible when its turn comes."""
        levels = {id(view.node): view.levels.copy() for view in self.views}
        children = {id(view.node): view.children for view in self.views}
        parents = {id(view.node): view.parent for view in self.views}
        gained = 0
        for operation in operations:
            held = levels[id(operation.node)]
            if isinstance(operation, Drop):
                assert children[id(operation.node)] == 0, "a parent is dropped after its children"
                gained += sum(COSTS[level] for level in held)
                del levels[id(operation.node)]
                if id(parents[id(operation.node)]) in children:
                    children[id(parents[id(operation.node)])] -= 1
            else:
                assert len(set(operation.pages.tolist())) == len(operation.pages)
                for page in operation.pages:
                    assert held[page] < operation.level, "lowering never raises"
                    gained += COSTS[held[page]] - COSTS[operation.level]
                    held[page] = operation.level
        return gained


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    tree, nodes = Tree(), []
    ages = draw(st.permutations(range(draw(st.integers(1, 7)))))
    for i, age in enumerate(ages):
        levels = draw(st.lists(st.integers(0, COLD), min_size=1, max_size=5))
        place = draw(st.integers(-1, len(nodes) - 1))
        parent, first = nodes[place] if place >= 0 else (None, 0)
        if parent is None and draw(st.booleans()):
            parent, first = Node("locked"), draw(st.integers(1, 3))
        node = tree.add(str(i), levels, age, parent, first)
        nodes.append((node, first + len(levels)))
    return tree


def drops(operations: list[Operation]) -> list[str]:
    return [op.node.name for op in operations if isinstance(op, Drop)]


def lowered(operations: list[Operation]) -> dict[str, list[int]]:
    return {op.node.name: op.pages.tolist() for op in operations if isinstance(op, Lower)}


# --- relieve -------------------------------------------------------------------------------------


@given(tree=trees(), need=st.integers(-5, 600), coldest=st.integers(0, COLD))
@settings(max_examples=300, deadline=None)
def test_enough_is_freed_whenever_there_is_enough(tree: Tree, need: int, coldest: int) -> None:
    before = [view.levels.copy() for view in tree.views]
    operations = relieve(tree.views, need, COSTS, coldest)
    gained = tree.gain(operations)
    if tree.held() >= need:
        assert gained >= need
    else:
        assert gained == tree.held()
        assert len(drops(operations)) == len(tree.views)
    for view, levels in zip(tree.views, before):
        assert np.array_equal(view.levels, levels), "a policy changes nothing itself"


@given(tree=trees(), need=st.integers(1, 600), coldest=st.integers(0, COLD))
@settings(max_examples=300, deadline=None)
def test_nothing_is_dropped_that_lowering_could_spare(tree: Tree, need: int, coldest: int) -> None:
    operations = relieve(tree.views, need, COSTS, coldest)
    everything = [
        Lower(view.node, pages, coldest)
        for view in tree.views
        if len(pages := lowerable(view.levels, view.first_page, coldest))
    ]
    by_lowering = tree.gain(everything)
    dropped = drops(operations)
    if by_lowering >= need:
        assert not dropped
        return
    spared = dropped.pop()  # one drop fewer would not have been enough
    kept = [op for op in everything if op.node.name not in dropped]
    without_last = [op for op in operations if isinstance(op, Drop) and op.node.name != spared]
    assert tree.gain([*without_last, *kept]) < need


@given(tree=trees(), need=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_sinks_stay_hot_and_the_oldest_yield_first(tree: Tree, need: int) -> None:
    operations = relieve(tree.views, need, COSTS, COLD)
    down, gone = lowered(operations), drops(operations)
    assert not set(down) & set(gone), "what is dropped is not re-encoded first"
    by_age = sorted(tree.views, key=lambda view: view.last_access)
    started = [view for view in by_age if view.node.name in down]
    for view in started:
        pages = down[view.node.name]
        assert all(view.first_page + page >= SINK_PAGES for page in pages)
        assert pages == sorted(pages, reverse=True), "from the end of the prefix"
    for older, newer in itertools.pairwise(by_age):
        if newer.node.name in down and older.node.name not in gone:
            rest = lowerable(older.levels, older.first_page, COLD)
            assert set(rest) == set(down.get(older.node.name, [])), "older nodes yield all first"


@given(tree=trees(), need=st.integers(1, 300), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_the_answer_depends_on_age_and_not_on_the_order_of_views(
    tree: Tree, need: int, seed: int
) -> None:
    shuffled = random.Random(seed).sample(tree.views, len(tree.views))
    one, other = relieve(tree.views, need, COSTS, COLD), relieve(shuffled, need, COSTS, COLD)
    assert drops(one) == drops(other)
    assert lowered(one) == lowered(other)


def test_the_last_page_needed_is_the_last_page_taken() -> None:
    tree = Tree()
    tree.add("old", [0, 0, 1, 2, 0], age=9)
    tree.add("new", [0, 0, 0], age=1)
    assert lowered(relieve(tree.views, 8, COSTS, COLD)) == {"old": [4]}
    assert lowered(relieve(tree.views, 9, COSTS, COLD)) == {"old": [4, 2]}
    assert lowered(relieve(tree.views, 13, COSTS, COLD)) == {"old": [4, 2, 1]}
    assert lowered(relieve(tree.views, 21, COSTS, COLD)) == {"old": [4, 2, 1], "new": [2]}
    assert relieve(tree.views, 0, COSTS, COLD) == []


def test_leaves_go_before_their_parents_and_old_ones_before_new_ones() -> None:
    tree = Tree()
    root = tree.add("root", [2, 2], age=10)
    branch = tree.add("branch", [2], age=9, parent=root, first=2)
    tree.add("old leaf", [2], age=8, parent=branch, first=3)
    tree.add("new leaf", [2], age=1, parent=root, first=2)
    tree.add("middle", [2, 2], age=5)
    expected = ["old leaf", "branch", "middle", "new leaf", "root"]
    for count, need in enumerate([8, 16, 32, 40, 56], start=1):
        assert drops(relieve(tree.views, need, COSTS, COLD)) == expected[:count]
    assert drops(relieve(tree.views, 10**6, COSTS, COLD)) == expected


def test_before_frames_are_ready_pages_can_only_be_dropped() -> None:
    tree = Tree()
    tree.add("old", [0, 0, 0], age=2)
    tree.add("new", [0, 0, 0], age=1)
    operations = relieve(tree.views, 20, COSTS, coldest=0)
    assert drops(operations) == ["old"]
    assert not lowered(operations)


def test_nothing_unlocked_frees_nothing() -> None:
    assert relieve([], 100, COSTS, COLD) == []


# --- settle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2])
def test_a_prefix_settles_between_its_sinks_and_its_newest_pages(budget: int) -> None:
    tree = Tree()
    first = tree.add("first", [0, 0, 2], age=2)
    tree.add("second", [0, 1, 0, 0], age=1, parent=first, first=3)
    operations = settle(tree.views, budget, 6, {})
    wanted = {"first": [1], "second": [0, 2] if budget == 1 else [0, 1, 2]}
    assert lowered(operations) == wanted
    assert all(op.level == budget for op in operations if isinstance(op, Lower))


@given(tree=trees(), budget=st.integers(0, COLD), end_page=st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_settling_lowers_all_that_is_finer_and_nothing_else(
    tree: Tree, budget: int, end_page: int
) -> None:
    down = lowered(settle(tree.views, budget, end_page, {}))
    for view in tree.views:
        for page, level in enumerate(view.levels):
            place = view.first_page + page
            eligible = SINK_PAGES <= place < end_page and level < budget
            assert (page in down.get(view.node.name, [])) == eligible


@pytest.mark.parametrize("end_page", [0, 1])
def test_a_short_prefix_stays_as_it_is(end_page: int) -> None:
    tree = Tree()
    tree.add("prompt", [0, 0], age=1)
    assert settle(tree.views, 1, end_page, {}) == []


def test_what_another_request_reads_hot_is_left_alone() -> None:
    tree = Tree()
    first = tree.add("first", [0, 0, 0], age=2)
    second = tree.add("second", [0, 0], age=1, parent=first, first=3)
    tails = {id(view.node): 2 if view.node is first else 0 for view in tree.views}
    assert lowered(settle(tree.views, 1, 5, tails)) == {"first": [1]}
    del tails[id(second)]
    assert lowered(settle(tree.views, 1, 5, tails)) == {"first": [1], "second": [0, 1]}
