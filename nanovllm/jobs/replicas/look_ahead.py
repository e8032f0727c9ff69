"""The lines that wait for a replica, and which of them each replica gets next.

An engine computes a prefix that several prompts have in common once, if they come to it one soon
after another. So lines that begin alike go to the same replica, and in a row.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque

from nanovllm.jobs.replicas.task import Task

# Where the prompt of a line begins. Inside a JSON string there is no such thing: there, quotation
# marks come with a backslash.
PROMPT = re.compile(rb'"(?:messages|prompt|input)"\s*:\s*')
PROMPT_BEGINS = 16384  # bytes of a line in which its prompt is looked for
# How many blocks of the KV cache the levels of the tree stand for. Where lines have a header in
# common and then a document, one of the levels should end in the document.
LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
BYTES_PER_TOKEN = 4  # roughly, of most texts
MAX_LINES = 4096  # that wait
MAX_OWNED = 16384  # prefixes of which it is remembered which replica has computed them


def prefix_keys(data: bytes, num_bytes: tuple[int, ...]) -> tuple[int, ...]:
    """Hash what the prompt of a line begins with: as many of its bytes as `num_bytes` says, in
    ascending order. Of a short prompt there are fewer hashes.

    The line is not parsed, which would cost the main process more than all else it does. Where the
    prompt ends is not known either: what follows a short one in the line counts as part of it.
    """
    match = PROMPT.search(data, 0, PROMPT_BEGINS)
    start = 0 if match is None else match.end()
    position = start
    key = 0
    keys = []
    for length in num_bytes:
        end = start + length
        key = hash((key, data[position:end]))
        keys.append(key)
        if end >= len(data):
            break
        position = end
    return tuple(keys)


class PrefixNode:
    r"""The lines that begin alike; a node of a tree that branches where they go on differently.

            all lines                      the root
             /     \
          [ab..]   [x...]                  their first 1,024 bytes
          /    \        \
      [abc..] [abd..]   [xyz..]            their first 2,048 bytes, and so on

    A node is there as long as lines below it wait. Its owner is the replica that got a line of it
    first, and so has its prefix in its cache.
    """

    __slots__ = ("children", "key", "owned", "owner", "parent", "tasks", "unowned")

    def __init__(self, parent: PrefixNode | None, key: int, owner: int | None) -> None:
        self.parent = parent
        self.key = key
        self.owner = owner
        self.tasks: deque[Task] = deque()  # whose prompts are too short for another level
        self.children: OrderedDict[int, PrefixNode] = OrderedDict()
        # The same children again, oldest first: those without an owner, those of each replica.
        self.unowned: OrderedDict[int, PrefixNode] = OrderedDict()
        self.owned: dict[int, OrderedDict[int, PrefixNode]] = {}

    def siblings(self) -> OrderedDict[int, PrefixNode]:
        """The children of its parent that have the same owner, or none, and itself."""
        assert self.parent is not None
        if self.owner is None:
            return self.parent.unowned
        return self.parent.owned.setdefault(self.owner, OrderedDict())

    def find(self, replica: int, may_steal: bool) -> PrefixNode | None:
        """The node whose line `replica` had best get next: one of its own before one of nobody's.
        If it may steal, one of another replica's is taken rather than none: the newest, to which
        its owner would come last.
        """
        if self.tasks:
            return self
        for children in (self.owned.get(replica), self.unowned):
            if children:
                node = next(iter(children.values())).find(replica, may_steal=False)
                if node is not None:
                    return node
        if may_steal and self.children:
            return next(reversed(self.children.values())).find(replica, may_steal=True)
        return None


class LookAhead:
    """Lines that wait, in the order of their prefixes. Not thread-safe.

    - A replica goes on with what the line before began with, as far as there are such lines.
    - Then it gets the oldest lines whose prefix nobody has computed yet.
    - If there are none it steals those of another: no replica is idle while a line waits.
    - A line that has waited for long goes first.
    """

    def __init__(self, block_size: int, max_lines: int = MAX_LINES) -> None:
        block_bytes = block_size * BYTES_PER_TOKEN  # less than a whole block is never shared
        self.num_bytes = tuple(block_bytes * level for level in LEVELS)
        self.max_lines = max_lines
        self.num_added = 0
        self.root = PrefixNode(None, 0, None)
        self.order: deque[Task] = deque()  # oldest first; holds lines that are gone, too
        self.waiting: set[int] = set()  # indices of those that are not
        self.last_keys: dict[int, tuple[int, ...]] = {}  # of what each replica got last
        # Owners of nodes, whether they are there or not; those that were used last at the end.
        self.owners: OrderedDict[int, int] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """How many lines wait."""
        return len(self.waiting)

    def add(self, task: Task) -> None:
        """Have a line wait, whether there is room or not."""
        task.prefix_keys = prefix_keys(task.line.data, self.num_bytes)
        task.index = self.num_added
        self.num_added += 1
        self.waiting.add(task.index)
        self.order.append(task)
        node = self.root
        for key in task.prefix_keys:
            child = node.children.get(key)
            if child is None:
                child = PrefixNode(node, key, self.owners.get(key))
                node.children[key] = child
                child.siblings()[key] = child
            node = child
        node.tasks.append(task)

    def take(self, replica: int, may_steal: bool = True) -> Task | None:
        """The next line for a replica; None if none waits that it may have."""
        if not self.waiting:
            return None
        node = self._overdue() or self._next_node(replica, may_steal)
        if node is None:
            return None
        task = node.tasks.popleft()
        self.waiting.remove(task.index)
        self.last_keys[replica] = task.prefix_keys
        self._claim(node, replica)
        self._prune(node)
        return task

    def _overdue(self) -> PrefixNode | None:
        """The node of the oldest line, if that has waited for too long."""
        while self.order[0].index not in self.waiting:
            self.order.popleft()
        oldest = self.order[0]
        num_newer = self.num_added - oldest.index
        if num_newer <= 2 * self.max_lines:
            return None
        return self._path(oldest.prefix_keys)[-1]

    def _path(self, keys: tuple[int, ...]) -> list[PrefixNode]:
        """The nodes from the root down along `keys`, as far as they are there."""
        path = [self.root]
        for key in keys:
            if key not in path[-1].children:
                break
            path.append(path[-1].children[key])
        return path

    def _next_node(self, replica: int, may_steal: bool) -> PrefixNode | None:
        for node in reversed(self._path(self.last_keys.get(replica, ()))):
            found = node.find(replica, may_steal=False)
            if found is not None:
                return found
        return self.root.find(replica, may_steal=True) if may_steal else None

    def _claim(self, node: PrefixNode, replica: int) -> None:
        """Make a replica the owner of what has none, from a node up to the root."""
        while node.parent is not None:
            if node.owner is None:
                del node.siblings()[node.key]
                node.owner = replica
                node.siblings()[node.key] = node
            self.owners[node.key] = node.owner
            self.owners.move_to_end(node.key)
            node = node.parent
        while len(self.owners) > MAX_OWNED:
            self.owners.popitem(last=False)

    def _prune(self, node: PrefixNode) -> None:
        """Remove a node with nothing left below it, and what this empties above it."""
        while node.parent is not None and not node.tasks and not node.children:
            del node.siblings()[node.key]
            del node.parent.children[node.key]
            node = node.parent
