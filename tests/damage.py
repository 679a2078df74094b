"""Damage to files, from a seeded `random.Random`."""

import json

STRANGE = (
    None,
    True,
    0,
    -1,
    7,
    2**40,
    10**400,
    1.5,
    -1e300,
    "",
    "x",
    "os.system",
    [],
    [0],
    [[1, 2]],
    {},
    {"x": 1},
    [{}],
)


def damage(draw, path):
    """Damage one file; returns what was done."""
    kinds = [flip, flip, cut, lengthen, invert]
    if path.suffix == ".json":
        kinds += [exchange, exchange, exchange, leave_out, leave_out, repeat, nest]
    kind = draw.choice(kinds)
    kind(draw, path)
    return f"{kind.__name__} in {path.name}"


def flip(draw, path):
    """Some bits; more often near the start, where headers are."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 8])):
        end = draw.choice([16, 600, len(content)])
        content[draw.randrange(min(end, len(content)))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(draw, path):
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def lengthen(draw, path):
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 8, 100])))


def invert(draw, path):
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    length = min(draw.choice([1, 8, 64]), len(content) - start)
    content[start : start + length] = bytes(byte ^ 0xFF for byte in content[start : start + length])
    path.write_bytes(content)


def places(content):
    """Every container of a document with each of its keys or indices."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def edit(draw, path, change):
    content = json.loads(path.read_text())
    found = list(places(content))
    change(*draw.choice(found))
    path.write_text(json.dumps(content))


def exchange(draw, path):
    def change(parent, key):
        parent[key] = draw.choice(STRANGE)

    edit(draw, path, change)


def leave_out(draw, path):
    edit(draw, path, lambda parent, key: parent.pop(key))


def repeat(draw, path):
    text = path.read_text()
    key = draw.choice([key for parent, key in places(json.loads(text)) if isinstance(key, str)])
    path.write_text(text.replace(json.dumps(key) + ":", f"{json.dumps(key)}: 1, {json.dumps(key)}:", 1))


def nest(draw, path):
    depth = draw.choice([70, 5000])

    def change(parent, key):
        parent[key] = "PLACE"

    edit(draw, path, change)
    path.write_text(path.read_text().replace('"PLACE"', "[" * depth + "]" * depth))
