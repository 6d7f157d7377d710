"""Rebuilds one table from a topic that walferry writes, by proto/envelope.proto and nothing else.

Usage: outside.py DIRECTORY SCHEMA TABLE < records
DIRECTORY has envelope_pb2.py, made by protoc. The records come from kcat as a 32-bit length and as
many bytes each. Prints the rows, sorted, columns between |, NULL as \\N.
"""

import struct
import sys

sys.path.insert(0, sys.argv[1])
import envelope_pb2  # noqa: E402  (made by protoc)


def records(stream):
    while head := stream.read(4):
        (length,) = struct.unpack(">i", head)
        yield stream.read(length)


def columns(row):
    """TupleData: None for NULL, False for a value that was not changed, else bytes."""
    (count,), at, values = struct.unpack_from(">H", row), 2, []
    for _ in range(count):
        kind, at = row[at : at + 1], at + 1
        if kind in b"tb":
            (length,) = struct.unpack_from(">I", row, at)
            values.append(row[at + 4 : at + 4 + length])
            at += 4 + length
        else:
            values.append(None if kind == b"n" else False)
    return values


class Table:
    def __init__(self, schema, name):
        self.name, self.rows = (schema, name), {}

    def key(self, relation, values):
        return tuple(v for c, v in zip(relation.columns, values) if c.key)

    def apply(self, change, relations):
        kind = change.WhichOneof("kind")
        if kind == "message":
            return
        if kind == "truncate":
            names = [(relations[i].schema, relations[i].name) for i in change.truncate.relations]
            if self.name in names:
                self.rows.clear()
            return
        body = getattr(change, kind)
        relation = relations[body.relation]
        if (relation.schema, relation.name) != self.name:
            return
        before = None
        if kind != "insert" and body.HasField("old"):
            before = self.rows.pop(self.key(relation, columns(body.old.row)))
        if kind == "delete":
            return
        new = columns(body.new)
        key = self.key(relation, new)
        before = before or self.rows.get(key)
        self.rows[key] = [old if v is False else v for v, old in zip(new, before or new)]


def whole_transactions(stream):
    """Lists of (changes, relations) in commit order, each transaction once."""
    position, open_, pieces = 0, None, b""
    for value in records(stream):
        envelope = envelope_pb2.Envelope.FromString(value)
        assert envelope.version == 1, envelope.version
        if envelope.previous_lsn > position and position:
            raise SystemExit(f"records between {position} and {envelope.previous_lsn} are gone")
        content = envelope.WhichOneof("content")
        if content == "idle":
            position = max(position, envelope.idle.lsn)
        if content == "fragment":
            pieces = (pieces if envelope.fragment.index else b"") + envelope.fragment.content
            if not envelope.fragment.last:
                continue
            chunk = envelope_pb2.Chunk.FromString(pieces)
        elif content == "chunk":
            chunk = envelope.chunk
        else:
            continue
        if chunk.begin.commit_lsn < position:
            continue
        if chunk.number == 0:
            open_ = (envelope.writer_id, [])
        elif open_ is None or open_[0] != envelope.writer_id or len(open_[1]) != chunk.number:
            continue
        open_[1].append((chunk.changes, {relation.id: relation for relation in chunk.relations}))
        if chunk.HasField("commit"):
            yield open_[1]
            position, open_ = chunk.commit.end_lsn, None


table = Table(*sys.argv[2:4])
for transaction in whole_transactions(sys.stdin.buffer):
    for changes, relations in transaction:
        for change in changes:
            table.apply(change, relations)
lines = [b"|".join(b"\\N" if v is None else v for v in row) for row in table.rows.values()]
sys.stdout.buffer.write(b"".join(line + b"\n" for line in sorted(lines)))
