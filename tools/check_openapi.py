"""Hold a server to its own /openapi.json, by schemathesis.

usage: python tools/check_openapi.py RUN_OR_DIR [--st PROGRAM] [--examples N] [--seed N] [-- MORE]

`llmnorm serve RUN_OR_DIR` runs with a key, and schemathesis sends it what the document allows and
what it does not allow, by every route: so many bodies each, every boundary of every field. No
answer may be a 5xx, or have a status, a content type, a header or a body that the document does not
declare; what is not allowed is refused, other methods too, and nothing is answered without the key.
Words behind `--` are handed on. The exit code is schemathesis' own: 1 if something was found, 2 if
there is no schemathesis (`pip install schemathesis` into an environment of its own has it).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEY = "a-key-for-schemathesis"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


def start(path: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The server, which writes to `log`, and the URL of its document."""
    words = [sys.executable, "-m", "llmnorm", "serve", str(path.resolve()), "--port=0"]
    words += ["--draft=lookup", "generation.context=64", "serving.access_log=none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LLMNORM_API_KEY": KEY}
    with log.open("wb") as opened:
        server = subprocess.Popen(words, stderr=opened, env=environment)
    while server.poll() is None:
        if found := re.search(r"serving at (http://[^ ]*:\d+)/v1", log.read_text()):
            return server, f"{found[1]}/openapi.json"
        time.sleep(0.1)
    sys.exit(f"the server ended with code {server.returncode}:\n{log.read_text()}")


def main() -> int:
    """Check; schemathesis' exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, metavar="RUN_OR_DIR")
    parser.add_argument("--st", default="st", metavar="PROGRAM", help="schemathesis' command")
    parser.add_argument("--examples", type=int, default=50, help="bodies for each route")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("more", nargs="*", help="further words for schemathesis")
    parsed = parser.parse_args()
    program = shutil.which(parsed.st)
    if program is None:
        print(f"there is no {parsed.st}; pip install schemathesis has it")
        return 2
    place = Path(tempfile.mkdtemp())
    server, document = start(parsed.path, place / "log")
    words = [program, "run", document, f"--checks={','.join(CHECKS)}", "--continue-on-failure"]
    words += [f"--max-examples={parsed.examples}", f"--seed={parsed.seed}"]
    words += ["--header", f"Authorization: Bearer {KEY}", "--wait-for-schema=60"]
    words += ["--suppress-health-check=all", "--request-timeout=60", *parsed.more]
    try:
        code = subprocess.run(words, cwd=place, check=False).returncode
        ended = server.poll()
    finally:
        server.terminate()
        server.wait()
        said = (place / "log").read_text()
        shutil.rmtree(place)
    if ended is not None or "Traceback" in said:
        print(f"the server ended with code {ended}; it has said:\n{said}")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
