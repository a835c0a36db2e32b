"""Two files (--base-file, --target-file), one sentence per line or row, aligned by line.

Text, `.jsonl` or `.parquet` with a column `text`; all but parquet may be gzipped.
"""

from __future__ import annotations

from cpt_utils.base import results, textfiles
from cpt_utils.base.sources import given_file, same_number


def read(codes: dict[str, str], dir, base_file, target_file) -> tuple[dict, dict]:
    given = {"base": base_file, "target": target_file}
    sides, facts, names = {}, {"aligned_by": "line"}, {}
    for side, code in codes.items():
        file = given_file(given[side], dir, f"--{side}-file", code)
        sides[side] = {str(number): text for number, text in enumerate(textfiles.texts(file), 1)}
        facts[side] = {"files": {str(file): results.file_sha256(file)}}
        names[side] = str(file)
    same_number(sides, names)
    return sides, facts
