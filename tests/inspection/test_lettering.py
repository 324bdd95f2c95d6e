"""Names of classes in any script: drawn where a font has them, spelt out where none has; no box."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.support.fonts import as_collection, make_font
from vit_dist.inspection import fonts
from vit_dist.inspection.lettering import (
    LINE_HEIGHT,
    _pieces,
    draw_text,
    shortened,
    text_width,
    undrawable,
)

NAMES = [
    "漢字", "汉字", "ひらがな", "한국어", "عربي", "עברית", "देवनागरी", "தமிழ்", "ไทย", "Русский",
    "Ελληνικά", "ქართული", "Հայերեն", "አማርኛ", "Tiếng Việt", "façade", "Łódź", "😀", "🇩🇪", "👨‍👩‍👧",
    "«… ½°C»", "e\u0301te\u0301", "tab\there", "half \udcff", "\u200bx\u200b", "日本 dog 日本",
]  # fmt: skip


@pytest.fixture
def fonts_of(monkeypatch, tmp_path):
    """Sets the machine's fonts: file name -> bytes."""

    def put(**files):
        for name, data in files.items():
            path = tmp_path / "truetype" / name.replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path), str(tmp_path / "absent")))
        clear()

    def clear():
        for cached in (fonts.find_font, _pieces):
            cached.cache_clear()

    yield put
    clear()


def drawn(text):
    image = Image.new("L", (int(text_width(text)) + 20, LINE_HEIGHT), "white")
    draw_text(ImageDraw.Draw(image), (10, 0), text)
    return np.asarray(image)


def spelt(text):
    return "".join(piece for piece, _ in _pieces(text))


def boxes_of(font):
    """What a font draws for what it lacks."""
    image = Image.new("L", (40, LINE_HEIGHT), "white")
    ImageDraw.Draw(image).text((10, 13), "\uffff", font=font, fill="black", anchor="ls")
    pixels = np.asarray(image)
    columns = np.flatnonzero((pixels < 255).any(axis=0))
    return pixels[:, columns[0] : columns[-1] + 1]


def holds(pixels, part):
    """Whether a picture has `part` at any place of its line."""
    width = part.shape[1]
    return any(
        np.array_equal(pixels[:, i : i + width], part) for i in range(pixels.shape[1] - width + 1)
    )


@pytest.mark.parametrize("own_fonts", [False, True], ids=["no fonts", "this machine's"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_name_shows_a_box(name, own_fonts, fonts_of):
    if not own_fonts:
        fonts_of()
    used = {font.draws for _, font in _pieces(name)}
    boxes = [boxes_of(font) for font in used]
    assert not any(holds(drawn(name), box) for box in boxes)
    # The test sees a box where there is one.
    plain = ImageFont.load_default(fonts.SIZE)
    image = Image.new("L", (200, LINE_HEIGHT), "white")
    ImageDraw.Draw(image).text((10, 13), "x漢", font=plain, fill="black", anchor="ls")
    assert holds(np.asarray(image), boxes_of(plain))


def test_different_names_look_different(fonts_of):
    fonts_of()
    pictures = {drawn(name).tobytes() for name in NAMES}
    assert len(pictures) == len(NAMES)


@pytest.mark.parametrize("kind", [4, 12])
@pytest.mark.parametrize("collection", [False, True])
def test_a_font_of_the_machine_is_used(kind, collection, fonts_of):
    font = make_font("字漢", kind=kind)
    files = {"x_ttc": as_collection(font)} if collection else {"x_otf": font}
    fonts_of(other_ttf=make_font("ab"), **files)
    assert spelt("cat 漢字") == "cat 漢字" and undrawable(["漢字cat"]) == ""
    (_, plain), (text, found) = _pieces("cat 漢字")
    assert plain is fonts.plain_font() and text == "漢字"
    assert found.draws.path.endswith("x.ttc" if collection else "x.otf")
    direct = ImageFont.truetype(found.draws.path, fonts.SIZE)
    image = Image.new("L", (40, LINE_HEIGHT), "white")
    ImageDraw.Draw(image).text((10, 13), "漢", font=direct, fill="black", anchor="ls")
    np.testing.assert_array_equal(drawn("漢"), np.asarray(image)[:, : drawn("漢").shape[1]])


def test_beyond_16_bits(fonts_of):
    fonts_of(emoji_ttf=make_font("😀😁", kind=12))
    assert spelt("😁!") == "😁!" and spelt("😂") == "U+1F602 "


def test_the_plainest_font_with_the_whole_text_is_taken(fonts_of):
    fonts_of(
        Sans_ttf=make_font("漢"),
        SansBold_ttf=make_font("漢字"),
        SansBoldItalic_ttf=make_font("漢字a"),
    )
    paths = [[font.draws.path.rsplit("/")[-1] for _, font in _pieces(t)] for t in ("漢", "漢字漢")]
    assert paths == [["Sans.ttf"], ["SansBold.ttf"]]


def test_what_is_spelt_out(fonts_of):
    fonts_of(broken_ttf=b"\0\1\0\0 is no font", empty_otf=b"", LastResort_otf=make_font("漢字é"))
    assert spelt("漢字") == "U+6F22 U+5B57 "
    assert spelt("été e\u0301") == "ete e"
    assert spelt("a\nb\x07 c\u3000d") == "a bU+0007  c d"
    assert spelt("x\u200d\ufe0fy") == "xy"
    assert undrawable(["漢字 cat", "漢 é\u200d"]) == "漢字é"


def test_shortened():
    assert shortened("short", 100) == "short"
    text = shortened("a name that is far too long for this", 100)
    assert text.endswith("...") and 70 < text_width(text) <= 100
    assert shortened("漢字", 1) == "..."
