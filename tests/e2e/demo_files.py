"""Small files of many types, made here, and what the `magika` package 1.0.3 says each of them is.

The labels are the package's own answers (`Magika().identify_bytes(content).prediction.output.label`), written down.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import pickle
import sqlite3
import struct
import tarfile
import wave
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

_PROSE = (
    "The harbour was quiet that morning. Two boats lay against the wall, and an old man was mending a net while his "
    "dog slept in the sun. Nobody spoke. When the bell rang at nine, the man put down his needle and went to see who "
    "was there.\n"
)


def _png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\x00" + bytes((x * 5 + y * 3) % 256 for x in range(64 * 3)) for y in range(64))
    head = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _bmp() -> bytes:
    pixels = bytes((x * 7) % 256 for x in range(48 * 48 * 3))
    head = b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, 48, 48, 1, 24, 0, len(pixels), 2835, 2835, 0, 0) + pixels


def _gif() -> bytes:
    palette = bytes(value for gray in range(4) for value in (gray * 80,) * 3)
    image = b"\x2c" + struct.pack("<HHHHB", 0, 0, 3, 3, 0) + b"\x02\x05\x84\x1d\x81\x7a\x50\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 3, 3, 0xF1, 0, 0) + palette + image + b"\x3b"


def _pdf() -> bytes:
    text = b"BT /F1 24 Tf 72 720 Td (Hello from a small PDF) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(text), text),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return bytes(out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start))


def _wav() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(n / 9))) for n in range(4000)))
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name in ("readme.txt", "notes/today.txt"):
            out.writestr(zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6)), _PROSE)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as out:
        info = tarfile.TarInfo("readme.txt")
        info.size = len(_PROSE.encode())
        out.addfile(info, io.BytesIO(_PROSE.encode()))
    return file.getvalue()


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(200, dtype=np.float32).reshape(10, 20))
    return file.getvalue()


def _sqlite() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.db"
        connection = sqlite3.connect(path)
        connection.execute("create table person (name text, age int)")
        connection.executemany("insert into person values (?, ?)", [(f"person {n}", n) for n in range(50)])
        connection.commit()
        connection.close()
        return path.read_bytes()


_PYTHON = '''"""Counts words."""

import sys
from collections import Counter


def count(text: str) -> Counter[str]:
    words = Counter()
    for line in text.splitlines():
        for word in line.lower().split():
            words[word.strip(".,;!?")] += 1
    return words


if __name__ == "__main__":
    for word, number in count(sys.stdin.read()).most_common(10):
        print(f"{number:6} {word}")
'''
_C = """#include <stdio.h>
#include <stdlib.h>

struct node { int value; struct node *next; };

static struct node *push(struct node *head, int value) {
    struct node *fresh = malloc(sizeof *fresh);
    if (fresh == NULL) { perror("malloc"); exit(1); }
    fresh->value = value;
    fresh->next = head;
    return fresh;
}

int main(void) {
    struct node *list = NULL;
    for (int i = 0; i < 10; i++) list = push(list, i * i);
    for (struct node *n = list; n != NULL; n = n->next) printf("%d\\n", n->value);
    return 0;
}
"""
_HTML = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>A page</title>
<style>body { font-family: sans-serif; margin: 2em }</style></head>
<body><h1>Hello</h1><p>This is a <a href="/next">link</a> in a paragraph.</p>
<ul><li>one</li><li>two</li></ul></body></html>
"""
_JAVASCRIPT = """'use strict';
const http = require('http');
function handler(request, response) {
  const url = new URL(request.url, 'http://localhost');
  if (url.pathname === '/health') { response.writeHead(200); return response.end('ok'); }
  response.writeHead(404, { 'Content-Type': 'application/json' });
  response.end(JSON.stringify({ error: 'not found', path: url.pathname }));
}
http.createServer(handler).listen(8080, () => console.log('listening'));
module.exports = { handler };
"""
_SHELL = """#!/bin/sh
set -eu
for file in "$@"; do
    if [ -f "$file" ]; then
        echo "compressing $file"
        gzip -k "$file" || exit 1
    else
        echo "no such file: $file" >&2
    fi
done
"""
_SQL = """CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT NOT NULL, total NUMERIC(10, 2));
INSERT INTO orders (customer, total) VALUES ('Ada', 12.50), ('Grace', 99.95);
SELECT customer, SUM(total) AS spent FROM orders GROUP BY customer HAVING SUM(total) > 10 ORDER BY spent DESC;
CREATE INDEX orders_by_customer ON orders (customer);
"""
_MARKDOWN = """# A small library

It does **one** thing and does it *well*.

## Installing

```sh
pip install small
```

- fast
- [documented](https://example.org/docs)

| name | meaning |
|------|---------|
| `x`  | a value |
"""
_CSS = """body { margin: 0; font: 16px/1.5 "Helvetica Neue", sans-serif; color: #222 }
.card > h2:first-child { padding: 4px 8px; border-bottom: 1px solid rgba(0, 0, 0, .2) }
@media (max-width: 600px) { .card { display: none } a:hover { color: red !important } }
"""
_XML = """<?xml version="1.0" encoding="UTF-8"?>
<catalog><book id="1"><title>Walden</title><year>1854</year></book>
<book id="2"><title>Emma</title><year>1815</year></book></catalog>
"""
_JSON = """{
  "name": "doorstep",
  "ports": [8000, 8001, 8002],
  "tls": false,
  "limits": {"body": 67108864, "headers": null}
}
"""
_CSV = "name,age,city\n" + "".join(f"person {n},{20 + n},City {n % 7}\n" for n in range(30))
_YAML = """version: "3"
services:
  web:
    image: nginx:latest
    ports:
      - "8080:80"
    environment:
      - MODE=production
  cache:
    image: redis
"""
_RUST = """use std::collections::HashMap;

fn main() {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for word in "a b a c b a".split_whitespace() {
        *counts.entry(word).or_insert(0) += 1;
    }
    if let Some((word, n)) = counts.iter().max_by_key(|(_, n)| **n) {
        println!("{word}: {n}");
    }
}
"""

FILES: dict[str, tuple[bytes, str]] = {  # name → (content, magika's label)
    "picture.png": (_png(), "png"),
    "picture.bmp": (_bmp(), "bmp"),
    "picture.gif": (_gif(), "gif"),
    "paper.pdf": (_pdf(), "pdf"),
    "tone.wav": (_wav(), "wav"),
    "both.zip": (_zip(), "zip"),
    "one.tar": (_tar(), "tar"),
    "prose.gz": (gzip.compress(_PROSE.encode() * 20, mtime=0), "gzip"),
    "prose.bz2": (bz2.compress(_PROSE.encode() * 20), "bzip"),
    "prose.xz": (lzma.compress(_PROSE.encode() * 20), "xz"),
    "array.npy": (_npy(), "npy"),
    "people.db": (_sqlite(), "sqlite"),
    "dict.pickle": (pickle.dumps({"a": list(range(50)), "b": "text", "c": (1.5, None)}, protocol=4), "pickle"),
    "count.py": (_PYTHON.encode(), "python"),
    "list.c": (_C.encode(), "c"),
    "page.html": (_HTML.encode(), "html"),
    "server.js": (_JAVASCRIPT.encode(), "javascript"),
    "compress.sh": (_SHELL.encode(), "shell"),
    "orders.sql": (_SQL.encode(), "sql"),
    "README.md": (_MARKDOWN.encode(), "markdown"),
    "style.css": (_CSS.encode(), "css"),
    "books.xml": (_XML.encode(), "xml"),
    "config.json": (_JSON.encode(), "json"),
    "people.csv": (_CSV.encode(), "csv"),
    "compose.yaml": (_YAML.encode(), "yaml"),
    "main.rs": (_RUST.encode(), "rust"),
    "story.txt": (_PROSE.encode() * 3, "txt"),
    "short.txt": (b"hello", "txt"),
    "nothing": (b"", "empty"),
    "blank": (b" \n" * 3000, "txt"),
    "four bytes": (b"\xff\xfe\x00\x80", "unknown"),
    "noise": (bytes((n * n * 31 + n * 17 + (n >> 3) * 101) % 256 for n in range(3000)), "unknown"),
}
