"""Results of long benchmark scripts, kept in a folder so that an interrupted run goes on."""

from secateur.checkpoint.format import dump_json, read_json
from secateur.files import atomic_write_bytes


def cached(path, settings, make):
    """Return what `make` gives, a dictionary, from `path` where it was made with the same settings."""
    if not path.exists():
        found = make()
        atomic_write_bytes(path, dump_json({"settings": settings, **found}))
    content = read_json(path)
    if content["settings"] != settings:
        raise SystemExit(f"{path} was made with other options: name another folder")
    return content
