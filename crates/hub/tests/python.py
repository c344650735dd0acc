"""Python's side of the comparison: reads one JSON object from the first line of stdin, prints one to stdout."""

import json
import os
import sys

from huggingface_hub import constants, get_token, scan_cache_dir, snapshot_download
from huggingface_hub.utils import WeakFileLock, filter_repo_objects, validate_repo_id
from huggingface_hub.errors import HFValidationError


def say(value):
    print(json.dumps(value), flush=True)


def valid(name):
    try:
        validate_repo_id(name)
        return True
    except HFValidationError:
        return False


def scan():
    info = scan_cache_dir()
    repos = {
        repo.repo_id: {
            "bytes": repo.size_on_disk,
            "revisions": {
                revision.commit_hash: {
                    "bytes": revision.size_on_disk,
                    "refs": sorted(revision.refs),
                    "files": {
                        str(file.file_path.relative_to(revision.snapshot_path)): file.blob_path.name
                        for file in revision.files
                    },
                }
                for revision in repo.revisions
            },
        }
        for repo in info.repos
    }
    return {"repos": repos, "warnings": [str(warning) for warning in info.warnings]}


task = json.loads(sys.stdin.readline())
match task["do"]:
    case "fetch":
        options = {key: task[key] for key in ("revision", "allow_patterns", "local_files_only") if key in task}
        say(snapshot_download(task["repo"], **options))
    case "scan":
        say(scan())
    case "environment":
        say(
            {
                "cache": constants.HF_HUB_CACHE,
                "endpoint": constants.ENDPOINT,
                "offline": constants.HF_HUB_OFFLINE,
                "token": get_token(),
            }
        )
    case "filter":
        say(
            [
                list(filter_repo_objects(task["files"], allow_patterns=allow or None, ignore_patterns=ignore or None))
                for allow, ignore in task["patterns"]
            ]
        )
    case "valid":
        say([valid(name) for name in task["names"]])
    case "lock":
        os.makedirs(os.path.dirname(task["path"]), exist_ok=True)
        with WeakFileLock(task["path"]):
            say("locked")
            sys.stdin.readline()
        say("released")
