"""A stand-in for the Hugging Face hub: the few addresses that its client asks for, over files in memory."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by name: {revision: {path: bytes}}; `asked` lists the requests."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.address = ""

    def add(self, name, folder, revision="main"):
        """Put a folder's files there."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories.setdefault(name, {})[revision] = files


@contextlib.contextmanager
def running():
    """A hub that answers at `address` until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value, code=200):
            self._answer(code, json.dumps(value).encode(), Content_Type="application/json")

        def _lost(self, what):
            self._answer(404, b"{}", X_Error_Code=what, X_Error_Message=what)

        def do_HEAD(self):
            hub.asked.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                return self._model(path.removeprefix("api/models/"))
            if path == "api/whoami-v2":
                return self._json({"name": "me", "type": "user", "orgs": []})
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            found = hub.repositories.get(name)
            if found is None:
                return self._lost("RepoNotFound")
            files = next((files for known, files in found.items() if revision in (known, _sha(name, known))), None)
            if files is None:
                return self._lost("RevisionNotFound")
            known = next(known for known, held in found.items() if held is files)
            if file not in files:
                headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": _sha(name, known)}
                return self._answer(404, b"", **headers)
            etag = hashlib.sha1(files[file]).hexdigest()
            self._answer(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=_sha(name, known))

        do_GET = do_HEAD

        def _model(self, path):
            name, _, revision = path.partition("/revision/")
            name, _, tree = name.partition("/tree/")
            revision = (revision or tree or "main").split("/")[0].split("?")[0]
            found = hub.repositories.get(name)
            if found is None:
                return self._lost("RepoNotFound")
            known = next((known for known in found if revision in (known, _sha(name, known))), None)
            if known is None:
                return self._lost("RevisionNotFound")
            if tree:
                entries = [{"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in found[known].items()]
                return self._json(entries)
            files = [{"rfilename": file} for file in found[known]]
            self._json({"id": name, "modelId": name, "sha": _sha(name, known), "siblings": files, "tags": []})

        def do_POST(self):
            hub.asked.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            path = unquote(urlsplit(self.path).path).strip("/")
            if path == "api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in hub.repositories:
                    return self._json({"url": f"{hub.address}/{name}"}, 409)
                hub.repositories[name] = {"main": {}}
                return self._json({"url": f"{hub.address}/{name}", "name": name})
            if path == "api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            name, _, rest = path.removeprefix("api/models/").partition("/preupload/")
            if rest:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self._json({"files": files})
            name, _, revision = name.partition("/commit/")
            held = hub.repositories[name].setdefault(revision, {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = _sha(name, revision)
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{hub.address}/{name}/commit/{oid}"})

    def _sha(name, revision):
        held = hub.repositories[name][revision]
        return hashlib.sha1(repr((revision, sorted(held))).encode()).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
