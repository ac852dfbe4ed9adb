"""The server of the embedded web: it answers for all hosts of a plan, on loopback, each URL in its own way.

A process of its own, so that it takes nothing from the driver; it ends when its standard input does, and so with the
driver, however that comes about. By hand, until Ctrl-D:

    python -m pipelines.embedded_web.server rows=1024 pictures=144 seed=0 port=8080
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from pipelines.embedded_web.pictures import MEDIA_TYPES, Picture, bomb, encode
from pipelines.embedded_web.plan import ENDLESS_BYTES, FATE, HOSTS, SHY_HOST, Row, plan
from pipelines.settings import SampleWebConfig

LOOPBACK = "127.0.0.1"
INWARD = "http://169.254.169.254/latest/meta-data/"  # where clouds hand out the credentials of a machine
ROBOTS = b"User-agent: *\nDisallow: /private/\n"
HTML = b"<!doctype html>\n<title>Picture not found</title>\n<p>The picture has moved. Try our home page.\n"
STATUS = {"missing": "404 Not Found", "gone": "410 Gone", "failing": "500 Internal Server Error"}
DRIP_SECONDS, CHUNK_BYTES = 0.1, 1 << 16


@dataclass(frozen=True)
class Page:
    """What one URL answers."""

    kind: str  # of its row, or "redirect"
    picture: Picture | None = None
    location: str = ""


def pages(rows: Iterable[Row]) -> dict[str, Page]:
    """URL -> page, for every URL that answers with more than 404."""
    found: dict[str, Page] = {}
    for row in rows:
        repeats = row.original is not None and row.kind != "copy"
        if not row.url or repeats:
            continue
        if row.kind == "circling":
            found[row.url] = Page("redirect", location="?again")
            found[f"{row.url}?again"] = Page("redirect", location=row.url)
        elif row.kind == "inward":
            found[row.url] = Page("redirect", location=INWARD)
        else:
            here = row.url
            for hop in range(row.hops):
                there = f"http://{HOSTS[hop]}/moved/{row.number}-{hop}"
                found[here], here = Page("redirect", location=there), there
            found[here] = Page(row.kind, row.picture)
    return found


def draw(page: Page) -> bytes:
    """The bytes of a page."""
    assert page.picture is not None
    match page.kind:
        case "page":
            return HTML
        case "bomb":
            return bomb()
        case "cut":
            whole = encode(page.picture)
            return whole[: len(whole) * 3 // 5]
    return encode(page.picture)


class Server:
    """Answers requests. A picture is drawn when it is first asked for, or in spare time before, and kept."""

    def __init__(self, known: dict[str, Page]) -> None:
        self.pages = known
        self.bodies: dict[Page, asyncio.Future[bytes]] = {}
        self.painter = ThreadPoolExecutor(1)  # the loop goes on answering meanwhile

    async def body(self, page: Page) -> bytes:
        if page not in self.bodies:
            self.bodies[page] = asyncio.get_running_loop().run_in_executor(self.painter, draw, page)
        return await asyncio.shield(self.bodies[page])

    async def draw_ahead(self, urls: Iterable[str]) -> None:
        """Draws one picture after the other, so that a request waits for one at most besides its own."""
        for url in urls:
            page = self.pages.get(url)
            if page is not None and page.picture is not None:
                await self.body(page)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: request after request until the client goes, asks to close, or talks nonsense."""
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            close = False
            while not close:
                request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = request.split(" ")
                fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                close = fields.get("connection", "").lower() == "close"
                host = fields.get("host", "").lower().partition(":")[0]
                if method == "GET":
                    close |= not await self.answer(f"http://{host}{target}", reader, writer)
                else:
                    await _send(writer, "405 Method Not Allowed")
        writer.close()

    async def answer(self, url: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; False where the connection is of no further use."""
        if url == f"http://{SHY_HOST}/robots.txt":
            return await _send(writer, "200 OK", ROBOTS, "Content-Type: text/plain")
        page = self.pages.get(url, Page("missing"))
        if page.kind in STATUS:
            return await _send(writer, STATUS[page.kind])
        match page.kind:
            case "redirect":
                return await _send(writer, "302 Found", b"", f"Location: {page.location}")
            case "silent":
                await reader.read()  # until the client gives up
                return False
            case "dripping":
                return await _drip(writer)
            case "endless":
                return await _flood(writer)
        assert page.picture is not None
        fields = [f"Content-Type: {MEDIA_TYPES[page.picture.suffix]}"]
        if page.kind == "opted_out":
            fields.append("X-Robots-Tag: noai, noimageai")
        return await _send(writer, "200 OK", await self.body(page), *fields)


async def _send(writer: asyncio.StreamWriter, status: str, body: bytes | None = None, *fields: str) -> bool:
    body = status.encode() if body is None else body
    head = [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}", "", ""]
    writer.write("\r\n".join(head).encode() + body)
    await writer.drain()
    return True


async def _drip(writer: asyncio.StreamWriter) -> bool:
    """A body that comes byte by byte, without end for practical purposes; each one resets a naive timeout."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 1000000\r\n\r\n\xff\xd8")
    for _ in range(999_998):
        await writer.drain()
        await asyncio.sleep(DRIP_SECONDS)
        writer.write(b"\0")
    return False


async def _flood(writer: asyncio.StreamWriter) -> bool:
    """A body that does not say how long it is, and is too long."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(ENDLESS_BYTES // CHUNK_BYTES):
        writer.write(f"{CHUNK_BYTES:x}\r\n".encode() + bytes(CHUNK_BYTES) + b"\r\n")
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    return True


async def serve(rows: list[Row], port: int) -> None:
    """Answers for a plan until the process ends; prints the address once it does."""
    server = Server(pages(rows))
    listening = await asyncio.start_server(server.talk, LOOPBACK, port, backlog=512)
    print(f"{LOOPBACK}:{listening.sockets[0].getsockname()[1]}", flush=True)
    await server.draw_ahead(row.url for row in rows if row.url and FATE[row.kind][0] != "filter_metadata")
    await listening.serve_forever()


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), CHUNK_BYTES):
        continue
    os._exit(0)  # nothing here is worth saving


def main(arguments: list[str]) -> int:
    """Serves the plan that rows=, pictures= and seed= describe on port= (0: any)."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if given.keys() != {"rows", "pictures", "seed", "port"} or not all(value.isdigit() for value in given.values()):
        print(f"found {' '.join(arguments)!r}; expected rows=N pictures=N seed=N port=N", file=sys.stderr)
        return 2
    port = int(given.pop("port"))
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        asyncio.run(serve(plan(SampleWebConfig(**{name: int(value) for name, value in given.items()})), port))
    except OSError as error:
        print(f"cannot listen on {LOOPBACK}:{port}: {error}; choose another port", file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
