"""A web server of this machine that answers range requests, as object stores do."""

import contextlib
import http.server
import re
import threading


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, parts of files too, and counts the bytes."""

    sent = 0

    def do_GET(self):
        content = (
            (self.root / self.path.lstrip("/")).read_bytes() if (self.root / self.path.lstrip("/")).is_file() else None
        )
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2] or len(content) - 1)) if asked else (0, len(content) - 1)
        part = content[first : last + 1]
        Handler.sent += len(part)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def do_HEAD(self):
        path = self.root / self.path.lstrip("/")
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    """The URL of a folder, while the block lasts."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Rooted", (Handler,), {"root": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
