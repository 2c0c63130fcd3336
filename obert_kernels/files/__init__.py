"""Files and folders that appear whole or not at all, where they may be put, what may be read."""

from .folders import REPORT_FILE, check_replaceable, recover, whole_folder
from .inputs import check_input_file, expanded
from .places import check_room, locked, made, try_writing
from .whole import json_text, read_json, sha256_of, write_json, write_whole

__all__ = [
    "REPORT_FILE",
    "check_input_file",
    "check_replaceable",
    "check_room",
    "expanded",
    "json_text",
    "locked",
    "made",
    "read_json",
    "recover",
    "sha256_of",
    "try_writing",
    "whole_folder",
    "write_json",
    "write_whole",
]
