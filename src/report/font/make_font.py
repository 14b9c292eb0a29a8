"""Draws the letters of the contact sheet's labels into font.png.

    python make_font.py DejaVuSansCondensed.ttf DejaVuSansCondensed-Bold.ttf font.png

Needs pillow. One grey cell a letter, 255 where it is ink, letters side by side in the order of the text chunk "letters", one row
of cells a face; a letter begins one pixel into its cell. The chunk "advances" has the width in pixels that each letter takes, one line a face.
"""
import sys

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

SIZE = 14  # pixels to an em
HEIGHT = 18  # of a cell
LETTERS = [chr(c) for c in [*range(0x20, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]] + list("–—‘’“”•…€−×∞≤≥\ufffd")


def main(regular, bold, out):
    faces = [ImageFont.truetype(path, SIZE) for path in (regular, bold)]
    letters = "".join(dict.fromkeys(LETTERS))
    width = 2 + max(int(face.getbbox(letter)[2]) for face in faces for letter in letters)
    atlas = Image.new("L", (width * len(letters), HEIGHT * len(faces)), 0)
    for row, face in enumerate(faces):
        for column, letter in enumerate(letters):
            cell = Image.new("L", (width, HEIGHT), 0)
            ImageDraw.Draw(cell).text((1, 1), letter, font=face, fill=255)
            atlas.paste(cell, (column * width, row * HEIGHT))
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("letters", letters)
    texts.add_itxt("advances", "\n".join(" ".join(str(round(face.getlength(x))) for x in letters) for face in faces))
    texts.add_itxt("Copyright", "Letters drawn from DejaVu Sans Condensed; see LICENSE-DEJAVU")
    atlas.save(out, optimize=True, pnginfo=texts)


main(*sys.argv[1:])
