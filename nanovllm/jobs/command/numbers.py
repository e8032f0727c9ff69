"""A set of line numbers, small enough for a file of a hundred million lines."""

from __future__ import annotations

NUMBERS_PER_PAGE = 1 << 16  # a page of the bitmap takes 8 KiB


class NumberSet:
    """A bitmap in pages, which are made when they are needed: a bit for each line that is done.

    A hundred million lines take 12.5 MB. A number that is absurdly large, as in a file that
    somebody has edited, takes one page and not gigabytes.
    """

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._count = 0

    def add(self, number: int) -> None:
        """Put a number into the set; it may be there already."""
        index, place = divmod(number, NUMBERS_PER_PAGE)
        if index not in self._pages:
            self._pages[index] = bytearray(NUMBERS_PER_PAGE // 8)
        page = self._pages[index]
        byte, bit = divmod(place, 8)
        if not page[byte] >> bit & 1:
            page[byte] |= 1 << bit
            self._count += 1

    def __contains__(self, number: int) -> bool:
        index, place = divmod(number, NUMBERS_PER_PAGE)
        page = self._pages.get(index)
        return page is not None and bool(page[place // 8] >> (place % 8) & 1)

    def __len__(self) -> int:
        return self._count
