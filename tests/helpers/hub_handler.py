"""How a Hub of ours answers: its pages and its store of large files, one request at a time."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import READER, WRITER, File, Repo

if TYPE_CHECKING:
    from hub_server import Hub

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "llama3.2", "other")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets, and the second would wait 40 ms
    hub: Hub
    is_store: bool
    cut_after: int | None = None
    mute = False
    body: bytes | None = None

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        self.cut_after, self.mute, self.body = None, False, None
        super().handle_one_request()

    def do_GET(self) -> None:
        if self.hub.down:
            return self.hang_up()
        self.hub.requests.append(f"{self.command} {self.path}")
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and re.search(fault.path, self.path):
                fault.times -= 1
                if fault.act(self):
                    return None
                break
        url = urlsplit(self.path)
        self.query = {key: value[0] for key, value in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        return self.serve_store(parts) if self.is_store else self.serve_hub(parts)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def read(self) -> bytes:
        if self.body is None:
            length = self.headers.get("Content-Length")
            if length is None and "chunked" in self.headers.get("Transfer-Encoding", ""):
                self.body = b""
                while size := int(self.rfile.readline(), 16):
                    self.body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                self.body = self.rfile.read(int(length or 0))
                if len(self.body) < int(length or 0):
                    raise ConnectionError("the client went away")
        return self.body

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, no farewell
        self.connection.close()

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        self.read()
        if self.mute:
            return self.hang_up()
        data = content if isinstance(content, bytes) else json.dumps(content).encode() if content is not None else b""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.cut_after is not None and self.cut_after < len(data):
            self.wfile.write(data[: self.cut_after])
            self.wfile.flush()
            time.sleep(0.05)
            return self.hang_up()
        self.wfile.write(data)
        return None

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    # The store

    def serve_store(self, parts: list[str]) -> None:
        hub, oid = self.hub, parts[1]
        if "authorization" in self.headers:
            hub.leaks.append(f"{self.command} {self.path}")
        if parts[0] == "complete":
            data = b"".join(hub.parts[oid][part["partNumber"]] for part in json.loads(self.read())["parts"])
            if hashlib.sha256(data).hexdigest() != oid:
                return self.answer(400, {"error": "the parts do not make the file"})
            hub.store[oid] = data
            return self.answer(200, {})
        if self.command == "PUT":
            data = self.read()
            with hub.lock:
                if parts[0] == "part":
                    hub.parts.setdefault(oid, {})[int(parts[2])] = data
                elif hashlib.sha256(data).hexdigest() == oid:
                    hub.store[oid] = data
                else:
                    return self.answer(400)
            return self.answer(200, b"", ETag=f'"{hashlib.md5(data).hexdigest()}"')
        data = hub.store[oid]
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            first = int(start[1])
            content_range = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[first:], Content_Range=content_range, ETag=f'"{oid}"')
        return self.answer(200, data, ETag=f'"{oid}"')

    # The Hub

    def serve_hub(self, parts: list[str]) -> None:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in (WRITER, READER):
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if parts[:2] == ["api", "whoami-v2"]:
            who = {"type": "user", "name": "user", "auth": {"accessToken": {"displayName": "t", "role": "write"}}}
            return self.answer(200 if token else 401, who if token else {"error": "no token"})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.validate(json.loads(self.read())["content"])
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(token)
        if parts[:2] == ["api", "models"] or ".git" in self.path or parts[2:3] == ["resolve"]:
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
            repo = self.hub.repos.get(name)
            if repo is None or (repo.private and not token):
                return self.refuse(401 if not token else 404, "RepoNotFound", "Repository not found")
            if self.command in ("POST", "PUT") and token != WRITER:
                return self.refuse(403 if token else 401, "", "You have no rights to write to this repository")
            if parts[0] != "api" and parts[2] == "resolve":
                return self.resolve(name, repo, parts[3:])
            if parts[0] != "api":
                return self.objects(name, parts)
            return self.api(name, repo, parts[4:])
        return self.answer(404, {"error": "no such page"})

    def validate(self, content: str) -> None:
        import yaml

        try:
            metadata = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        except yaml.YAMLError as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        errors = []
        if metadata.get("license", "mit") not in LICENSES:
            errors.append({"message": '"license" must be one of [' + ", ".join(LICENSES) + "]"})
        if not isinstance(metadata.get("tags", []), list):
            errors.append({"message": '"tags" must be an array'})
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, token: str) -> None:
        wanted = json.loads(self.read())
        if token != WRITER:
            return self.answer(403 if token else 401, {"error": "You don't have the rights to create a model"})
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if name.split("/")[0] == "stranger":
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        url = f"{self.hub.endpoint}/{name}"
        with self.hub.lock:
            if name in self.hub.repos:
                return self.answer(409, {"error": "You already created this model repo", "url": url})
            repo = self.hub.repos[name] = Repo(wanted.get("visibility") == "private")
            repo.commit("main", {".gitattributes": File(GIT_ATTRIBUTES, size=len(GIT_ATTRIBUTES))}, "initial commit")
        return self.answer(200, {"url": url})

    def api(self, name: str, repo: Repo, rest: list[str]) -> None:
        action = rest[0] if rest else "revision"
        if action in ("tag", "branch"):
            return self.add_ref(repo, action, rest[1])
        if action == "refs":

            def row(ref: str, name: str) -> dict[str, str]:
                return {"name": name, "ref": ref, "targetCommit": repo.refs[ref]}

            tags = [row(ref, ref.removeprefix("refs/tags/")) for ref in repo.refs if ref.startswith("refs/tags/")]
            pulls = [row(ref, ref) for ref in repo.refs if ref.startswith("refs/pr/")]
            branches = [
                row(ref, ref) | {"ref": f"refs/heads/{ref}"} for ref in repo.refs if not ref.startswith("refs/")
            ]
            return self.answer(200, {"branches": branches, "converts": [], "tags": tags, "pullRequests": pulls})
        if action == "discussions":
            pulls = [int(ref.rpartition("/")[2]) for ref in repo.refs if ref.startswith("refs/pr/")]
            rows = [
                {
                    "title": "",
                    "num": number,
                    "author": {"name": "user"},
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "open",
                    "repo": {"name": name, "type": "model"},
                    "isPullRequest": True,
                }
                for number in pulls
            ]
            return self.answer(200, {"discussions": rows, "count": len(rows), "start": 0})
        if action.startswith("xet-"):
            exp = int(time.time()) + 3600
            url = f"local://{self.hub.xet}"
            headers = {"X_Xet_Cas_Url": url, "X_Xet_Access_Token": "xet", "X_Xet_Token_Expiration": str(exp)}
            return self.answer(200, {"accessToken": "xet", "exp": exp, "casUrl": url}, **headers)
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.resolve(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.answer(200, {"id": name, "sha": commit, "private": repo.private, "siblings": siblings})
        if action == "tree":
            return self.answer(200, [self.row(path, file) for path, file in files.items()])
        if action == "preupload":
            rows = []
            for item in json.loads(self.read())["files"]:
                is_large = item["size"] > self.hub.large or item["path"].endswith(".safetensors")
                old = files.get(item["path"])
                rows.append(
                    {
                        "path": item["path"],
                        "uploadMode": "lfs" if is_large else "regular",
                        "shouldIgnore": False,
                        "oid": old and (old.sha256 or old.blob),
                    }
                )
            return self.answer(200, {"files": rows})
        if action == "commit":
            return self.commit(name, repo, revision)
        return self.answer(404, {"error": f"no such call: {action}"})

    def row(self, path: str, file: File) -> dict[str, Any]:
        row: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.blob}
        if file.sha256:
            row["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
            if file.sha256 in (xet := self.hub.xet_files()):
                row["xetHash"] = xet[file.sha256]
        return row

    def add_ref(self, repo: Repo, kind: str, name: str) -> None:
        wanted = json.loads(self.read() or b"{}")
        ref, start = (
            (f"refs/tags/{wanted['tag']}", name) if kind == "tag" else (name, wanted.get("startingPoint", "main"))
        )
        with self.hub.lock:
            if ref in repo.refs:
                return self.answer(409, {"error": f"{kind} already exists"})
            target = repo.resolve(start)
            if target is None:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {start}")
            repo.refs[ref] = target
        return self.answer(200, {})

    def commit(self, name: str, repo: Repo, revision: str) -> None:
        hub = self.hub
        lines = [json.loads(line) for line in self.read().splitlines()]
        header = lines[0]["value"]
        with hub.lock:
            head = repo.resolve(revision) or ""
            as_pull = self.query.get("create_pr") == "1"
            if not as_pull and header.get("parentCommit") not in (None, head):
                return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            files = dict(repo.commits[head])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    data = base64.b64decode(value["content"])
                    files[value["path"]] = File(data, size=len(data))
                elif line["key"] == "lfsFile":
                    if not hub.has(value["oid"]):
                        return self.answer(400, {"error": f"LFS pointer {value['path']} points to nothing"})
                    files[value["path"]] = File(sha256=value["oid"], size=value["size"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            ref = revision
            result: dict[str, Any] = {}
            if as_pull:
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
                ref = f"refs/pr/{number}"
                result["pullRequestUrl"] = f"{hub.endpoint}/{name}/discussions/{number}"
            made = repo.commit(ref, files, header["summary"])
        self.answer(
            200, result | {"success": True, "commitOid": made, "commitUrl": f"{hub.endpoint}/{name}/commit/{made}"}
        )

    def objects(self, name: str, parts: list[str]) -> None:
        """Git LFS: where to send objects, and whether they are complete."""
        hub = self.hub
        wanted = json.loads(self.read())
        if parts[-1] == "verify":
            return self.answer(200 if wanted["oid"] in hub.store else 404, {})
        rows = []
        for item in wanted["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in hub.store:
                base = f"{hub.endpoint}/{name}.git/info/lfs/objects"
                upload: dict[str, Any] = {"href": f"{hub.store_url}/object/{item['oid']}?X-Signature=s"}
                if hub.part and item["size"] > hub.part:
                    count = -(-item["size"] // hub.part)
                    urls = {str(i + 1): f"{hub.store_url}/part/{item['oid']}/{i + 1}" for i in range(count)}
                    upload = {
                        "href": f"{hub.store_url}/complete/{item['oid']}?X-Signature=s",
                        "header": {"chunk_size": str(hub.part), **urls},
                    }
                row["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            rows.append(row)
        return self.answer(200, {"transfer": "multipart" if hub.part else "basic", "objects": rows})

    def resolve(self, name: str, repo: Repo, rest: list[str]) -> None:
        revision, path = rest[0], "/".join(rest[1:])
        commit = repo.resolve(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X_Repo_Commit": commit}
        file = repo.commits[commit].get(path)
        if file is None:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers)
        if file.sha256 is None:
            return self.answer(200, file.data, ETag=f'"{file.blob}"', **headers)
        headers |= {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(file.size)}
        xet = self.hub.xet_files().get(file.sha256)
        if xet:
            route = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{commit}"
            headers |= {"X_Xet_Hash": xet, "Link": f'<{route}>; rel="xet-auth"', "X_Xet_Refresh_Route": route}
        url = f"{self.hub.store_url}/object/{file.sha256}?X-Signature=s"
        return self.answer(302, b"", Location=url, **headers)
