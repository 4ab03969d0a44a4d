"""What lies between two places of a file: bytes, lines, and the CRC-32C, also of joined parts.

Processes that read ranges of one file give one extent each; joined in order they are the file's.
"""

from dataclasses import dataclass

import google_crc32c

# The CRC's polynomial, its highest power in the lowest bit.
_POLYNOMIAL = 0x82F63B78
_ONE, _X = 1 << 31, 1 << 30


@dataclass
class Extent:
    """Bytes from `start` to `end`, the lines that they hold, and their CRC-32C."""

    start: int = 0
    end: int = 0
    num_rows: int = 0
    crc: int = 0

    @property
    def fingerprint(self) -> tuple[int, str]:
        """Number of bytes, and CRC-32C as eight hex digits."""
        return self.end - self.start, f"{self.crc:08x}"

    def add(self, data: bytes) -> None:
        """Appends bytes."""
        self.end += len(data)
        self.crc = google_crc32c.extend(self.crc, data)

    def join(self, other: "Extent") -> None:
        """Appends the extent that begins where this one ends; one without lines adds nothing."""
        if not other.num_rows:
            return
        assert other.start == self.end, (self, other)
        # Each byte that follows multiplies the remainder by x^8.
        shifted = _multiply(_power_of_x(8 * (other.end - other.start)), self.crc)
        self.crc = shifted ^ other.crc
        self.end = other.end
        self.num_rows += other.num_rows


def _multiply(left: int, right: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = left << 1 & 0xFFFFFFFF
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product


def _power_of_x(exponent: int) -> int:
    """x to a power, modulo the CRC's polynomial, by repeated squaring."""
    if exponent < 2:
        return _X if exponent else _ONE
    half = _power_of_x(exponent // 2)
    square = _multiply(half, half)
    return _multiply(_X, square) if exponent % 2 else square
