"""JSON merge patches (RFC 7386) and Kubernetes' strategic ones, as far as kubectl sends them."""

from __future__ import annotations

from typing import Any

MERGE_KEYS = {
    "containers": ("name",),
    "env": ("name",),
    "ports": ("containerPort", "port"),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "topologySpreadConstraints": ("topologyKey",),
}
"""By the list's field; of two, the one that the items have (a container's ports, a Service's)."""


def json_merge(before: Any, patch: Any) -> Any:
    """The document after an RFC 7386 patch."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(before) if isinstance(before, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = json_merge(merged.get(name), value)
    return merged


def strategic_merge(before: Any, patch: Any) -> Any:
    """The document after a strategic merge patch: lists of named things are merged by name, others replaced."""
    if not isinstance(patch, dict) or patch.get("$patch") == "replace":
        return {k: v for k, v in patch.items() if k != "$patch"} if isinstance(patch, dict) else patch
    merged = dict(before) if isinstance(before, dict) else {}
    for name, value in patch.items():
        if name == "$retainKeys":
            merged = {k: v for k, v in merged.items() if k in value}
        elif name.startswith("$"):
            continue
        elif value is None:
            merged.pop(name, None)
        elif name in MERGE_KEYS and isinstance(value, list):
            order = patch.get(f"$setElementOrder/{name}")
            merged[name] = _merged_list(MERGE_KEYS[name], merged.get(name, []), value, order)
        else:
            merged[name] = strategic_merge(merged.get(name), value)
    for name in [n for n in patch if n.startswith("$setElementOrder/")]:
        field = name.removeprefix("$setElementOrder/")
        if field not in patch:
            merged[field] = _merged_list(MERGE_KEYS[field], merged.get(field, []), [], patch[name])
    return merged


def _merged_list(
    keys: tuple[str, ...], before: list[Any], changes: list[Any], order: list[Any] | None
) -> list[dict[str, Any]]:
    def name_of(item: dict[str, Any]) -> Any:
        return next((item[key] for key in keys if key in item), None)

    items = {name_of(item): item for item in before}
    for change in changes:
        if change.get("$patch") == "delete":
            items.pop(name_of(change), None)
        else:
            items[name_of(change)] = strategic_merge(items.get(name_of(change)), change)
    if order is None:
        return list(items.values())
    wanted = [name_of(item) for item in order]
    return sorted(items.values(), key=lambda item: wanted.index(name_of(item)) if name_of(item) in wanted else -1)
