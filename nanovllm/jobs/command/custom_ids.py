"""Which line brought a `custom_id` first: two lines with the same one could not be told apart."""

from __future__ import annotations

import json
import re

import numpy as np
import xxhash

# The usual place of the id, first in the line, where it can be read without parsing the rest.
FIRST_KEY = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*"([^"\\]*)"')
FIRST_TABLE = 1 << 16  # slots
FULLEST = 0.75  # share of the slots in use; beyond, a search would look at too many of them
LOW_32 = (1 << 32) - 1


def find_custom_id(data: bytes) -> bytes | None:
    """The custom_id of an input line, as UTF-8, or None if it has none or is no JSON object."""
    first = FIRST_KEY.match(data)
    if first is not None:
        return first[1]
    if b'"custom_id"' not in data:
        return None
    try:
        custom_id = json.loads(data)["custom_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # whatever is wrong with the line is said by whoever runs it
    return custom_id.encode(errors="surrogatepass") if isinstance(custom_id, str) else None


class CustomIds:
    """The number of the first line of each id, in 21 to 43 bytes an id, however long the ids are.

    What is kept of an id is 96 bits of its hash. That two different ids of a billion lines agree in
    all of them happens in one job of a hundred billion. (With 64 bits it would be one job of forty,
    in which a line is refused for nothing.)
    """

    def __init__(self) -> None:
        # Each table is twice as large as the one before, and only the last one has room. (One table
        # that grows would stop the job for seconds whenever all its ids are moved.)
        self._tables = [_Table(FIRST_TABLE)]

    def first_line(self, custom_id: bytes, number: int) -> int:
        """The number of the first line with this id: `number` itself, if the id is new."""
        digest = xxhash.xxh3_128_intdigest(custom_id)
        key = digest >> 64
        check = digest & LOW_32
        for table in reversed(self._tables):
            slot = table.find(key, check)
            if table.numbers[slot]:
                return table.numbers[slot]
        if number > LOW_32:
            return number  # the tables hold the first four billion lines, and that is all they hold
        if self._tables[-1].is_full:
            self._tables.append(_Table(2 * self._tables[-1].num_slots))
        self._tables[-1].put(key, check, number)
        return number


class _Table:
    """A hash table with open addressing: an id lies in the first free slot from its own place on.

    Its columns are NumPy's memory, as a dict takes 150 bytes an id. As memoryviews they are read
    twice as fast.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots  # a power of two
        self.num_used = 0
        self.keys = np.zeros(num_slots, np.uint64).data
        self.checks = np.zeros(num_slots, np.uint32).data
        self.numbers = np.zeros(num_slots, np.uint32).data  # of lines; 0: the slot is free

    @property
    def is_full(self) -> bool:
        """Whether another id would make searches long."""
        return self.num_used >= FULLEST * self.num_slots

    def find(self, key: int, check: int) -> int:
        """The slot of an id, or the free one where it would lie."""
        slot = key % self.num_slots
        while self.numbers[slot] and (self.keys[slot] != key or self.checks[slot] != check):
            slot = (slot + 1) % self.num_slots
        return slot

    def put(self, key: int, check: int, number: int) -> None:
        """Keep an id that is not there."""
        slot = self.find(key, check)
        self.keys[slot] = key
        self.checks[slot] = check
        self.numbers[slot] = number
        self.num_used += 1
