import pytest
import torch
from torch import Tensor

from distill.data import shapes
from distill.data.shapes import (
    ATTRIBUTES,
    BACKGROUND,
    BACKGROUNDS,
    COLOURS,
    FIRST,
    LAYOUT,
    POSITION,
    POSITIONS,
    SECOND,
    SHAPES,
    SIZES,
    UNNAMED,
)

MANY = range(4000)
PALETTE = {  # what the words mean, in 8-bit RGB
    "red": (230, 20, 25), "green": (25, 158, 38), "blue": (30, 64, 242), "yellow": (250, 230, 25),
    "cyan": (25, 217, 230), "magenta": (235, 38, 204), "orange": (255, 133, 13), "purple": (122, 30, 184),
    "white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "tan": (204, 178, 128),
}  # fmt: skip
CENTRES = {  # as shares of height and width, from the top left
    "in the centre": (0.5, 0.5), "at the top": (0.26, 0.5), "at the bottom": (0.74, 0.5),
    "on the left": (0.5, 0.26), "on the right": (0.5, 0.74),
}  # fmt: skip


@pytest.fixture(scope="module")
def scene() -> shapes.Scenes:
    return shapes.scenes(0, MANY)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return shapes.captions(0, MANY)


def _name(pixel: Tensor) -> str:
    """The word whose colour is nearest to a pixel in [-1, 1]."""
    rgb = (pixel + 1) * 127.5
    return min(PALETTE, key=lambda word: (rgb - torch.tensor(PALETTE[word])).square().sum().item())


def _agrees(named: Tensor, there: Tensor) -> Tensor:
    """`[B]`: whether everything that is named is there."""
    return ((named == UNNAMED) | (named == there)).all(1)


def test_there_is_enough_to_tell_apart():
    assert len(set(SHAPES)) >= 6 and len(set(COLOURS)) >= 8
    assert len(set(SIZES)) >= 2 and len(set(POSITIONS)) >= 5 and len(set(BACKGROUNDS)) >= 4


def test_captions_read_back_name_what_is_in_the_picture(scene, captions):
    named = shapes.parse(captions)
    there = scene.attributes
    assert _agrees(named.attributes[:, : FIRST.start], there[:, : FIRST.start]).all()
    straight = _agrees(named.attributes[:, FIRST], there[:, FIRST]) & _agrees(
        named.attributes[:, SECOND], there[:, SECOND]
    )
    alone = (named.attributes[:, SECOND] == UNNAMED).all(1)
    either = straight | (alone & _agrees(named.attributes[:, FIRST], there[:, SECOND]))
    assert torch.where(named.ordered, straight, either).all()
    assert 0 < named.ordered.float().mean() < 1


@pytest.mark.parametrize(
    ("prompt", "turned", "layout"),
    [
        ("a red ring left of a small blue shape", "a small blue shape right of a red ring", "row"),
        ("a large cross above a square", "a square below a large cross", "column"),
    ],
)
def test_two_objects_are_put_into_their_places_in_either_wording(prompt, turned, layout):
    named = shapes.parse([prompt, turned])
    assert torch.equal(named.attributes[0], named.attributes[1])
    assert named.attributes[0, LAYOUT] == shapes.LAYOUTS.index(layout)
    assert named.ordered.all()


def test_a_caption_is_read_word_by_word():
    named = shapes.parse(["a small cyan diamond at the bottom on a tan background"])
    expected = [0, BACKGROUNDS.index("tan"), POSITIONS.index("at the bottom")]
    expected += [SHAPES.index("diamond"), COLOURS.index("cyan"), SIZES.index("small")] + [UNNAMED] * 3
    assert named.attributes.tolist() == [expected]


def test_captions_leave_things_open(captions):
    named = shapes.parse(captions).attributes != UNNAMED
    share = dict(zip(ATTRIBUTES, named.float().mean(0).tolist(), strict=True))
    assert all(0.05 < value < 0.95 for value in share.values()), share


def test_every_value_of_every_attribute_is_drawn(scene):
    for column, count in enumerate(ATTRIBUTES.values()):
        values = scene.attributes[:, column]
        seen = torch.bincount(values[values != UNNAMED], minlength=count)
        assert len(seen) == count
        shares = seen / seen.sum()
        assert shares.min() > 0.7 / count if column != LAYOUT else shares.min() > 0.2


def test_every_word_is_used(captions):
    words = set(" ".join(captions).split())
    phrases = {word for phrase in (*SHAPES, *COLOURS, *SIZES, *POSITIONS, *BACKGROUNDS) for word in phrase.split()}
    assert phrases | {"above", "below", "shape"} <= words
    assert len(set(captions)) > 1500


@pytest.mark.parametrize("indices", [[7], [100, 3, 7], [7, 10**9, 7]])
def test_a_sample_is_a_function_of_seed_and_index_alone(indices):
    together, texts = shapes.scenes(5, indices), shapes.captions(5, indices)
    pictures = shapes.render(together, 16, 24)
    for row, index in enumerate(indices):
        alone = shapes.scenes(5, [index])
        assert torch.equal(together.attributes[row], alone.attributes[0])
        assert torch.equal(pictures[row], shapes.render(alone, 16, 24)[0])
        assert texts[row] == shapes.captions(5, [index])[0]


def test_another_seed_is_another_data_set(scene):
    other = shapes.scenes(1, MANY)
    assert (scene.attributes[:, BACKGROUND] == other.attributes[:, BACKGROUND]).float().mean() < 0.4
    shifted = shapes.scenes(0, range(1, 4001))
    assert not torch.equal(shifted.centre, other.centre)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (24, 40), (40, 24), (17, 33)])
def test_pictures_have_any_resolution_and_aspect_ratio(height, width):
    pictures = shapes.render(shapes.scenes(0, range(200)), height, width)
    assert pictures.shape == (200, 3, height, width) and pictures.dtype == torch.float32
    assert -1 <= pictures.min() and pictures.max() <= 1


def test_a_larger_picture_shows_the_same(scene):
    some = shapes.scenes(0, range(100))
    small, large = shapes.render(some, 32, 32), shapes.render(some, 128, 128)
    pooled = torch.nn.functional.avg_pool2d(large, 4)
    assert (small - pooled).abs().mean() < 0.02


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (80, 48)])
def test_objects_have_their_colour_at_their_place_on_their_ground(scene, height, width):
    attributes = scene.attributes
    pictures = shapes.render(shapes.scenes(0, range(600)), height, width)
    checked = 0
    for picture, row in zip(pictures, attributes[:600].tolist(), strict=True):
        if row[LAYOUT] == 0:
            places = [(row[FIRST], CENTRES[POSITIONS[row[POSITION]]])]
        elif row[LAYOUT] == 1:
            places = [(row[FIRST], (0.5, 0.25)), (row[SECOND], (0.5, 0.75))]
        else:
            places = [(row[FIRST], (0.25, 0.5)), (row[SECOND], (0.75, 0.5))]
        for (shape, colour, _), (down, across) in places:
            if SHAPES[shape] == "ring" and height != width:
                continue  # the hole is smaller than the places' spread along the longer side
            pixel = picture[:, int(down * height), int(across * width)]
            expected = BACKGROUNDS[row[BACKGROUND]] if SHAPES[shape] == "ring" else COLOURS[colour]
            assert _name(pixel) == expected
            checked += 1
    assert checked > 700


def test_a_caption_of_two_objects_says_which_is_where(scene, captions):
    pictures = shapes.render(shapes.scenes(0, range(1500)), 64, 64)
    spots = {"left of": ((32, 16), (32, 48)), "right of": ((32, 48), (32, 16))}
    spots |= {"above": ((16, 32), (48, 32)), "below": ((48, 32), (16, 32))}
    checked = {relation: 0 for relation in spots}
    for picture, caption in zip(pictures, captions[:1500], strict=True):
        for relation, places in spots.items():
            first, found, second = caption.partition(f" {relation} ")
            for phrase, (row, column) in zip((first, second), places, strict=True):
                colours = [word for word in phrase.split(" on a ")[0].split() if word in COLOURS]
                if found and colours and "ring" not in phrase and "shape" not in phrase:
                    assert _name(picture[:, row, column]) == colours[0], caption
                    checked[relation] += 1
    assert min(checked.values()) > 20


def _cover(scene: shapes.Scenes, height: int, width: int) -> Tensor:
    """Where pictures differ from their top left corner, `[B, H, W]`; meant for objects in the centre."""
    pictures = shapes.render(scene, height, width)
    return ((pictures - pictures[:, :, :1, :1]).abs() > 0.1).any(1)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (80, 48)])
def test_circles_stay_round_at_any_aspect_ratio(scene, height, width):
    single = (scene.attributes[:, LAYOUT] == 0) & (scene.attributes[:, FIRST.start] == SHAPES.index("circle"))
    chosen = torch.nonzero(single & (scene.attributes[:, POSITION] == 0))[:20, 0].tolist()
    assert len(chosen) == 20
    for mask in _cover(shapes.scenes(0, chosen), height, width):
        tall, wide = mask.any(1).sum().item(), mask.any(0).sum().item()
        assert tall == pytest.approx(wide, abs=2)
        assert 0.25 * min(height, width) <= tall <= 0.52 * min(height, width) + 2


@pytest.mark.parametrize("shape", SHAPES)
def test_large_objects_cover_more_than_small_ones(scene, shape):
    single = (scene.attributes[:, LAYOUT] == 0) & (scene.attributes[:, POSITION] == 0)
    chosen = torch.nonzero(single & (scene.attributes[:, FIRST.start] == SHAPES.index(shape)))[:, 0].tolist()
    areas = _cover(shapes.scenes(0, chosen), 64, 64).flatten(1).sum(1)
    large = scene.attributes[chosen, FIRST.stop - 1] == SIZES.index("large")
    assert large.any() and not large.all()
    assert areas[large].min() > 1.3 * areas[~large].max()


def test_an_empty_caption_asks_for_nothing():
    named = shapes.parse([""])
    assert (named.attributes == UNNAMED).all() and not named.ordered.any()


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a photo of a cat", "photo"),
        ("a purple elephant", "elephant"),
        ("a red ring left of a dog", "dog"),
        ("a red ring on a pink background", "on"),
    ],
)
def test_a_prompt_of_another_language_is_refused(prompt, word):
    with pytest.raises(ValueError, match=f"'{word}' in .* is no word of the shapes captions; write for example"):
        shapes.parse(["a red ring", prompt])
