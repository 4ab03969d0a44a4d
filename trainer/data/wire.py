"""Protocol buffers and TFRecord files by hand, for processes that must not import TensorFlow."""

import functools
import struct
from collections.abc import Iterator
from typing import BinaryIO

from google_crc32c import value as crc32c

_FRAME_BYTES = 16  # Of a TFRecord: its length (8), two checksums (4 each).
_VARINTS: dict[int, bytes] = {}


@functools.cache
def _varint(number: int) -> bytes:
    """A number in seven-bit groups, the lowest first."""
    digits, rest = bytearray(), number
    while rest > 127:
        digits.append(rest & 127 | 128)
        rest >>= 7
    digits.append(rest)
    return bytes(digits)


def _packed_varints(numbers: list[int]) -> bytes:
    """Varints one after the other; each number's is computed once a process."""
    try:
        return b"".join(map(_VARINTS.__getitem__, numbers))
    except KeyError:
        _VARINTS.update((number, _varint(number)) for number in numbers)
        return b"".join(map(_VARINTS.__getitem__, numbers))


def encode_field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def encode_int64_feature(encoded_name: bytes, values: list[int]) -> bytes:
    """An entry of a `tf.train.Features` map that holds whole numbers, none of them negative.

    Args:
      encoded_name: the feature's name as `encode_field(1, name)` gives it.
      values: the numbers, in order.
    """
    packed = _packed_varints(values)
    value = encode_field(3, encode_field(1, packed) if packed else b"")
    return encode_field(1, encoded_name + encode_field(2, value))


def encode_bytes_feature(encoded_name: bytes, values: list[bytes]) -> bytes:
    """An entry of a `tf.train.Features` map that holds byte strings."""
    strings = b"".join([encode_field(1, value) for value in values])
    return encode_field(1, encoded_name + encode_field(2, encode_field(1, strings)))


def decode_fields(message: bytes) -> Iterator[bytes]:
    """The payloads of a protocol buffer all of whose fields are length-delimited."""
    at = 0
    while at < len(message):
        _, at = _decode_varint(message, at)
        length, at = _decode_varint(message, at)
        yield message[at : at + length]
        at += length


def _decode_varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint that begins at a place, and the place behind it."""
    number = shift = 0
    while message[at] > 127:
        number |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return number | message[at] << shift, at + 1


def frame_records(records: list[bytes]) -> list[bytes]:
    """Records as they stand in a TFRecord file: length, its checksum, record, its checksum."""
    framed = []
    for record in records:
        length = struct.pack("<Q", len(record))
        checksums = masked_checksum(length), masked_checksum(record)
        framed.append(b"".join((length, checksums[0], record, checksums[1])))
    return framed


def masked_checksum(data: bytes) -> bytes:
    """The checksum of some bytes as a TFRecord file holds it: CRC-32C, masked, little-endian."""
    crc = crc32c(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def frame_starts(framed: bytes) -> list[int]:
    """Where each of the framed records begins of which some bytes consist."""
    starts = []
    start = 0
    while start < len(framed):
        starts.append(start)
        (length,) = struct.unpack_from("<Q", framed, start)
        start += length + _FRAME_BYTES
    return starts


def read_frame(file: BinaryIO, place: int) -> bytes:
    """The record at a place, counted from 0, of a TFRecord file; its checksums are not looked at.

    Args:
      file: open at its beginning.
      place: of the record.

    Raises:
      EOFError: if the file has no such record.
    """
    for _ in range(place + 1):
        head = file.read(12)
        if len(head) < 12:
            raise EOFError(f"no record {place}")
        (length,) = struct.unpack_from("<Q", head)
        start = file.tell()
        file.seek(start + length + 4)
    file.seek(start)
    return file.read(length)
