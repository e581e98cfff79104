"""The `json` column of the commands' tables (cli/cli.h): what documents with --json have."""

import re


class Mismatch(Exception):
    pass


def parse(text):
    """A list of alternatives, each {name: (optional, fields below or None, of each of a list?)}; "..." stands for itself."""
    tokens = re.findall(r"[\w.]+|[?{}\[\],|]", text)
    alternatives = [_fields(tokens, None)]
    while tokens:
        if tokens.pop(0) != "|":
            raise ValueError(f"no list of fields: {text}")
        alternatives.append(_fields(tokens, None))
    return alternatives


def _fields(tokens, end):
    fields = {}
    while tokens and tokens[0] not in ("|", end):
        name = tokens.pop(0)
        if not re.fullmatch(r"\w+|\.\.\.", name) or name in fields:
            raise ValueError(f"a field '{name}'")
        optional, below, of_list = False, None, False
        if tokens and tokens[0] == "?":
            tokens.pop(0)
            optional = True
        if tokens and tokens[0] in "{[":
            of_list = tokens.pop(0) == "["
            below = _fields(tokens, "]" if of_list else "}")
            tokens.pop(0)
        fields[name] = (optional, below, of_list)
        if tokens and tokens[0] == ",":
            tokens.pop(0)
    return fields


def _compare(document, fields, where, complete):
    if not isinstance(document, dict):
        raise Mismatch(f"{where or 'the document'} is no object: {document}")
    for name, (optional, below, of_list) in fields.items():
        if name not in document:
            if optional or name == "...":
                continue
            raise Mismatch(f"{where}{name} is missing")
        value = document[name]
        if value is None:
            continue
        if name.endswith(("_ns", "_bytes", "_pages")) and (not isinstance(value, int) or isinstance(value, bool)):
            raise Mismatch(f"{where}{name} is no plain integer: {value}")
        for one in (value if of_list else [value]) if below is not None else ():
            _compare(one, below, f"{where}{name}.", complete)
    more = set(document) - set(fields)
    if complete and more and "..." not in fields:
        raise Mismatch(f"{where or 'the document'} has more: {sorted(more)}")


def compare(document, text, complete=False):
    """Raises Mismatch if the document is none of those that the text tells of. complete: it has no other fields either."""
    reasons = []
    for fields in parse(text):
        try:
            return _compare(document, fields, "", complete)
        except Mismatch as error:
            reasons.append(str(error))
    raise Mismatch("; or ".join(reasons))
