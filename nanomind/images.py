"""Opens a picture of any kind a user may have, as plain RGB, or says in one line why it cannot be used.
In: the bytes of an image file. Out: a Pillow image, upright, without transparency, 8 bits a channel.
Next: nanomind/bins.py
"""

import io
import warnings

LARGEST = 64_000_000  # pixels; a file of a few kilobytes can claim billions and fill the memory when it is decoded


def find_image(name, folder):
    """The path of an image that a record names: in `folder`, or in the folder images/ there, never outside. ValueError(reason, detail)."""
    for place in (folder, folder / "images"):
        path = (place / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ValueError("an image outside the folder of the images", f" {str(folder)!r}: {name[:80]}")
        if path.is_file():
            return path
    raise ValueError("an image that is not there", f": {folder / name}; name the folder of the images with --images")


def open_image(data, where):
    """bytes -> PIL.Image in mode RGB: turned as its EXIF says, transparent places white, 16-bit greys scaled, of an animation the first
    picture. ValueError begins with `where`."""
    from PIL import Image, ImageOps
    if not data:
        raise ValueError(f"{where}: the image is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about large images; ours is an error, below
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > LARGEST:
                raise ValueError(f"{where}: {image.width:,} x {image.height:,} pixels, at most {LARGEST:,} are opened")
            image.seek(0)
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # 16 or 32 bits of grey: Pillow would cut them off at 255
                low, high = image.getextrema()
                full = 65535 if high > 255 or image.mode.startswith("I;16") else 255
                image = image.convert("F").point(lambda grey: grey * (255 / full)).convert("L")
            if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode == "RGBA":
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Image.DecompressionBombError:
        raise ValueError(f"{where}: too many pixels, at most {LARGEST:,} are opened") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{where}: not an image that Pillow can read (begins with {data[:8]!r})") from None
    except (OSError, SyntaxError, EOFError, IndexError, KeyError, OverflowError, MemoryError) as problem:
        raise ValueError(f"{where}: the image is damaged ({' '.join(str(problem).split())[:80]})") from None
