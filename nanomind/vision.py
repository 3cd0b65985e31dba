"""Eyes: a frozen CLIP turns a picture into P vectors, a small projector into P tokens of the language model.
In: image files, a language model. Out: features (M, P, E), and a model that takes them in at the places of the pictures.
Next: nanomind/objectives.py

    tokens     E  <|im_start|> user \\n  E  E  E  E  这 是 什 么 <|im_end|> ...      E: <|endoftext|>; inside a document it is a place for a patch
    slots     -1       -1        -1  -1  0  1  2  3 -1 ...                          which of the M * P feature vectors belongs there
    stream     e        e         e   e  p  p  p  p  e ...                          e: embedding of the token, p: projector(feature)
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nanomind.config import read_json
from nanomind.images import open_image
from nanomind.model import LanguageModel

SHIPPED = Path(__file__).parent.parent / "data_prep" / "demo" / "clip"  # what --clip demo means: a small CLIP that knows the demo's drawn scenes
FILES = "open_clip_config.json", "open_clip_model.safetensors"


class Encoder:
    """The vision tower of a CLIP, frozen. `patches` P and `width` E of its features, `identity`: what a checkpoint has to remember of it.

    Features are the patch tokens of its last layer (or the one that its folder names), without the class token and before the final norm:
    Hugging Face's CLIPVisionModel(...).last_hidden_state[:, 1:], as MiniMind-V takes them.
    """

    def __init__(self, tower, preprocess, clip, weights, layer=-1):
        self.tower, self.preprocess, self.layer = tower.eval().requires_grad_(False), preprocess, layer
        size = tower.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.patches, self.width = self.encode(torch.zeros(1, 3, self.size, self.size)).shape[1:]
        parts = list(tower.modules())
        facts = tower.preprocess_cfg, layer, [part.num_heads for part in parts if hasattr(part, "num_heads")], any(type(part).__name__ == "QuickGELU" for part in parts)
        digest = hashlib.sha256(json.dumps(facts, default=str).encode())  # the same weights with another activation or mean are another encoder
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.identity = {"clip": clip, "weights": weights, "layer": layer, "sha256": digest.hexdigest()}

    def pixels(self, data, where):
        """The bytes of an image file -> (3, S, S), by open_clip's own preprocessing of this model."""
        return self.preprocess(open_image(data, where))

    @torch.no_grad()
    def encode(self, pixels):
        """pixels: (M, 3, S, S) -> features (M, P, E) fp32."""
        depth = len(self.tower.transformer.resblocks)
        found = self.tower.forward_intermediates(pixels, indices=[depth + self.layer], output_fmt="NLC", intermediates_only=True)
        return found["image_intermediates"][-1].float()


def load_encoder(clip, weights=""):
    """clip: demo (the shipped one), a folder with an open_clip config and safetensors, or a model name of open_clip with its `weights`: a tag,
    a local file, or none for random ones."""
    folder = SHIPPED if clip == "demo" else Path(clip)
    if folder.is_dir() or clip == "demo":
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"--clip {clip}: {folder} has no {' and no '.join(missing)}")
        layer = (read_json(folder / FILES[0]).get("nanomind") or {}).get("layer", -1)
        return Encoder(*_open_clip(f"local-dir:{folder}", None, clip), clip, "", layer)
    if weights not in ("none", "openai") and Path(weights).suffix and not Path(weights).is_file():
        raise FileNotFoundError(f"--clip-weights {weights}: no such file")
    return Encoder(*_open_clip(clip, None if weights == "none" else weights, clip), clip, weights)


def _open_clip(name, weights, clip):
    """-> (vision tower, preprocessing), or one line that says what is missing."""
    import open_clip
    known = open_clip.list_models()
    if ":" not in name and name not in known:
        close = [other for other in known if clip.lower().replace("-", "") in other.lower().replace("-", "")][:5]
        raise ValueError(f"--clip {clip}: neither a folder nor a model of open_clip{'; perhaps ' + ', '.join(close) if close else ''}")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are what was asked for
    try:
        torch.manual_seed(0)
        tag = open_clip.get_pretrained_cfg(name, weights) if weights and ":" not in name else None
        quick = bool(tag and tag.get("quick_gelu"))  # OpenAI's weights want QuickGELU; open_clip only warns that the model of that name has it not
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights, force_quick_gelu=quick, weights_only=True)  # a pickle may be a program
    except Exception as problem:  # of whatever kind the downloader's, the unpickler's and open_clip's own failures are
        raise ValueError(f"--clip {clip}: its weights {weights or ''} could not be had ({' '.join(str(problem).split())[:120]}); "
                         f"{_where_to_get(clip, weights)}") from None
    finally:
        logging.getLogger().setLevel(level)
    if not hasattr(model.visual, "transformer"):
        raise ValueError(f"--clip {clip}: has no patch tokens to look at; choose a ViT")
    return model.visual, preprocess


def _where_to_get(clip, weights):
    """What somebody without a network has to fetch and how to pass it."""
    import open_clip
    known = open_clip.get_pretrained_cfg(clip, weights or "") or {}
    if not known:
        return f"tags of {clip}: {', '.join(open_clip.list_pretrained_tags_by_model(clip)[:6]) or 'none'}"
    source = f"open_clip_model.safetensors of huggingface.co/{known['hf_hub'].strip('/')}" if known.get("hf_hub") else known.get("url")
    name = clip + "-quickgelu" if known.get("quick_gelu") and not clip.endswith("-quickgelu") else clip
    return f"without a network: fetch {source} elsewhere and give --clip {name} --clip-weights FILE"


def width(clip):
    """E of an encoder, from its description alone: nothing is loaded or downloaded."""
    folder = SHIPPED if clip == "demo" else Path(clip)
    if (folder / FILES[0]).is_file():
        return read_json(folder / FILES[0])["model_cfg"]["vision_cfg"]["width"]
    import open_clip
    found = open_clip.get_model_config(clip)
    if not found:
        raise ValueError(f"--clip {clip}: neither a folder with {FILES[0]} nor a model of open_clip")
    return found["vision_cfg"].get("width", 768)


class Projector(nn.Sequential):
    """Features (..., E) -> embeddings (..., C): one linear layer with bias as in MiniMind-V, or two with a GELU between as in LLaVA-1.5."""

    def __init__(self, kind, E, C):
        super().__init__(*([nn.Linear(E, C)] if kind == "linear" else [nn.Linear(E, C), nn.GELU(), nn.Linear(C, C)]))


def projector_parameters(kind, E, C):
    return E * C + C + (0 if kind == "linear" else C * C + C)


class VisionLanguageModel(LanguageModel):
    """A language model with a projector. `vision`, what vision.json holds: identity of the `encoder`, its `patches` and `width`, the kind of
    `projector`, and the id that `mark`s the place of a picture."""

    def __init__(self, config, vision, checkpointing=False):
        super().__init__(config, checkpointing)
        self.vision = vision
        self.projector = Projector(vision["projector"], vision["width"], config.hidden_size)

    @torch.no_grad()
    def init_projector(self, seed=0):
        """Its outputs begin about as large as the embeddings, for features of about 1."""
        generator, size = torch.Generator().manual_seed(seed), self.model.embed_tokens.weight.std()
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                last = layer is self.projector[-1]
                layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0, (size if last else 1.0) / layer.in_features**0.5, generator=generator))
                layer.bias.zero_()
        return self

    def places(self, prompts, features):
        """Prompts with one mark a picture, and the pictures of each (m, P, E) or None -> prompts with P marks a picture, and slots for them."""
        found, slots, at = [], [], 0
        for ids, own in zip(prompts, features):
            ids, places = expand(ids, self.vision["mark"], self.vision["patches"])
            wanted, there = sum(place >= 0 for place in places), 0 if own is None else own.size(0) * own.size(1)
            if wanted != there:
                raise ValueError(f"a prompt with {wanted // self.vision['patches']} places for pictures and {there // self.vision['patches']} pictures")
            found.append(ids)
            slots.append([place + at if place >= 0 else -1 for place in places])
            at += wanted
        return found, slots

    def see(self, tokens, features, slots):
        """Embeddings of the tokens, (B, T, C), with the projected features at the places of the pictures.
        features: (M, P, E); slots: (B, T), which of the M * P vectors belongs here, -1: none."""
        place = slots >= 0
        wanted, there = int(place.sum()), features.size(0) * features.size(1)
        if wanted != there:
            raise ValueError(f"{wanted} places for patches in the tokens, but {there} feature vectors ({features.size(0)} pictures of {features.size(1)})")
        embeddings = self.model.embed_tokens(tokens)
        projected = self.projector(features.to(self.projector[0].weight.dtype)).flatten(0, 1)  # (M * P, C)
        return embeddings.masked_scatter(place[..., None], projected[slots[place]].to(embeddings.dtype))

    def forward(self, tokens, doc_ids=None, cache=None, embeddings=None, places=None, features=None, slots=None):
        if features is not None:
            embeddings = self.see(tokens, features, slots)
        return super().forward(tokens, doc_ids, cache, embeddings, places)


def add_eyes(model, vision, checkpointing=False, seed=0):
    """A language model -> the same with a fresh projector."""
    seeing = VisionLanguageModel(model.config, vision, checkpointing)
    seeing.load_state_dict({**seeing.state_dict(), **model.state_dict()})
    return seeing.init_projector(seed)


def expand(ids, mark, patches):
    """Ids of one text with a `mark` for every picture (anywhere but at its start) -> (ids with P marks each, slots)."""
    found, slots, images = [], [], 0
    for place, token in enumerate(ids):
        if token == mark and place:
            found += [mark] * patches
            slots += range(images * patches, (images + 1) * patches)
            images += 1
        else:
            found.append(token)
            slots.append(-1)
    return found, slots


class Features:
    """The features of a split's pictures: computed once and kept in the data folder when they fit `budget` bytes, else on demand.
    Both ways they are rounded to fp16, so that both ways training is the same."""

    def __init__(self, split, folder, name, encoder, machine, budget):
        self.split, self.encoder, self.machine = split, encoder, machine
        self.patches, self.width, self.name = encoder.patches, encoder.width, name
        shape = len(split.image_starts), encoder.patches, encoder.width
        path, size = folder / name / f"features-{encoder.identity['sha256'][:12]}-{str(machine.dtype)[6:]}.bin", 2 * int(np.prod(shape))
        encoder.tower.to(machine.device)
        self.kept = None
        if shape[0] and size <= budget:
            if not path.is_file() or path.stat().st_size != size:
                self._write(path, shape)
            self.kept = np.memmap(path, np.float16, "r", shape=shape)

    def _write(self, path, shape, batch=32):
        from tqdm import tqdm
        beside = path.with_name(path.name + ".tmp")
        try:
            with open(beside, "wb") as file, tqdm(total=shape[0], desc=f"features of {self.name}", unit="picture", disable=None) as bar:
                for start in range(0, shape[0], batch):
                    numbers = range(start, min(start + batch, shape[0]))
                    file.write(self._encode(numbers).cpu().numpy().tobytes())
                    bar.update(len(numbers))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _encode(self, numbers):
        pixels = torch.stack([self.encoder.pixels(self.split.image(i), f"picture {i} of {self.name}") for i in numbers])
        with self.machine.autocast():
            return self.encoder.encode(pixels.to(self.machine.device)).half()

    def __getitem__(self, numbers):
        """Numbers of M pictures -> (M, P, E) fp32."""
        if not len(numbers):
            return torch.zeros(0, self.patches, self.width)
        if self.kept is not None:
            return torch.from_numpy(self.kept[numbers]).float()
        return self._encode(numbers).float()


def looking(vision, clip="", weights=""):
    """A function from image files to their features, (m, P, E), with the encoder a checkpoint was trained with; it loads at the first picture."""
    loaded = []

    def look(paths):
        if not loaded:
            loaded.append(matching_encoder(vision, clip, weights))
        return loaded[0].encode(torch.stack([loaded[0].pixels(path.read_bytes(), str(path)) for path in paths]))
    return look


def matching_encoder(vision, clip="", weights=""):
    """The encoder a checkpoint was trained with, found where --clip says it is now; another one, or the same name with other weights, is refused."""
    known = vision["encoder"]
    try:
        encoder = load_encoder(clip or known["clip"], weights or known["weights"])
    except (FileNotFoundError, ValueError) as problem:
        raise type(problem)(f"{problem} (it is what this model sees through: where it lies now can be said with --clip)") from None
    if encoder.identity["sha256"] != known["sha256"]:
        raise ValueError(f"--clip {clip or known['clip']}: another encoder than this model was trained with (sha256 {encoder.identity['sha256'][:12]}, "
                         f"expected {known['sha256'][:12]})")
    return encoder
