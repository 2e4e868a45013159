"""`python -m reports.documents [--check]`: make the tables and figures of the documents anew."""

from __future__ import annotations

import sys

from compose.errors import ComposeError
from compose.store import write_text
from reports.documents.markers import DOCUMENTS, ROOT, fill, unfinished


def main(arguments: list[str]) -> int:
    """Fill every document, or with --check say which are not up to date; an exit code."""
    check, stale = "--check" in arguments, []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text("utf-8")
        try:
            for marker in unfinished(text):
                print(f"{document}: without <!-- end -->: {marker}", file=sys.stderr)
                return 2
            filled = fill(text, document)
        except ComposeError as error:
            print(f"{document}: {error}", file=sys.stderr)
            return error.exit_code
        if filled != text:
            stale.append(str(document))
            if not check:
                write_text(ROOT / document, filled)
    print(", ".join(stale) or "nothing", "is out of date" if check else "was changed")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
