"""Finding the decoder of a model, its blocks, and what stands beside it: vision and audio towers, encoder, connector.

The decoder is what the model itself names (`get_decoder`): no tower is taken for it, however many blocks it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from inlay.core.errors import InlayError
from inlay.models.roles import is_linear

CONNECTOR = re.compile(
    r"projector|connector|merger|aligner|resampler|perceiver|q_?former|abstractor|embed_vision|embed_audio|adapter"
    r"|visual_projection|vision_projection|image_to_text|language_projection|mm_input"
)
TOWERS = (
    ("video", re.compile(r"video_tower")),
    ("vision", re.compile(r"vision|visual|image|img|pixel|vq|sam_encoder|vit\b|generation_head|generation_embed")),
    ("patcher", re.compile(r"patcher")),
    ("pooler", re.compile(r"^pooler$")),
    ("audio", re.compile(r"audio|speech|sound|wav")),
)
"""What a module's name says of the part of the model that it belongs to."""


@dataclass
class Parts:
    """Paths of one model's parts."""

    decoder: str
    stacks: list[str]
    """Lists of the decoder's blocks, in the order of its modules; nearly always one."""
    embed: str | None
    head: str | None
    towers: dict[str, list[str]] = field(default_factory=dict)
    """Name of a part beside the decoder -> its lists of blocks, which may be none."""

    def of(self, path: str) -> str:
        """The part a module belongs to; empty: the language model."""
        inside = _below(path, self.decoder)
        segments = path.removeprefix(self.decoder).strip(".").split(".") if inside else path.split(".")
        if any(_below(path, s) for s in self.stacks):
            return ""
        if any(CONNECTOR.search(s) for s in segments):
            return "connector"
        for name, pattern in TOWERS:
            if any(pattern.search(s) for s in segments):
                return name
        if inside:
            return "encoder" if "encoder" in segments and any("decoder" in s for s in self.stacks) else ""
        if self.head and path.split(".")[0] == self.head.split(".")[0]:
            return "" if path == self.head else "head"
        if "encoder" in segments:
            return "encoder"
        names = [s for s in segments if s != "model" and not s.isdigit()]
        return names[0] if names else ""


def _below(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + ".")


def find(model: nn.Module, blocks: str | None = None, embed: str | None = None, head: str | None = None) -> Parts:
    """The parts of a model.

    Args:
        blocks: path of its list of blocks, if a table knows it; likewise `embed` and `head`.

    Raises:
        InlayError: no list of blocks is the decoder's.
    """
    names = {id(m): n for n, m in model.named_modules(remove_duplicate=False)}
    decoder = blocks.rpartition(".")[0] if blocks else _decoder(model, names)
    lists = _lists(model)
    found = Parts(decoder, [blocks] if blocks else [], embed or _end(model, names, "get_input_embeddings"), None)
    found.head = head if head and head in names.values() else _end(model, names, "get_output_embeddings", decoder)
    if not blocks:
        mine = [n for n in lists if _below(n, decoder)]
        if any(_mentions(n, decoder, "decoder") for n in mine):  # an encoder beside it is a part of its own
            mine = [n for n in mine if not _mentions(n, decoder, "encoder")] or mine
        found.stacks = [n for n in mine if not found.of(n)]
    if not found.stacks:
        raise InlayError(
            f"cannot tell which blocks of {type(model).__name__} are its language model's: its decoder is "
            f"{decoder or 'the model'!r}, its lists of blocks are {', '.join(lists) or 'none'}; add an entry to "
            "inlay.models.families"
        )
    for name in lists:
        if name not in found.stacks and (part := found.of(name)):
            found.towers.setdefault(part, []).append(name)
    return found


def _mentions(path: str, decoder: str, word: str) -> bool:
    return word in path.removeprefix(decoder).split(".")


def _decoder(model: nn.Module, names: dict[int, str]) -> str:
    """Path of the language model as the model names it, else of what holds its embedding."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    if isinstance(inner, nn.Module) and names.get(id(inner)) and _lists(inner):
        return names[id(inner)]
    embed = _end(model, names, "get_input_embeddings")
    root = embed.rpartition(".")[0] if embed else ""
    while root and not _lists(model.get_submodule(root)):
        root = root.rpartition(".")[0]
    return root


def _end(model: nn.Module, names: dict[int, str], get: str, decoder: str = "") -> str | None:
    """Path of the embedding or the head, as the model or what holds its decoder says; None if neither does."""
    holders = [decoder.rsplit(".", i)[0] for i in range(decoder.count(".") + 1)] if decoder else []
    for holder in (model, *(model.get_submodule(h) for h in reversed(holders))):
        try:
            module = getattr(holder, get)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module) and id(module) in names:
            return names[id(module)]
    return None


def _lists(model: nn.Module) -> list[str]:
    """Paths of the outermost lists of blocks: modules of several parts with matrices in them."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _are_blocks(module) and not any(_below(name, f) for f in found):
            found.append(name)
    return found


def _are_blocks(modules: Iterable[nn.Module]) -> bool:
    each = list(modules)
    inner = [i for m in each for i in m.modules() if not isinstance(i, nn.Embedding)]
    has_matrices = any(p.dim() >= 2 for i in inner for p in i.parameters(recurse=False))
    return has_matrices and all(list(m.children()) and not is_linear(m) for m in each)
